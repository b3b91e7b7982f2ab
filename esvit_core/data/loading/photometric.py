"""Color jitter, grayscale, blur and solarization: torchvision's operations on PIL images, on float arrays.

All functions work in place on ``x``, (3, H, W) float32 with values 0 to 255, and keep it in that range. PIL rounds to
whole levels after every operation; nothing is rounded here, so results differ from PIL's by about one level per operation
(the tests state how much). The reason is speed: with PIL, hue and blur take most of the time of an augmentation.
"""

from __future__ import annotations

import functools
import math

import numpy as np

# Weights of PIL's conversion to grayscale (ITU-R 601-2), in its 16-bit fixed point.
LUMA_WEIGHTS = np.array([19595, 38470, 7471], dtype=np.float32) / np.float32(65536)
_CENTERS = np.array([3, 2, 4], dtype=np.float32)[:, None]  # hues around which each primary's intensity is symmetric
_BLUR_PASSES = 3
SOLARIZE_THRESHOLD = 128


def adjust_brightness(x: np.ndarray, factor: float) -> None:
    """Blend with black: factor 0 gives black, 1 the image."""
    x *= np.float32(factor)
    _clip_if_stretched(x, factor)


def adjust_contrast(x: np.ndarray, factor: float) -> None:
    """Blend with the mean gray value of the image: factor 0 gives uniform gray, 1 the image."""
    mean = int(float(_luma(x).mean()) + 0.5)  # an integer, as in PIL
    x *= np.float32(factor)
    x += np.float32((1 - factor) * mean)
    _clip_if_stretched(x, factor)


def adjust_saturation(x: np.ndarray, factor: float) -> None:
    """Blend with the grayscale image: factor 0 gives grayscale, 1 the image."""
    luma = _luma(x)
    luma *= np.float32(1 - factor)
    x *= np.float32(factor)
    x += luma
    _clip_if_stretched(x, factor)


def adjust_hue(x: np.ndarray, shift: float) -> None:
    """Shift the hue by ``shift`` of the full circle; value and saturation stay the same.

    The hue is a position on a circle of six sixths: red at 0, green at 2, blue at 4. The intensity of each primary is a
    trapezoid along the circle, between the smallest and the largest channel of the color.
    """
    flat = x.reshape(3, -1)
    red, green, blue = flat
    greatest = np.maximum(red, green)
    np.maximum(greatest, blue, out=greatest)
    least = np.minimum(red, green)
    np.minimum(least, blue, out=least)
    chroma = greatest - least

    # Each pixel uses the formula of its largest channel. Multiplying by masks is many times faster than numpy's
    # selection by a mask.
    is_red = greatest == red
    is_green = greatest == green
    is_green &= ~is_red
    is_blue = ~(is_red | is_green)
    per_chroma = np.float32(1) / np.maximum(chroma, np.float32(1e-6))
    hue = _sixths(green, blue, per_chroma, 6 * shift, is_red)
    hue += _sixths(blue, red, per_chroma, 6 * shift + 2, is_green)
    hue += _sixths(red, green, per_chroma, 6 * shift + 4, is_blue)
    turns = hue * np.float32(1 / 6)
    np.floor(turns, out=turns)
    turns *= np.float32(6)
    hue -= turns  # 0 to 6

    np.subtract(hue, _CENTERS, out=flat)
    np.abs(flat, out=flat)
    flat[0] -= 1
    np.subtract(np.float32(2), flat[1:], out=flat[1:])
    np.clip(flat, 0, 1, out=flat)
    flat *= chroma
    flat += least


def grayscale(x: np.ndarray) -> None:
    """Set all channels to the luma."""
    x[:] = _luma(x)


def gaussian_blur(x: np.ndarray, sigma: float) -> None:
    """Gaussian blur as PIL computes it: three box blurs with fractional edges per direction, with borders repeated.

    A box blur adds neighbors to each pixel. In one row of all pixels the neighbors are a fixed distance away: 1 within a
    line, and the length of a line across lines. A margin, filled before each box blur, separates the lines.

    Args:
        x: the image.
        sigma: standard deviation, pixels (PIL's ``radius``).
    """
    reach, ratio, weight = blur_factors(sigma)
    margin = reach + 1
    channels, height, width = x.shape
    padded = np.zeros((channels, height + 2 * margin, width + 2 * margin), np.float32)
    padded[:, margin:-margin, margin:-margin] = x
    row = padded.reshape(-1)
    for lines, distance in ((padded.transpose(2, 0, 1), 1), (padded.transpose(1, 0, 2), width + 2 * margin)):
        for _ in range(_BLUR_PASSES):
            lines[:margin] = lines[margin]
            lines[-margin:] = lines[-margin - 1]
            _add_neighbors(row, reach, distance, np.float32(ratio))
    # The weights of all six box blurs are applied once, to the sum.
    np.multiply(padded[:, margin:-margin, margin:-margin], np.float32(weight), out=x)


def blur_factors(sigma: float) -> tuple[int, float, float]:
    """Return the reach of the box blurs, the weight of the neighbors beyond it relative to the others, and of the sum."""
    reach, inner, edge = _box(sigma)
    return reach, edge / inner, inner ** (2 * _BLUR_PASSES)


def solarize(x: np.ndarray) -> None:
    """Invert values at or above the threshold."""
    bright = x >= SOLARIZE_THRESHOLD
    x -= bright * (2 * x - np.float32(255))


def _luma(x: np.ndarray) -> np.ndarray:
    return np.matmul(LUMA_WEIGHTS, x.reshape(3, -1)).reshape(x.shape[1:])  # (H, W)


def _clip_if_stretched(x: np.ndarray, factor: float) -> None:
    if factor > 1:  # otherwise the blend lies between two values in range
        np.clip(x, 0, 255, out=x)


def _sixths(a: np.ndarray, b: np.ndarray, per_chroma: np.ndarray, start: float, mask: np.ndarray) -> np.ndarray:
    """Return the hue ``start + (a - b) / chroma`` where ``mask`` is true, 0 elsewhere."""
    hue = a - b
    hue *= per_chroma
    hue += np.float32(start)
    hue *= mask
    return hue


@functools.lru_cache(maxsize=256)
def _box(sigma: float) -> tuple[int, float, float]:
    """Return the whole pixels on either side of a box's center, their weight, and the weight of the fractional pixel beyond.

    Source: "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", Gwosdek et al., 2011.
    """
    variance = sigma * sigma / _BLUR_PASSES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = 1 / (2 * (whole + fraction) + 1)
    return whole, inner, fraction * inner


def _add_neighbors(row: np.ndarray, reach: int, distance: int, ratio: np.float32) -> None:
    """Add to each value its neighbors up to ``reach`` steps away, and ``ratio`` times those one step further."""
    size, around = len(row), (reach + 1) * distance

    def at(steps: int) -> np.ndarray:
        return row[around + steps * distance : size - around + steps * distance]

    total = at(-reach - 1) + at(reach + 1)
    total *= ratio
    for step in range(1, reach + 1):
        total += at(-step)
        total += at(step)
    row[around : size - around] += total
