"""From pixels of any depth and number of bands to 8-bit grayscale or RGB, by one scale for a whole data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from esvit_core.config import DataConfig  # a process that checks images starts without pydantic


Scale = tuple[float, float]
#: Value that becomes black, and value that becomes white, if no image of the type was in the sample.
USUAL_SCALES: Mapping[str, Scale] = {"16-bit": (0.0, 65535.0), "32-bit": (0.0, 65535.0), "float": (0.0, 1.0)}
_CLIPPED = 0.1  # percent of the values at either end that a scale may cut off
_VALUES = 100_000  # of an image that are looked at to find the scale
_NEARLY, _NEARLY_ALL = 26, 0.99  # nearly black: this share of the values is below, of 255


class PixelError(ValueError):
    """The pixels do not fit the settings; the message gives the reason in a few words."""


@dataclass(frozen=True)
class PixelSettings:
    """How pixels become 8-bit grayscale or RGB.

    Attributes:
        bands: numbers of the bands that are used, from 1; None: the first three, or the first one of two.
        scales: values that become black and white, by the type of the pixels: ``16-bit``, ``32-bit``, ``float``.
    """

    bands: tuple[int, ...] | None = None
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @classmethod
    def of(cls, config: DataConfig, scales: Mapping[str, Scale] | None = None) -> PixelSettings:
        """Return the settings of a configuration; ``data.intensity`` takes precedence over ``scales``."""
        given = None if config.intensity == "auto" else parse_intensity(config.intensity)
        return cls(config.bands, dict.fromkeys(USUAL_SCALES, given) if given else dict(scales or {}))


@dataclass(frozen=True)
class Pixels:
    """Decoded pixels that Pillow's 8-bit modes cannot hold.

    Attributes:
        values: (H, W) or (H, W, bands).
        nodata: value that marks pixels without a measurement; they become black.
        white_is_zero: whether the smallest value is white.
        has_alpha: whether the last band is the opacity.
    """

    values: np.ndarray
    nodata: float | None = None
    white_is_zero: bool = False
    has_alpha: bool = False


def parse_intensity(text: str) -> Scale:
    """Return the two values of ``LOW..HIGH``."""
    low, _, high = text.partition("..")
    return float(low), float(high)


def kind_of(values: np.ndarray) -> str:
    """Return the type of pixels: ``8-bit``, ``16-bit``, ``32-bit`` or ``float``."""
    if values.dtype.kind == "f":
        return "float"
    return {1: "8-bit", 2: "16-bit"}.get(values.dtype.itemsize, "32-bit")


def choose_bands(pixels: Pixels, bands: tuple[int, ...] | None) -> tuple[Pixels, bool]:
    """Return one or three bands, and whether others are left out; an opacity stays if no bands are chosen.

    Raises:
        PixelError: there are fewer bands than the settings name.
    """
    values = pixels.values if pixels.values.ndim == 3 else pixels.values[..., None]
    count = values.shape[2]
    if bands is not None:
        if max(bands) > count:
            raise PixelError(f"{count} {'band' if count == 1 else 'bands'}, and data.bands names {max(bands)}")
        values = values[..., [band - 1 for band in bands]]
        left_out = count - pixels.has_alpha > len(set(bands))
        pixels = Pixels(values, pixels.nodata, pixels.white_is_zero)
    elif pixels.has_alpha and count in (2, 4):
        return pixels, False
    else:
        kept = 3 if count >= 3 else 1
        left_out = count - pixels.has_alpha > kept
        pixels = Pixels(values[..., :kept], pixels.nodata, pixels.white_is_zero)
    if pixels.values.shape[2] == 1:
        pixels = Pixels(pixels.values[..., 0], pixels.nodata, pixels.white_is_zero)
    return pixels, left_out


def to_8_bit(pixels: Pixels, scales: Mapping[str, Scale]) -> np.ndarray:
    """Scale pixels to 8 bits; values outside the scale, NaN and pixels without a measurement are clipped.

    Returns:
        uint8, of the same shape.
    """
    values, kind = pixels.values, kind_of(pixels.values)
    low, high = scales.get(kind) or USUAL_SCALES.get(kind, (0.0, 255.0))
    if kind == "8-bit":
        scaled = values.astype(np.uint8)
    elif values.dtype.kind == "u" and (kind, low, high) == ("16-bit", 0.0, 65535.0):
        scaled = (values >> 8).astype(np.uint8)
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            stretched = (values.astype(np.float32) - low) * (255.0 / max(high - low, 1e-12))
        scaled = np.clip(np.nan_to_num(stretched, nan=0.0, posinf=255.0, neginf=0.0), 0, 255).astype(np.uint8)
    if pixels.white_is_zero:
        scaled = 255 - scaled
    if pixels.nodata is not None:
        scaled[values == pixels.nodata] = 0
    if pixels.has_alpha and kind not in ("8-bit", "float"):  # opacity has the range of its type
        full = np.iinfo(values.dtype).max
        scaled[..., -1] = (values[..., -1].astype(np.float64) * (255.0 / full)).astype(np.uint8)
    return scaled


def span(pixels: Pixels) -> Scale | None:
    """Return the smallest and the largest value of an image, without outliers; None if it has no values."""
    values = pixels.values[..., :-1] if pixels.has_alpha else pixels.values
    values = values.reshape(-1)
    values = values[:: max(1, values.size // _VALUES)]
    if pixels.nodata is not None:
        values = values[values != pixels.nodata]
    values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = np.percentile(values, [_CLIPPED, 100 - _CLIPPED])
    return float(low), float(high)


def usual_scale(kind: str, low: float, high: float) -> Scale:
    """Return the scale for a data set whose values lie between ``low`` and ``high``.

    Integers: from 0 to the largest value of so many bits (1023, 4095, ...). Floating point: 0..1, -1..1, 0..255 or 0..65535 if
    the values fill them, otherwise the values' own range.
    """
    if kind == "float":
        if high <= 1.05 and low >= -0.05:
            return 0.0, 1.0
        if high <= 1.05 and low >= -1.05:
            return -1.0, 1.0
        for full in (255.0, 65535.0):
            if low >= 0 and full / 2 < high <= full:
                return 0.0, full
    elif low >= 0:
        return 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
    return min(low, 0.0), max(high, min(low, 0.0) + 1e-6)


def looks_empty(image: np.ndarray) -> str:
    """Return ``dark`` if an 8-bit image is nearly black, ``bright`` if it is nearly white, otherwise an empty text."""
    values = image[:: max(1, image.shape[0] // 64), :: max(1, image.shape[1] // 64)]
    if (values < _NEARLY).mean() >= _NEARLY_ALL:
        return "dark"
    return "bright" if (values > 255 - _NEARLY).mean() >= _NEARLY_ALL else ""
