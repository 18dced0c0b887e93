"""References of rows to images: the path of a file, the bytes of one, a data URI, or an image of Pillow."""

import base64
import binascii
import io
import os
import re
import stat
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command

if TYPE_CHECKING:
    from PIL import Image

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_LONGEST_NAME = 200  # characters of a reference in messages


def locate(reference: Any, directory: Path | None, where: str) -> Any:
    """Return a reference with an absolute path, if it is one of a file.

    Args:
        reference: as a row has it.
        directory: where relative paths start; None if there is no such place.
        where: file:line, which messages begin with.

    Raises:
        InputError: it is a URL, or a relative path without a file.
    """
    if not isinstance(reference, str) or is_data_uri(reference):
        return reference
    try:
        path = _local_path(reference)
        if os.path.isabs(path):
            return path
        if directory is None:
            raise InputError(
                "is a relative path, and a data set of the Hub is no directory; download the data set, "
                "or use one with an Image column"
            )
        found = os.path.join(directory.absolute(), path)
        if not os.path.lexists(found):
            raise InputError(f"does not exist; relative paths start at {directory}")
        return found
    except InputError as error:
        raise InputError(f"{where}: image {shown(reference)} {error}") from None


def shown(reference: Any) -> str:
    """Return how messages name an image."""
    if isinstance(reference, str):
        text = reference if len(reference) <= _LONGEST_NAME else f"{reference[:40]}..."
        return text if text.isprintable() else ascii(text)
    if isinstance(reference, bytes):
        return f"of {len(reference):,} bytes"
    width, height = reference.size
    return f"in memory ({width} x {height})"


def array_image(array: np.ndarray) -> "Image.Image":
    """Return an array [H, W, 3], [H, W, 4], [H, W, 1] or [H, W] of uint8 as an image of Pillow.

    Raises:
        InputError: the array has another shape or type, or Pillow is missing.
    """
    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8 or flat.ndim not in (2, 3) or (flat.ndim == 3 and flat.shape[2] not in (3, 4)):
        raise InputError(
            f"an image is an array {list(array.shape)} of {array.dtype}; give [height, width, 3] of uint8 (0 to 255)"
        )
    if not array.size:
        raise InputError(f"an image is an array {list(array.shape)}, without pixels; remove the row")
    try:
        from PIL import Image
    except ImportError:
        raise InputError(needs_pillow()) from None
    return Image.fromarray(np.ascontiguousarray(flat)).copy()  # the caller may change the array later


def needs_pillow() -> str:
    """Return what to do if Pillow is missing."""
    return f"reading images needs Pillow; {install_command('vlm')}"


def is_data_uri(reference: str) -> bool:
    """Return whether a reference is a data URI."""
    return reference[:5].lower() == "data:"


def _local_path(reference: str) -> str:
    """Return the path in a reference, which may be a file: URL."""
    scheme = _SCHEME.match(reference)
    if scheme is None:
        return os.path.expanduser(reference)
    if scheme[1].lower() == "file":
        return url2pathname(urlsplit(reference).path)
    raise InputError("is on the network, and only local files are read; download it, and give its path")


def data_of_uri(uri: str) -> bytes:
    """Return the bytes in a data URI.

    Raises:
        InputError: they are not valid base64; the message goes on after the name of the image.
    """
    header, comma, data = uri.partition(",")
    try:
        encoded = unquote_to_bytes(data)
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError
        return base64.b64decode(b"".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(
            "is not valid base64; write data:image/png;base64, and then the file in base64"
        ) from None


def open_bytes(reference: Any) -> AbstractContextManager[BinaryIO | None]:
    """Open the bytes of an image, or nothing if it is decoded already.

    Raises:
        InputError: there are no such bytes; the message goes on after the name of the image.
    """
    if isinstance(reference, bytes):
        return io.BytesIO(reference)
    if not isinstance(reference, str):
        return nullcontext()
    if is_data_uri(reference):
        return io.BytesIO(data_of_uri(reference))
    path = _local_path(reference)
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise InputError("is a directory; give an image file")
        if not stat.S_ISREG(kind):  # reading a pipe would wait forever
            raise InputError("is not a regular file; give an image file")
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError("does not exist; correct the path") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}); correct the path or its permissions") from None
    except InputError:
        raise
    except ValueError:  # half a surrogate pair, or a null character
        raise InputError("is not a valid path; correct it") from None
