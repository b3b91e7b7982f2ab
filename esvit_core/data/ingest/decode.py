"""Normalize image files for training: fully decodable, 8-bit RGB or grayscale, upright."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from esvit_core.config import DataConfig

# Pillow's formats that are accepted. Some of the others run programs (EPS) or fetch files that they name.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_LOSSY = frozenset({"JPEG", "MPO", "WEBP", "JPEG2000", "AVIF"})
_JPEG_QUALITY = 95
_ORIENTATION = 0x0112  # EXIF tag; 1: upright
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SHOWN = 5  # bad files named in an error message
_open_lock = threading.Lock()


class BadImage(Exception):  # noqa: N818 (describes one file, not a failure of the program)
    """A file is not a usable image; the message gives the reason in a few words."""


def describe_bad_files(bad: Iterable[tuple[str, str]]) -> str:
    """Describe bad files in a message: names and reasons of the first ones, and the number of the others."""
    named = sorted(bad)
    shown = ", ".join(f"{name[-80:]} ({reason})" for name, reason in named[:_SHOWN])
    return shown + (f" and {len(named) - _SHOWN:,} more" if len(named) > _SHOWN else "")


def reason_category(reason: str) -> str:
    """Return a reason without its details, for counting."""
    return reason.partition(" (")[0].partition(" of ")[0]


@dataclass(frozen=True)
class StoredImage:
    """An encoded image for storage.

    Attributes:
        data: the encoded image.
        suffix: ``jpg`` or ``png``.
        reencoded: whether the bytes differ from the file's.
    """

    data: bytes
    suffix: str
    reencoded: bool


def to_stored_image(
    data: bytes, max_megapixels: float, short_side: int | None, max_aspect_ratio: float = DataConfig().max_aspect_ratio
) -> StoredImage:
    """Check a file by decoding it, and convert it to the form that is stored.

    JPEG and PNG files that are 8-bit, RGB or grayscale, opaque, upright and not too large keep their bytes. Other images are
    converted: transparency is composited onto white, 16 bits are reduced to 8, and the first of several frames is used.
    Images from lossy formats are stored as JPEG (quality 95, no chroma subsampling), all others as PNG.

    Args:
        data: content of the file.
        max_megapixels: larger images are rejected before any pixel is decoded.
        short_side: images whose shorter side is longer are shrunk to it, in pixels; None: images are not shrunk.
        max_aspect_ratio: images whose longer side is more than so many times the shorter one are rejected.

    Raises:
        BadImage: the file is empty, not an image, too large, too long, truncated, or damaged in any way.
    """
    if not data:
        raise BadImage("empty file")
    with _opened(data) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise BadImage("no pixels")
        if width * height > max_megapixels * 1e6:
            size = f"{_megapixels(width * height)} megapixels"
            raise BadImage(f"too large ({size}, more than max_megapixels {max_megapixels:g})")
        if max(width, height) > max_aspect_ratio * min(width, height):
            raise BadImage(f"too long ({width:,} x {height:,} pixels, more than max_aspect_ratio {max_aspect_ratio:g})")
        fits = short_side is None or min(width, height) <= short_side
        if fits and _is_plain(image, data) and _decodes(image, data):
            return StoredImage(data, "jpg" if image.format == "JPEG" else "png", False)
    with _opened(data) as image:  # decoding has consumed the first one
        return _reencode(image, short_side)


def plain_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB or grayscale: transparency onto white, deeper values scaled down.

    Args:
        image: an image in any of Pillow's modes.
    """
    if image.mode in ("RGB", "L"):
        if "transparency" not in image.info:
            return image
        image = image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image)))
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image and read its header; any exception of a decoder, in the context too, becomes BadImage."""
    try:
        with _open(data) as image:
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("too large (a decompression bomb)") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # a malformed file makes decoders raise nearly anything; it must not stop a run
        reason = str(error) or type(error).__name__
        raise BadImage(f"{'truncated' if 'truncated' in reason.lower() else 'damaged'} ({reason[:100]})") from None


def _open(data: bytes) -> Image.Image:
    # Pillow's limit on pixels is global; the user's limit is applied once the size is known.
    with _open_lock:
        Image.init()
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.format not in ("JPEG", "PNG") or image.mode not in ("RGB", "L"):
        return False
    if _orientation(image) in _TRANSPOSITIONS:
        return False
    if image.format == "JPEG":
        return True
    bit_depth = data[24]  # Pillow reports 16-bit RGB as 8-bit
    return bit_depth == 8 and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none. Nothing else of a damaged EXIF block matters."""
    if image.format == "PNG":
        image.load()  # the block may follow the pixels; here, damaged pixels raise
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises nearly anything on a damaged block
        return 1
    return value if isinstance(value, int) else 1


def _decodes(image: Image.Image, data: bytes) -> bool:
    """Return whether the decoder used in training reads these bytes to the end without an error."""
    if image.format == "JPEG":
        try:
            simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError:
            return False
        return True
    image.load()
    return True


def _reencode(image: Image.Image, short_side: int | None) -> StoredImage:
    lossy = image.format in _LOSSY
    if short_side is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
        # Decode at 1/2, 1/4 or 1/8 of the size if that is still at least twice the wanted size.
        image.draft(None, (2 * short_side, 2 * short_side))
    image.load()
    turn = _TRANSPOSITIONS.get(_orientation(image))
    plain = plain_rgb(image if turn is None else image.transpose(turn))
    if short_side is not None and min(plain.size) > short_side:
        scale = short_side / min(plain.size)
        width, height = (max(1, round(side * scale)) for side in plain.size)
        plain = plain.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if lossy:
        plain.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return StoredImage(file.getvalue(), "jpg", True)
    plain.info.clear()  # color profiles and comments
    plain.save(file, "PNG")
    return StoredImage(file.getvalue(), "png", True)


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Convert gray values of 16 or 32 bits to 8 bits.

    16-bit integers lose their low byte, whatever range an image uses, so that brightness stays comparable between images.
    Floating-point and 32-bit values have no agreed range: 0..1 and 0..255 are used as such, other ranges are stretched.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    is_float = values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64))
    low, high = float(values.min()), float(values.max())
    if is_float and low >= 0 and high <= 1:
        scaled = values * 255
    elif low >= 0 and high <= 255:
        scaled = values
    elif low >= 0 and high <= 65535:
        scaled = values / 256
    else:
        scaled = (values - low) * (255 / max(high - low, 1e-12))
    return scaled.astype(np.uint8)


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:,.0f}" if pixels >= 1e7 else f"{pixels / 1e6:.3g}"
