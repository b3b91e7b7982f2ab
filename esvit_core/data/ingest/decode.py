"""Normalize image files for training: fully decodable, 8-bit RGB or grayscale, upright."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from esvit_core.data.ingest.deep_pixels import is_deep, is_dicom, is_tiff, read_deep, read_dicom, read_raw, read_tiff
from esvit_core.data.ingest.image_facts import ImageFacts, facts_of
from esvit_core.data.ingest.optional_formats import RAW_SUFFIXES, register_formats
from esvit_core.data.ingest.pixels import (
    PixelError,
    Pixels,
    PixelSettings,
    Scale,
    choose_bands,
    kind_of,
    looks_empty,
    span,
    to_8_bit,
)

# Pillow's formats that are accepted. Some of the others run programs (EPS) or fetch files that they name.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_LOSSY = frozenset({"JPEG", "MPO", "WEBP", "JPEG2000", "AVIF", "HEIF", "JXL"})
_DTYPES = {"F": "f4", "I": "i4"}  # of Pillow's modes; 16 bits in all others that are deep
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
        odd: what a user should know about the image, in words: ``dark``, ``bright`` (nearly black or white), ``bands``,
            ``frames`` (others are left out), ``reduced`` (a package is missing that reads all of it).
        facts: its size, color and the like.
    """

    data: bytes
    suffix: str
    reencoded: bool
    odd: tuple[str, ...] = ()
    facts: ImageFacts | None = None


class DeepImage:
    """An image of more than 8 bits or with further bands.

    Attributes:
        pixels: as decoded.
        odd: see :class:`StoredImage`.
        format: name of the file's format.
    """

    def __init__(self, pixels: Pixels, odd: tuple[str, ...] = (), format: str = "") -> None:
        self.pixels, self.odd, self.format = pixels, odd, format

    @classmethod
    def of(cls, image: Image.Image, format: str) -> DeepImage:
        """Return an 8-bit image, whose bands can be chosen."""
        return cls(Pixels(np.asarray(image)), format=format)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return self.pixels.values.shape[1], self.pixels.values.shape[0]

    def plain(self, settings: PixelSettings) -> Image.Image:
        """Return the image in 8-bit RGB or grayscale.

        Raises:
            PixelError: it lacks a band of the settings.
        """
        chosen, left_out = choose_bands(self.pixels, settings.bands)
        if left_out and settings.bands is None:
            self.odd = (*self.odd, "bands")
        return plain_rgb(Image.fromarray(np.ascontiguousarray(to_8_bit(chosen, settings.scales))))


def to_stored_image(
    data: bytes,
    max_megapixels: float,
    short_side: int | None,
    max_aspect_ratio: float,
    pixels: PixelSettings | None = None,
    ending: str = "",
) -> StoredImage:
    """Check a file by decoding it, and convert it to the form that is stored.

    JPEG and PNG files that are 8-bit, RGB or grayscale, opaque, upright and not too large keep their bytes. Other images are
    converted: transparency is composited onto white, more than 8 bits are scaled to 8, and the first of several frames is used.
    Images from lossy formats are stored as JPEG (quality 95, no chroma subsampling), all others as PNG.

    Args:
        data: content of the file.
        max_megapixels: larger images are rejected before any pixel is decoded.
        short_side: images whose shorter side is longer are shrunk to it, in pixels; None: images are not shrunk.
        max_aspect_ratio: images whose longer side is more than so many times the shorter one are rejected.
        pixels: how deep pixels and several bands are converted; None: by the usual ranges, and the first three bands.
        ending: suffix of the file, which tells camera RAW from TIFF.

    Raises:
        BadImage: the file is empty, not an image, too large, too long, truncated, or damaged in any way.
    """
    if not data:
        raise BadImage("empty file")
    pixels = pixels or PixelSettings()
    with _opened(data, max_megapixels, ending) as image:
        _require_size(*image.size, max_megapixels, max_aspect_ratio)
        if isinstance(image, DeepImage):
            mode = f"{image.format} {kind_of(image.pixels.values)}"
            return _encode(image.plain(pixels), short_side, False, image.odd, image.size, mode)
        fits = short_side is None or min(image.size) <= short_side
        if fits and pixels.bands is None and _is_plain(image, data) and (decoded := _decode(image, data)) is not None:
            odd = looks_empty(decoded)
            facts = facts_of(decoded, image.size, f"{image.format} {image.mode}")
            return StoredImage(data, "jpg" if image.format == "JPEG" else "png", False, (odd,) if odd else (), facts)
    with _opened(data, max_megapixels, ending) as image:  # decoding has consumed the first one
        return _reencode(image, data, short_side, pixels)


def deep_span(data: bytes, max_megapixels: float, pixels: PixelSettings) -> tuple[str, Scale] | None:
    """Return the type of the pixels of an image and the span of their values; None if it has 8 bits.

    Raises:
        BadImage: as :func:`to_stored_image`.
    """
    with _opened(data, max_megapixels, "") as image:
        if isinstance(image, Image.Image):
            _require_size(*image.size, max_megapixels, float("inf"))
            if not is_deep(image, data):
                return None
            image.load()
            image = DeepImage(read_deep(image, data))
        chosen, _ = choose_bands(image.pixels, pixels.bands)
        found, kind = span(chosen), kind_of(chosen.values)
        return None if found is None or kind == "8-bit" else (kind, found)


