"""Read pixels that Pillow's 8-bit modes cannot hold: 16 bits and more, floating point, further bands, DICOM."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from esvit_core.data.ingest.file_kinds import TIFF_SIGNATURES
from esvit_core.data.ingest.pixels import PixelError, Pixels

_BITS, _PHOTOMETRIC, _BANDS, _SAMPLE_FORMAT, _EXTRA, _NODATA = 258, 262, 277, 339, 338, 42113  # TIFF tags
_DICOM_START = 128
_BYTES_PER_PIXEL = 64  # 16 bands of 32 bits; an image that needs more is refused like one with too many pixels


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Return whether Pillow would lose depth or bands of an image.

    Args:
        image: as opened by Pillow.
        data: content of the file.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return True
    if image.format == "PNG":
        return data[24] == 16  # Pillow reports 16-bit RGB as 8-bit
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, bands = tags.get(_BITS, (1,)), tags.get(_BANDS, 1)
        return max(bits) > 8 or (bands == 4 and tags.get(_EXTRA, (1,))[0] == 0 and tags.get(_PHOTOMETRIC) in (1, 2))
    return False


def read_deep(image: Image.Image, data: bytes) -> Pixels:
    """Return the pixels of the first frame of an image for which :func:`is_deep` is true.

    Without the packages of the extra ``formats``, color has the upper 8 bits only, and no more bands than Pillow reads.
    """
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(_BANDS, 1) > 1 and find_spec("tifffile") is not None:
            return read_tiff(data, float("inf"))
        nodata = _number(tags.get(_NODATA))
        return Pixels(np.asarray(image), nodata, tags.get(_PHOTOMETRIC) == 0 and image.mode != "F")
    if image.format == "PNG" and not image.mode.startswith("I") and find_spec("imagecodecs") is not None:
        import imagecodecs

        values = np.asarray(imagecodecs.png_decode(data))
        return Pixels(values, has_alpha=values.ndim == 3 and values.shape[2] in (2, 4))
    values = np.asarray(image)
    if image.format == "PPM":
        values = values.astype(np.uint16)  # Pillow has scaled them to 16 bits
    return Pixels(values)


def is_tiff(data: bytes) -> bool:
    """Return whether a file is a TIFF, by its first bytes."""
    return data.startswith(TIFF_SIGNATURES)


def is_dicom(data: bytes) -> bool:
    """Return whether a file is a DICOM file, by its first bytes."""
    return data[_DICOM_START : _DICOM_START + 4] == b"DICM"


def read_tiff(data: bytes, max_pixels: float) -> Pixels:
    """Return the pixels of the first page of a TIFF that Pillow cannot read, such as one with many bands.

    Raises:
        PixelError: tifffile is not installed, or there are more than ``max_pixels`` pixels.
    """
    if find_spec("tifffile") is None:
        raise PixelError("a TIFF with other bands than RGB; install the extra esvit[formats]")
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        _require_size(page.imagewidth * page.imagelength, page.nbytes, max_pixels)
        values = np.asarray(page.asarray())
        if values.ndim == 3 and page.axes.startswith("S"):
            values = np.moveaxis(values, 0, -1)
        if values.ndim not in (2, 3):
            raise PixelError(f"{values.ndim} dimensions")
        extra = [int(sample) for sample in page.extrasamples]
        nodata = page.tags.get(_NODATA)
        return Pixels(
            values,
            _number(None if nodata is None else nodata.value),
            int(page.photometric) == 0,
            has_alpha=values.ndim == 3 and values.shape[2] in (2, 4) and extra in ([1], [2]),
        )


def read_dicom(data: bytes, max_pixels: float) -> tuple[Pixels, bool]:
    """Return the pixels of the first frame of a DICOM file in its own units, and whether there are further frames.

    Raises:
        PixelError: pydicom is not installed, or there are more than ``max_pixels`` pixels.
    """
    if find_spec("pydicom") is None:
        raise PixelError("no reader for DICOM; install the extra esvit[formats]")
    from pydicom import dcmread
    from pydicom.pixels import apply_rescale, pixel_array

    found = dcmread(io.BytesIO(data))
    _require_size(
        found.Rows * found.Columns, found.Rows * found.Columns * found.get("SamplesPerPixel", 1) * 4, max_pixels
    )
    values = apply_rescale(pixel_array(found, index=0), found)
    if values.dtype == np.float64 and np.array_equal(
        values, np.rint(values)
    ):  # whole numbers, such as Hounsfield units
        values = values.astype(np.int32)
    several = int(found.get("NumberOfFrames") or 1) > 1
    return Pixels(values, white_is_zero=found.get("PhotometricInterpretation") == "MONOCHROME1"), several


def read_raw(data: bytes, max_pixels: float) -> Image.Image:
    """Develop a camera's raw image with the white balance of the camera.

    Raises:
        PixelError: rawpy is not installed, or there are more than ``max_pixels`` pixels.
    """
    if find_spec("rawpy") is None:
        raise PixelError("no reader for camera RAW; install the extra esvit[formats]")
    import rawpy

    with rawpy.imread(io.BytesIO(data)) as raw:
        _require_size(raw.sizes.width * raw.sizes.height, 0, max_pixels)
        return Image.fromarray(raw.postprocess(use_camera_wb=True))


def _require_size(pixels: int, size: int, max_pixels: float) -> None:
    if pixels > max_pixels or size > max_pixels * _BYTES_PER_PIXEL:
        raise PixelError(f"too large ({pixels / 1e6:,.3g} megapixels, more than max_megapixels {max_pixels / 1e6:g})")


def _number(text: object) -> float | None:
    try:
        return float(str(text).strip("\0 ")) if text is not None else None
    except ValueError:
        return None
