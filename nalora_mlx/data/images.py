"""Images: checked before training, opened as upright RGB, and hashed."""

import functools
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.data.image_references import data_of_uri, is_data_uri, needs_pillow, open_bytes, shown
from nalora_mlx.data.sources.files import LFS_POINTER

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000  # of an image: 300 MB as RGB. Processors shrink images to a few million pixels.
# Pillow knows more formats, but runs another program for some of them (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
_OTHER_FORMATS = {  # how files of other formats begin
    rb".{4}ftyp(heic|heix|heim|heis|hevc|mif1|msf1)": (
        "HEIC, which is not read; save it as PNG or JPEG (on a Mac: sips -s format jpeg FILE --out FILE.jpg)"
    ),
    rb".{4}ftyp": "a video, which is not read; save a frame of it as PNG or JPEG",
    rb"\s*<(!doctype html|html)": "a web page; download the image itself",
    rb"\s*<.*?svg\b": "SVG, which is not read; save it as PNG",
    rb"%PDF|%!PS": "PDF or PostScript, which is not read; save it as PNG or JPEG",
}
_COLOR_MODES = frozenset(
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
_DEEP_MODES = frozenset(["I", "I;16", "I;16L", "I;16B", "I;16N"])  # gray, with 16 bits
_ORIENTATION = 0x0112  # tag of EXIF
_UPRIGHT = {  # what makes an image of each orientation upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


# --- reading ------------------------------------------------------------------------------------------------


def open_image(reference: Any, where: str) -> "Image.Image":
    """Return an image as RGB, decoded and upright, without metadata.

    1. Take the first frame or page of several.
    2. Convert to RGB: transparent pixels are put on white, gray values of 16 bits are scaled to 8, CMYK is converted
       without color profiles.
    3. Rotate as EXIF says.

    Args:
        reference: absolute path, bytes of a file, data URI, or image of Pillow.
        where: file:line or flag, which messages begin with.

    Raises:
        InputError: the image cannot be read, or has more than MAX_PIXELS pixels.
    """
    with _opened(reference, where) as image:
        from PIL.Image import Transpose

        image.load()
        orientation = _orientation(image)
        rgb = _as_rgb(image)
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(Transpose[_UPRIGHT[orientation]])
        rgb.info = {}  # of the metadata, the orientation would be applied again
        return rgb


def check_image(reference: Any, where: str) -> bool:
    """Check an image without decoding it; return whether it has several frames or pages.

    Raises:
        InputError: as `open_image`, except for damage after the header.
    """
    with _opened(reference, where) as image:
        # MPO is a photo with previews, which cameras write as .jpg.
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


@contextmanager
def _opened(reference: Any, where: str) -> Iterator["Image.Image"]:
    """Open an image, whose pixels are not read before they are used. Turn all errors into InputError."""
    try:
        with open_bytes(reference) as file:
            image = reference if file is None else _identified(file)
            _check_header(image)
            yield image
    except InputError as error:
        raise InputError(f"{where}: image {shown(reference)} {error}") from None
    except ImportError:
        raise InputError(f"{where}: {needs_pillow()}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise InputError(
            f"{where}: image {shown(reference)} is damaged ({first_line(error)}); replace it, or remove the row"
        ) from None


def _identified(file: BinaryIO) -> "Image.Image":
    """Return the image in a file, of which only the header is read."""
    from PIL import Image, UnidentifiedImageError

    head = file.read(1024)
    if not head:
        raise InputError("is empty; replace it, or remove the row")
    if head.startswith(LFS_POINTER):
        raise InputError("is a Git LFS pointer, not the image; run git lfs pull")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(file, formats=formats)
        except UnidentifiedImageError:
            found = (
                what
                for start, what in _OTHER_FORMATS.items()
                if re.match(start, head, re.DOTALL | re.IGNORECASE)
            )
            what = next(found, f"not an image, or a damaged one; give {READABLE}")
            raise InputError(f"is {what}") from None
        except Image.DecompressionBombError as error:
            pixels = re.search(r"(\d+) pixels", str(error))
            raise _too_large(int(pixels[1]) if pixels else MAX_PIXELS) from None


def _check_header(image: "Image.Image") -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"has no pixels ({width} x {height}); replace it, or remove the row")
    if width * height > MAX_PIXELS:
        raise _too_large(width * height, f"{width:,} x {height:,} = ")
    if image.mode not in _COLOR_MODES | _DEEP_MODES:
        raise InputError(f"has pixels of type {image.mode}; save it as PNG with 8 bits per channel")


def _too_large(pixels: int, size: str = "") -> InputError:
    return InputError(
        f"has {size}{pixels / 1e6:,.1f} million pixels, more than {MAX_PIXELS // 10**6} million; make it smaller"
    )


def _orientation(image: "Image.Image") -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return image.getexif().get(_ORIENTATION, 1)
        except Exception:  # EXIF data is often damaged, and Pillow raises many kinds
            return 1


def _as_rgb(image: "Image.Image") -> "Image.Image":
    """Return a new RGB image."""
    from PIL import Image

    if image.mode in _DEEP_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(
                f"has gray values from {values.min()} to {values.max()}; save it as PNG with 8 bits per channel"
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # gray multiplied by alpha, which Pillow does not convert to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --- hashes -------------------------------------------------------------------------------------------------


def image_digest(image: "Image.Image") -> str:
    """Return the SHA-256 of an image's size and pixels, as hex digits."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def reference_digest(reference: Any) -> str:
    """Return a hash of an image's content: of its file, wherever the bytes are, or of pixels that are in memory.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(reference, str):
        if not is_data_uri(reference):
            try:
                found = os.stat(reference)
                return _file_digest(reference, found.st_mtime_ns, found.st_size)
            except OSError as error:
                raise InputError(f"image {shown(reference)} cannot be read ({error.strerror})") from None
        reference = data_of_uri(reference)
    if isinstance(reference, bytes):
        return hashlib.sha256(reference).hexdigest()
    return image_digest(open_image(reference, "data"))


@functools.cache
def _file_digest(path: str, modified: int, size: int) -> str:
    """Return the hash of a file; the time and the size say when to read it again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