def _require_size(width: int, height: int, max_megapixels: float, max_aspect_ratio: float) -> None:
    if width < 1 or height < 1:
        raise BadImage("no pixels")
    if width * height > max_megapixels * 1e6:
        size = f"{_megapixels(width * height)} megapixels"
        raise BadImage(f"too large ({size}, more than max_megapixels {max_megapixels:g})")
    if max(width, height) > max_aspect_ratio * min(width, height):
        raise BadImage(f"too long ({width:,} x {height:,} pixels, more than max_aspect_ratio {max_aspect_ratio:g})")


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
        return Image.fromarray(to_8_bit(Pixels(np.asarray(image)), {}))
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(data: bytes, max_megapixels: float, ending: str) -> Iterator[Image.Image | DeepImage]:
    """Open an image and read its header; any exception of a decoder, in the context too, becomes BadImage."""
    try:
        limit = max_megapixels * 1e6
        if ending in RAW_SUFFIXES:
            yield DeepImage.of(read_raw(data, limit), "RAW")
        elif is_dicom(data):
            found, several = read_dicom(data, limit)
            yield DeepImage(found, ("frames",) if several else (), "DICOM")
        elif (image := _open(data)) is None:
            yield DeepImage(read_tiff(data, limit), format="TIFF")
        else:
            with image:
                yield image
    except BadImage:
        raise
    except PixelError as error:
        raise BadImage(str(error)) from None
    except Image.DecompressionBombError:
        raise BadImage("too large (a decompression bomb)") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Exception as error:  # a malformed file makes decoders raise nearly anything; it must not stop a run
        reason = str(error) or type(error).__name__
        raise BadImage(f"{'truncated' if 'truncated' in reason.lower() else 'damaged'} ({reason[:100]})") from None


def _open(data: bytes) -> Image.Image | None:
    """Open an image; None if it is a TIFF that Pillow does not know, such as one with many bands."""
    names = (*FORMATS, *register_formats())
    # Pillow's limit on pixels is global; the user's limit is applied once the size is known.
    with _open_lock:
        Image.init()
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=[name for name in names if name in Image.OPEN])
        except UnidentifiedImageError:
            if is_tiff(data):
                return None
            raise
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


def _decode(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return the pixels if the decoder used in training reads these bytes to the end without an error."""
    if image.format == "JPEG":
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError:
            return None
    image.load()
    return np.asarray(image)


def _reencode(
    image: Image.Image | DeepImage, data: bytes, short_side: int | None, pixels: PixelSettings
) -> StoredImage:
    assert isinstance(image, Image.Image)
    lossy = image.format in _LOSSY
    odd: list[str] = []
    size = image.size
    if short_side is not None and image.format == "JPEG" and image.mode in ("RGB", "L") and pixels.bands is None:
        # Decode at 1/2, 1/4 or 1/8 of the size if that is still at least twice the wanted size.
        image.draft(None, (2 * short_side, 2 * short_side))
    image.load()
    turn = _TRANSPOSITIONS.get(_orientation(image))
    if is_deep(image, data) or pixels.bands is not None:
        deep = DeepImage(read_deep(image, data) if is_deep(image, data) else _bands_of(image))
        if is_deep(image, data) and find_spec("tifffile") is None and image.mode in ("RGB", "RGBA"):
            odd.append("reduced")
        plain = deep.plain(pixels)
        odd += deep.odd
    else:
        plain = plain_rgb(image)
    plain = plain if turn is None else plain.transpose(turn)
    if _has_frames(image):
        odd.append("frames")
    mode = f"{image.format} {kind if (kind := _depth(image, data)) else image.mode}"
    return _encode(plain, short_side, lossy, odd, size, mode)


def _depth(image: Image.Image, data: bytes) -> str:
    """Return the type of deep pixels; empty for 8 bits."""
    if image.format == "PNG" and data[24] == 16:
        return "16-bit"
    return (
        ""
        if not (image.mode == "F" or image.mode.startswith("I"))
        else kind_of(np.empty(0, _DTYPES.get(image.mode, "u2")))
    )


def _has_frames(image: Image.Image) -> bool:
    """Return whether there are frames or pages after the first, thumbnails of cameras excepted; call it last."""
    if image.format in ("JPEG", "MPO", "AVIF", "HEIF"):
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage after the first frame
        return False


def _encode(
    plain: Image.Image, short_side: int | None, lossy: bool, odd: Iterable[str], size: tuple[int, int], mode: str
) -> StoredImage:
    if short_side is not None and min(plain.size) > short_side:
        scale = short_side / min(plain.size)
        width, height = (max(1, round(side * scale)) for side in plain.size)
        plain = plain.resize((width, height), Image.Resampling.BICUBIC)
    empty = looks_empty(np.asarray(plain))
    found = (*odd, *([empty] if empty else []))
    facts = facts_of(plain, size, mode)
    file = io.BytesIO()
    if lossy:
        plain.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return StoredImage(file.getvalue(), "jpg", True, found, facts)
    plain.info.clear()  # color profiles and comments
    plain.save(file, "PNG")
    return StoredImage(file.getvalue(), "png", True, found, facts)


def _bands_of(image: Image.Image) -> Pixels:
    """Return the bands of an 8-bit image, for settings that choose among them."""
    if image.mode in ("1", "P", "PA", "La", "RGBa"):
        image = plain_rgb(image)
    return Pixels(np.asarray(image), has_alpha=image.mode in ("LA", "RGBA"))


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:,.0f}" if pixels >= 1e7 else f"{pixels / 1e6:.3g}"
