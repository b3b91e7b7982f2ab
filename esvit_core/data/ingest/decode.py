"""From a file's bytes to an image that training can rely on: 8 bit, RGB or grey, upright, whole."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

# What of Pillow's formats is read. Some of the others run programs (EPS) or fetch what they name.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_LOSSY = frozenset({"JPEG", "MPO", "WEBP", "JPEG2000", "AVIF"})
_JPEG_QUALITY = 95
_ORIENTATION = 0x0112  # of EXIF; 1: upright
_UPRIGHT = (None, 0, 1)
# Pillow raises anything on malformed files.
_MALFORMED = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError)
_SHOWN = 5  # bad files named in an error
_open_lock = threading.Lock()


class BadImage(Exception):  # noqa: N818 (of one file, and no error of ours)
    """Why a file is not a usable image, in a few words."""


def listed(bad: Iterable[tuple[str, str]]) -> str:
    """Names and reasons of bad files for a message: the first by name, and how many more there are."""
    named = sorted(bad)
    shown = ", ".join(f"{name[-80:]} ({reason})" for name, reason in named[:_SHOWN])
    return shown + (f" and {len(named) - _SHOWN:,} more" if len(named) > _SHOWN else "")


def kind_of(reason: str) -> str:
    """A reason without what is particular to the file, to be counted."""
    return reason.partition(" (")[0].partition(" of ")[0]


@dataclass(frozen=True)
class StoredImage:
    """An image as it is stored.

    Attributes:
        data: encoded.
        suffix: ``jpg`` or ``png``.
        reencoded: whether these are other bytes than the file's.
    """

    data: bytes
    suffix: str
    reencoded: bool


def to_stored(data: bytes, max_megapixels: float, short_side: int | None) -> StoredImage:
    """Check a file by decoding it, and bring it into the form that is stored.

    A JPEG or PNG that is plain already (8 bit, RGB or grey, opaque, upright, not too large) keeps its bytes. Others
    are made so: alpha is laid over white, 16 bit become 8, and of several frames the first is taken. What came from a
    lossy format is stored as JPEG (quality 95, colour at full resolution), all else as PNG.

    Args:
        data: of the file.
        max_megapixels: more pixels than this are refused before any is decoded.
        short_side: images whose shorter side is longer are shrunk to it, pixels; None: none is.

    Raises:
        BadImage: it is empty, no image, too large, truncated, or damaged.
    """
    if not data:
        raise BadImage("empty file")
    with _opened(data) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise BadImage("no pixels")
        if width * height > max_megapixels * 1e6:
            raise BadImage(f"too large ({_megapixels(width * height)} megapixels)")
        fits = short_side is None or min(width, height) <= short_side
        if fits and _is_plain(image, data) and _decodes(image, data):
            return StoredImage(data, "jpg" if image.format == "JPEG" else "png", False)
    with _opened(data) as image:  # decoding has used up the first one
        return _reencode(image, short_side)


def plain_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB or grey, 8 bit: alpha over white, deep ones scaled down.

    Args:
        image: of any of Pillow's modes.
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
    """The image with its header read; what Pillow raises on malformed files while it is open is a BadImage."""
    try:
        with _open(data) as image:
            yield image
    except Image.DecompressionBombError:
        raise BadImage("too large (a decompression bomb)") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except _MALFORMED as error:
        reason = str(error) or type(error).__name__
        raise BadImage(f"{'truncated' if 'truncated' in reason.lower() else 'damaged'} ({reason[:100]})") from None


def _open(data: bytes) -> Image.Image:
    # Pillow's own limit on pixels is a global: ours, which the user chooses, is applied once the size is known.
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
    if image.getexif().get(_ORIENTATION) not in _UPRIGHT:
        return False
    if image.format == "JPEG":
        return True
    bit_depth = data[24]  # Pillow shows 16 bit RGB as 8
    return bit_depth == 8 and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1


def _decodes(image: Image.Image, data: bytes) -> bool:
    """Whether the decoder that training uses reads these bytes to the end without complaint."""
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
        # Decode at a half, quarter or eighth where that is still twice as large as what is wanted.
        image.draft(None, (2 * short_side, 2 * short_side))
    image.load()
    upright = ImageOps.exif_transpose(image)
    plain = plain_rgb(upright)
    if short_side is not None and min(plain.size) > short_side:
        scale = short_side / min(plain.size)
        width, height = (max(1, round(side * scale)) for side in plain.size)
        plain = plain.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if lossy:
        plain.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return StoredImage(file.getvalue(), "jpg", True)
    plain.info.clear()  # colour profiles and comments
    plain.save(file, "PNG")
    return StoredImage(file.getvalue(), "png", True)


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bit as 8 bit.

    16 bit integers lose their low byte, whatever range an image uses, so that brightness stays comparable between
    images. Floating point and 32 bit values have no agreed range: 0..1 and 0..255 are taken as such, others are
    stretched.
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
    return f"{pixels / 1e6:,.0f}"
