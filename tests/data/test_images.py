"""Images become the upright RGB picture that NumPy computes, and bad ones one line each that names file and line."""

import base64
import hashlib
import io
import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.data import image_checks
from nalora_mlx.data.checks import read_rows
from nalora_mlx.data.images import check_image, image_digest, open_image, reference_digest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image, PngImagePlugin, features

NOISE = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
WAVES = np.stack(
    [np.add.outer(np.arange(48) * a, np.arange(32) * b) for a, b in ((1, 2), (3, 1), (2, 2))], -1
)
SMOOTH = np.clip(WAVES, 0, 255).astype(np.uint8)  # lossy formats keep it
DEEP = np.array([[0, 1, 257, 32768], [65535, 65278, 40000, 129]], np.uint16)
UPRIGHT = {  # what a viewer shows of pixels that are stored with each EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "JPEG2000": {}, "WEBP": {"lossless": True}}


def encoded(image, form="PNG", **settings):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **settings)
    return buffer.getvalue()


def pixels(reference):
    image = open_image(reference, "x:1")
    assert (image.mode, image.info) == ("RGB", {})
    return np.asarray(image).astype(int)


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(width, height, data=b""):
    """Return a PNG whose header states a size, whatever its data is."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def on_white(colors, alpha):
    alpha = alpha[..., None] / 255
    return colors * alpha + 255 * (1 - alpha)


# --- good images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats(form):
    np.testing.assert_array_equal(pixels(encoded(NOISE, form, **LOSSLESS[form])), NOISE)


@pytest.mark.parametrize(("form", "tolerance"), [("JPEG", 8), ("WEBP", 12), ("AVIF", 12)])
def test_lossy_formats(form, tolerance):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    found = pixels(encoded(SMOOTH, form, quality=95))
    assert np.abs(found - SMOOTH).max() <= tolerance


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_rotated_images_are_upright(form, orientation):
    settings = {"quality": 95} if form == "JPEG" else LOSSLESS[form]
    image = open_image(encoded(SMOOTH, form, exif=oriented(orientation), **settings), "x:1")
    truth = UPRIGHT[orientation](SMOOTH).astype(int)
    assert np.asarray(image).shape == truth.shape
    assert np.abs(np.asarray(image).astype(int) - truth).max() <= (8 if form == "JPEG" else 0)
    assert not image.getexif()  # or it would be rotated twice
    assert "exif" not in image.info


def test_damaged_exif_data_is_ignored(recwarn):
    broken = PngImagePlugin.PngInfo()
    broken.add_text("Raw profile type exif", "\nexif\n3\nno digits")  # Pillow raises ValueError
    np.testing.assert_array_equal(pixels(encoded(NOISE, pnginfo=broken)), NOISE)
    cut = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"  # Pillow warns
    assert np.abs(pixels(encoded(SMOOTH, "JPEG", quality=95, exif=cut, dpi=(72, 72))) - SMOOTH).max() <= 8
    assert not recwarn.list


def test_gray_images():
    gray = NOISE[..., 0]
    np.testing.assert_array_equal(pixels(encoded(gray)), np.repeat(gray[..., None], 3, 2))
    bits = gray > 127
    np.testing.assert_array_equal(pixels(encoded(bits)), np.repeat(bits[..., None], 3, 2) * 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_gray_values_of_16_bits_are_scaled(form):
    truth = np.repeat(np.round(DEEP / 65535 * 255)[..., None], 3, 2)
    np.testing.assert_array_equal(pixels(encoded(DEEP, form)), truth)


def test_palettes():
    palette = Image.fromarray(NOISE).quantize(8)
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(pixels(encoded(palette)), colors[np.asarray(palette)])
    np.testing.assert_array_equal(pixels(encoded(palette, "GIF")), colors[np.asarray(palette)])


def test_transparency_is_put_on_white():
    alpha = NOISE[..., 1]
    rgba = np.dstack([NOISE, alpha])
    for form in ("PNG", "WEBP", "TIFF"):
        settings = {"lossless": True, "exact": True} if form == "WEBP" else {}
        found = pixels(encoded(rgba, form, **settings))
        assert np.abs(found - on_white(NOISE, alpha)).max() <= 1, form
    gray = Image.merge("LA", [Image.fromarray(NOISE[..., 0]), Image.fromarray(alpha)])
    truth = on_white(np.repeat(NOISE[..., :1], 3, 2), alpha)
    assert np.abs(pixels(encoded(gray)) - truth).max() <= 1
    for image in (gray, Image.fromarray(rgba)):  # with colors that are multiplied by alpha
        truth = on_white(np.asarray(image.convert("RGB")), alpha)
        assert np.abs(pixels(image.convert({"LA": "La", "RGBA": "RGBa"}[image.mode])) - truth).max() <= 2
    invisible = np.dstack([NOISE, np.zeros_like(alpha)])
    np.testing.assert_array_equal(pixels(encoded(invisible)), np.full_like(NOISE, 255))


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_transparent_colors_of_a_palette_are_white(form):
    palette = Image.fromarray(NOISE).quantize(8)
    indices = np.asarray(palette)
    truth = np.array(palette.getpalette()).reshape(-1, 3)[indices]
    truth[indices == indices[0, 0]] = 255
    found = pixels(encoded(palette, form, transparency=int(indices[0, 0])))
    np.testing.assert_array_equal(found, truth)


def test_a_transparent_color_of_rgb_is_white():
    truth = NOISE.copy()
    truth[0, 0] = 255
    found = pixels(encoded(NOISE, transparency=tuple(int(value) for value in NOISE[0, 0])))
    np.testing.assert_array_equal(found, truth)


def test_cmyk():
    inks = np.dstack([SMOOTH, SMOOTH[..., 0] // 2]).astype(np.uint8)
    image = Image.frombytes("CMYK", inks.shape[1::-1], inks.tobytes())
    share = 1 - inks / 255
    truth = 255 * share[..., :3] * share[..., 3:]
    assert np.abs(pixels(encoded(image, "TIFF")) - truth).max() <= 1
    assert np.abs(pixels(encoded(image, "JPEG", quality=95)) - truth).max() <= 12


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_used(form):
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **LOSSLESS.get(form, {}))
    assert check_image(data, "x:1")
    np.testing.assert_array_equal(pixels(data), np.full((3, 4, 3), [255, 0, 0]))
    assert not check_image(encoded(frames[0], form), "x:1")


def test_photos_with_a_preview_have_one_frame():
    photo, preview = Image.fromarray(SMOOTH), Image.new("RGB", (8, 8))
    data = encoded(photo, "MPO", save_all=True, append_images=[preview], quality=95)
    assert not check_image(data, "x:1")
    assert np.abs(pixels(data) - SMOOTH).max() <= 8


def test_all_references_of_an_image_are_the_same_picture(tmp_path):
    data, path = encoded(NOISE), tmp_path / "a b.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    uris = [f"data:image/png;base64,{text}", f"DATA:;base64,{text[:9]}\n{text[9:]}", path.as_uri()]
    for reference in (str(path), data, Image.open(path), Image.fromarray(NOISE), *uris):
        assert not check_image(reference, "x:1")
        np.testing.assert_array_equal(pixels(reference), NOISE)


def test_the_given_image_is_not_changed():
    given = Image.fromarray(NOISE)
    opened = open_image(given, "x:1")
    opened.paste((0, 0, 0), (0, 0, 5, 7))
    np.testing.assert_array_equal(np.asarray(given), NOISE)


# --- bad images ---------------------------------------------------------------------------------------------

PHOTO = encoded(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
REPLACE = "; replace it, or remove the row"
BAD_FILES = {  # content, and what is said after the path
    "empty.png": (b"", f"is empty{REPLACE}"),
    "text.jpg": (
        b"not a picture\n" * 40,
        "is not an image, or a damaged one; give PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF",
    ),
    "header.png": (encoded(NOISE)[:20], f"is damaged (Truncated File Read){REPLACE}"),
    "huge.png": (png(12000, 9000), "has 12,000 x 9,000 = 108.0 million pixels, more than 100 million; make it smaller"),
    "bomb.png": (png(30000, 30000), "has 900.0 million pixels, more than 100 million; make it smaller"),
    "drawing.svg": (b'<?xml version="1.0"?>\n<svg/>', "is SVG, which is not read; save it as PNG"),
    "error.png": (b"<!DOCTYPE html><html><svg>404", "is a web page; download the image itself"),
    "phone.heic": (
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "is HEIC, which is not read; save it as PNG or JPEG (on a Mac: sips -s format jpeg FILE --out FILE.jpg)",
    ),
    "clip.mp4": (b"\0\0\0\x18ftypisom\0\0\2\0", "is a video, which is not read; save a frame of it as PNG or JPEG"),
    "print.eps": (encoded(SMOOTH, "EPS"), "is PDF or PostScript, which is not read; save it as PNG or JPEG"),
    "pointer.png": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a Git LFS pointer, not the image; run git lfs pull",
    ),
    "float.tiff": (
        encoded(Image.new("F", (4, 3)), "TIFF"),
        "has pixels of type F; save it as PNG with 8 bits per channel",
    ),
}  # fmt: skip


def rows_with(directory, *images):
    """Write a row for each image; return the problems of reading them."""
    rows = [{"prompt": "What is it?", "completion": "A bird.", "image": image} for image in images]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(RunConfig(data=str(directory), valid_fraction=0.0), ("train",))


def test_each_bad_image_is_one_line_that_names_the_row(tmp_path):
    for name, (content, _) in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.png").write_bytes(encoded(NOISE))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    expected = {name: (tmp_path / name, what) for name, (_, what) in BAD_FILES.items()} | {
        "folder.png": (tmp_path / "folder.png", "is a directory; give an image file"),
        "pipe.png": (tmp_path / "pipe.png", "is not a regular file; give an image file"),
        "missing.png": ("missing.png", f"does not exist; relative paths start at {tmp_path}"),
        "/no/such.png": ("/no/such.png", "does not exist; correct the path"),
        "a\0b.png": ("'a\\x00b.png'", f"does not exist; relative paths start at {tmp_path}"),
        "https://x.org/a.png": (
            "https://x.org/a.png",
            "is on the network, and only local files are read; download it, and give its path",
        ),
        "data:image/png;base64,@@@": (
            "data:image/png;base64,@@@",
            "is not valid base64; write data:image/png;base64, and then the file in base64",
        ),
        "x" * 999: ("x" * 40 + "...", f"does not exist; relative paths start at {tmp_path}"),
    }
    found = rows_with(tmp_path, "good.png", *expected)
    lines = [
        f"{tmp_path}/train.jsonl:{n}: image {name} {what}"
        for n, (name, what) in enumerate(expected.values(), 2)
    ]
    assert found.problems == lines
    assert [row.source for row in found.sources[0]["train"]] == [f"{tmp_path}/train.jsonl:1"]


@pytest.mark.parametrize(
    "data",
    [PHOTO[:-500], encoded(NOISE)[:-40], encoded(NOISE, "TIFF")[:-20], encoded(SMOOTH, "WEBP")[:-30], png(90, 90)],
    ids=["JPEG", "PNG", "TIFF", "WebP", "no data"],
)  # fmt: skip
def test_truncated_images_are_one_line(tmp_path, data):
    (tmp_path / "cut.png").write_bytes(data)
    with pytest.raises(InputError) as raised:
        open_image(str(tmp_path / "cut.png"), "rows.jsonl:3")
    line = str(raised.value)
    assert line.startswith(f"rows.jsonl:3: image {tmp_path}/cut.png is damaged (")
    assert line.endswith(REPLACE)
    assert "\n" not in line


def test_any_damage_is_an_image_or_one_line():
    random = np.random.default_rng(0)
    files = [
        encoded(SMOOTH, form, **LOSSLESS.get(form, {}))
        for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
    ]
    for data in files:
        for _ in range(100):
            damaged = bytearray(data[: random.integers(1, len(data) + 1)])
            for place in random.integers(0, min(len(damaged), 400), 3):
                damaged[place] = random.integers(0, 256)
            for read in (check_image, open_image):
                try:
                    read(bytes(damaged), "x:1")
                except InputError as error:
                    assert str(error).startswith("x:1: image of ")  # noqa: PT017
                    assert "\n" not in str(error)  # noqa: PT017


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(NOISE))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(
        InputError, match=r"^x:1: image .*/a.png cannot be read \(Permission denied\); correct"
    ):
        check_image(str(tmp_path / "a.png"), "x:1")


def test_gray_values_of_more_bits_are_refused():
    deep = Image.fromarray(np.array([[0, 70000]], np.int32))
    with pytest.raises(InputError, match="has gray values from 0 to 70000; save it as PNG"):
        open_image(deep, "x:1")


def test_closed_images_are_refused():
    image = Image.open(io.BytesIO(encoded(NOISE)))
    image.close()
    with pytest.raises(InputError, match=r"^x:1: image in memory \(5 x 7\) is damaged \(.*\); replace it"):
        open_image(image, "x:1")


def test_images_without_pixels_are_refused():
    with pytest.raises(
        InputError, match=r"^x:1: image in memory \(0 x 3\) has no pixels \(0 x 3\); replace it"
    ):
        check_image(Image.new("RGB", (0, 3)), "x:1")


def test_without_pillow(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setattr(image_checks, "is_installed", lambda _: False)
    found = rows_with(tmp_path, "a.png", "b.png")  # a model that sees cannot be loaded either
    assert found.problems == [
        f"{tmp_path}/train.jsonl:2: image b.png does not exist; relative paths start at {tmp_path}"
    ]
    data = encoded(NOISE)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"^x:1: reading images needs Pillow; .*install .*\[vlm\]"):
        open_image(data, "x:1")


# --- notices and hashes -------------------------------------------------------------------------------------


def test_animated_images_are_announced(tmp_path):
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.gif")
    (notice,) = rows_with(tmp_path, "b.gif", "a.gif", "a.gif").notices
    assert notice == (
        f"train: 2 of 3 rows have images of several frames or pages ({tmp_path}/train.jsonl:2, :3); "
        "the first one is used"
    )
    assert isinstance(notice, Note)


def test_digests_are_of_size_and_pixels():
    image = Image.fromarray(NOISE)
    again = Image.fromarray(NOISE.copy())
    assert image_digest(image) == image_digest(again)
    assert len(image_digest(image)) == 64
    other = NOISE.copy()
    other[6, 4, 2] ^= 1
    others = [other, NOISE.reshape(5, 7, 3), NOISE[:-1]]
    assert len({image_digest(Image.fromarray(array)) for array in (NOISE, *others)}) == 4


def test_digests_of_references_are_of_the_content(tmp_path):
    data, path = encoded(NOISE), tmp_path / "a.png"
    path.write_bytes(data)
    digest = reference_digest(str(path))
    assert digest == hashlib.sha256(data).hexdigest()
    assert digest == reference_digest(data)
    assert digest == reference_digest("data:image/png;base64," + base64.b64encode(data).decode())
    assert digest == reference_digest(str(path.rename(tmp_path / "b.png")))
    os.utime(tmp_path / "b.png", (0, 0))
    assert digest == reference_digest(str(tmp_path / "b.png"))
    (tmp_path / "b.png").write_bytes(encoded(NOISE[::-1]))
    assert digest != reference_digest(str(tmp_path / "b.png"))
    decoded = Image.fromarray(NOISE)
    assert (
        reference_digest(decoded) == image_digest(decoded) != reference_digest(Image.fromarray(NOISE[::-1]))
    )
    with pytest.raises(InputError, match=r"/a.png cannot be read"):
        reference_digest(str(path))
