"""Decoding of every type of file that a folder of images may contain, good and bad."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from esvit_core.data.ingest.decode import BadImage, plain_rgb, to_stored_image
from esvit_core.data.shards.reader import decode_image


def stored(data: bytes, short_side: int | None = None) -> tuple[np.ndarray, bool]:
    """Return the image for training, and whether it was encoded again."""
    found = to_stored_image(data, 1.0, short_side, 100.0)
    with Image.open(io.BytesIO(found.data)) as image:
        assert image.format == {"jpg": "JPEG", "png": "PNG"}[found.suffix]
        assert image.mode in ("RGB", "L")
        assert image.getexif().get(0x0112) not in range(2, 9)  # upright
    return decode_image(found.data), found.reencoded


def reason(data: bytes, megapixels: float = 1.0) -> str:
    with pytest.raises(BadImage) as error:
        to_stored_image(data, megapixels, None, 100.0)
    return str(error.value)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header declares many pixels that it does not contain."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images_keep_their_bytes(make, form, mode):
    data = make.file(Image.fromarray(make.pixels()).convert(mode), form)
    found = to_stored_image(data, 1.0, None, 100.0)
    assert found.data == data and not found.reencoded
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_other_formats_become_png_or_jpeg(make, form):
    options = {"lossless": True} if form == "WEBP" else {}
    image, reencoded = stored(make.file(0, form, **options))
    assert reencoded and image.shape == (20, 24, 3)
    assert np.abs(image.astype(int) - make.pixels()).mean() < 12  # GIF has 256 colours


@pytest.mark.parametrize(
    "mode", ["1", "P", "CMYK", "YCbCr", "I", "F", "LA", "RGBA", "PA", "I;16", "La", "RGBa", "HSV", "LAB"]
)
def test_every_mode_becomes_rgb_or_grayscale(make, mode):
    rgb = Image.fromarray(make.pixels())
    steps = {"PA": ("P", "PA"), "I;16": ("I", "I;16"), "La": ("LA", "La"), "RGBa": ("RGBA", "RGBa")}
    image = rgb
    if mode == "LAB":
        image = Image.merge("LAB", rgb.split())
    else:
        for step in steps.get(mode, (mode,)):
            image = image.convert(step)
    plain = plain_rgb(image)
    assert plain.mode in ("RGB", "L") and plain.size == rgb.size
    if mode in ("P", "CMYK", "YCbCr", "RGBA", "RGBa", "HSV"):
        assert np.abs(np.asarray(plain.convert("RGB")).astype(int) - make.pixels()).mean() < 16  # a palette of 216


def test_transparency_is_composited_onto_white(make):
    rgba = np.dstack([make.pixels(), np.full((20, 24), 255, np.uint8)])
    rgba[:5, :, 3], rgba[5:10, :, 3] = 0, 128
    image, _ = stored(make.file(rgba))
    assert (image[:5] == 255).all() and np.array_equal(image[10:], make.pixels()[10:])
    half = make.pixels()[5:10] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(image[5:10] - half).max() <= 1


def test_transparent_colors_of_palettes_and_rgb_become_white(make):
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (stored(make.file(palette, transparency=0))[0] == 255).all()
    black = np.zeros((4, 4, 3), np.uint8)
    assert (stored(make.file(black, transparency=(0, 0, 0)))[0] == 255).all()
    assert (stored(make.file(black))[0] == 0).all()


def test_sixteen_bits_lose_their_low_byte(make):
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 77
    for form in ("PNG", "TIFF"):
        image, reencoded = stored(make.file(deep, form))
        assert reencoded and np.array_equal(image[..., 0].ravel(), np.arange(256))


def test_sixteen_bit_color_is_stored_as_eight_bit():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    line = b"\x00" + struct.pack(">6H", 0x1234, 0x8000, 0xFFFF, 0, 0x00FF, 0x0100)  # Pillow cannot write these
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    found = to_stored_image(data, 1.0, None, 100.0)
    assert found.reencoded and found.data[24] == 8
    assert decode_image(found.data).tolist() == [[[0x12, 0x80, 0xFF], [0, 0, 1]]]


def test_floating_point_between_0_and_1_fills_the_range(make):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    image, _ = stored(make.file(Image.fromarray(values), "TIFF"))
    assert image.min() == 0 and image.max() >= 254 and abs(image.mean() / 255 - 0.5) < 0.01


def test_cmyk_photographs_look_right(make):
    image, reencoded = stored(make.file(Image.fromarray(make.pixels()).convert("CMYK"), "JPEG", quality=95))
    assert reencoded and np.abs(image.astype(int) - make.pixels()).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_upright(make, orientation, form):
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :24], corners[:16, 24:], corners[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, reencoded = stored(make.file(corners, form, exif=exif))
    assert reencoded == (orientation != 1 or form == "WEBP")
    undo = [None, None, 0, 3, 1, 5, 4, 6, 2][orientation]  # Pillow's transpositions
    expected = Image.fromarray(corners) if undo is None else Image.fromarray(corners).transpose(undo)
    assert image.shape == np.asarray(expected).shape
    assert np.abs(image.astype(int) - np.asarray(expected))[4:-4, 4:-4].mean() < 40 and image[4, 4].argmax() == (
        np.asarray(expected)[4, 4].argmax()
    )


@pytest.mark.parametrize(("width", "height", "size"), [(80, 60, (40, 30)), (60, 90, (30, 45)), (20, 20, (20, 20))])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_large_images_are_shrunk_to_the_short_side(make, width, height, size, form):
    image, reencoded = stored(make.file(make.pixels(0, width, height), form), short_side=30)
    assert image.shape[1::-1] == size and reencoded == (width > 30)


def test_the_first_of_several_frames_is_used(make):
    frames = [Image.fromarray(make.pixels(i)) for i in range(3)]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        image, reencoded = stored(make.file(frames[0], form, save_all=True, append_images=frames[1:]))
        assert reencoded and np.abs(image.astype(int) - make.pixels(0)).mean() < 12, form


def test_a_file_that_is_not_an_image_is_bad(make):
    assert reason(b"") == "empty file"
    assert reason(b"just text") == "not an image"
    assert reason(b"\x89PNG\r\n\x1a\n") in ("not an image", "truncated (image file is truncated)")
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "not an image"  # would start a program
    assert reason(b"\x00" * 1000) == "not an image"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_bad_wherever_they_end(make, form):
    data = make.file(make.pixels(0, 64, 64), form)
    for share in (0.3, 0.6, 0.9):
        message = reason(data[: int(len(data) * share)])
        assert message.startswith(("truncated", "damaged", "not an image")) and len(message) < 130


def test_damaged_files_are_bad(make):
    data = bytearray(make.file(make.pixels(0, 64, 64)))
    data[len(data) // 2] ^= 0xFF
    assert reason(bytes(data)).startswith(("damaged", "truncated"))


def test_decompression_bombs_are_refused_by_their_header(make):
    assert reason(bomb(40_000, 30_000), 100) == "too large (1,200 megapixels, more than max_megapixels 100)"
    assert reason(bomb(1200, 1000), 1.0) == "too large (1.2 megapixels, more than max_megapixels 1)"
    assert not to_stored_image(make.file(make.pixels(0, 1000, 1000)), 1.0, None, 100.0).reencoded
    # Above Pillow's own limit (179 megapixels), if the user allows it, the pixels are decoded; here there are none.
    assert reason(bomb(20_000, 10_000), 300).startswith(("truncated", "damaged"))


def test_pillow_s_own_limit_is_left_as_it_was(make):
    before = Image.MAX_IMAGE_PIXELS
    to_stored_image(make.file(0), 1.0, None, 100.0)
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_same_file_gives_the_same_bytes(make):
    data = make.file(make.pixels(0, 80, 60), "JPEG")
    assert to_stored_image(data, 1.0, 30, 100.0).data == to_stored_image(data, 1.0, 30, 100.0).data


def exif_block(entries: bytes, count: int) -> bytes:
    """Return an EXIF block, little-endian, with one directory of the given entries."""
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", count) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_only_the_orientation_is_taken_from_a_damaged_exif_block(make, form):
    """A tag of a wrong type made Pillow raise struct.error when it wrote the block again."""
    orientation = struct.pack("<HHII", 0x0112, 3, 1, 6)
    mistyped = struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")  # XResolution as text
    data = make.file(make.pixels(1, 30, 20), form, exif=exif_block(orientation + mistyped, 2))
    image, reencoded = stored(data)
    assert reencoded and image.shape == (30, 20, 3)
    nonsense = exif_block(struct.pack("<HHI4s", 0x0112, 2, 4, b"abc\0"), 1)
    assert stored(make.file(make.pixels(1, 30, 20), form, exif=nonsense))[0].shape == (20, 30, 3)
    assert stored(make.file(make.pixels(1, 30, 20), form, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))[0].shape == (
        20,
        30,
        3,
    )


@pytest.mark.parametrize(
    "error", [struct.error("bad"), RuntimeError("decoder failed"), AssertionError(), MemoryError()]
)
def test_any_exception_of_a_decoder_is_that_images(make, monkeypatch, error):
    def fail(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert reason(make.file(0)).startswith("damaged (")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "JPEG2000"])
def test_no_damage_of_a_file_raises_anything_but_bad_image(make, form):
    data = make.file(make.pixels(0, 40, 40), form)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 4):
            damaged[position] = rng.integers(0, 256)
        with contextlib.suppress(BadImage):
            to_stored_image(bytes(damaged), 1.0, None, 100.0)


def test_very_long_images_are_refused(make):
    assert reason(make.file(np.zeros((1, 20000, 3), np.uint8))) == (
        "too long (20,000 x 1 pixels, more than max_aspect_ratio 100)"
    )
    assert to_stored_image(make.file(np.zeros((1, 300, 3), np.uint8)), 1.0, None, 300).suffix == "png"
