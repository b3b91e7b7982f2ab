"""Photometric augmentation and normalization on a GPU, for whole batches: the operations of
:mod:`esvit_core.data.loading.photometric`, in the order and with the random numbers that were drawn for each crop.

The workers then only cut out, resize and flip, and a crop travels as levels, a quarter of float32. The results differ from
those on the CPU by rounding only, in the tests by less than 0.02 of the 255 levels; where the mean gray value of an image is
within rounding of a half, contrast may use the neighboring integer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.config import AugmentConfig
from esvit_core.data.loading import photometric
from esvit_core.data.loading.augment import CropDraw, Normalize

#: Columns of a crop's draw: operation (-1: none) and factor of each position of the jitter, grayscale, the reach of the blur (-1:
#: none), the ratio of its last neighbors, the weight of their sum, and solarization.
OPERATIONS, FACTORS, GRAYSCALE, REACH, RATIO, WEIGHT, SOLARIZE = slice(0, 4), slice(4, 8), 8, 9, 10, 11, 12
DRAW_COLUMNS = 13
_, CONTRAST, SATURATION, HUE = range(4)  # 0: brightness
_LUMA: list[float] = photometric.LUMA_WEIGHTS.tolist()


def pack_draws(draws: Sequence[CropDraw]) -> np.ndarray:
    """Return what changes the colors of each crop, (C, 13) float32."""
    packed = np.zeros((len(draws), DRAW_COLUMNS), np.float32)
    packed[:, OPERATIONS] = packed[:, REACH] = -1
    for row, drawn in zip(packed, draws, strict=True):
        for position, (operation, factor) in enumerate(drawn.jitter):
            row[position], row[4 + position] = operation, factor
        row[GRAYSCALE], row[SOLARIZE] = drawn.grayscale, drawn.solarize
        if drawn.blur_sigma is not None:
            row[REACH : WEIGHT + 1] = photometric.blur_factors(drawn.blur_sigma)
    return packed


class DeviceColors:
    """Turns the levels of a batch's crops into normalized crops with changed colors, on the device of the levels.

    Args:
        config: mean and standard deviation, and the strongest blur.
        fused: use the kernels of :mod:`esvit_core.kernels.colors_triton`.
    """

    def __init__(self, config: AugmentConfig, *, fused: bool) -> None:
        self._fused = fused
        self._normalize = Normalize(config.mean, config.std)
        self._most_reach = photometric.blur_factors(config.blur_sigma[1])[0]
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, crops: Sequence[Tensor], draws: Tensor) -> list[Tensor]:
        """Change the colors of the crops.

        Args:
            crops: levels of each crop, (B, 3, S, S) uint8.
            draws: of :func:`pack_draws` for each image, (B, C, 13).

        Returns:
            The crops, (B, 3, S, S) float32 each, views of one tensor per size.
        """
        found: list[Tensor] = []
        numbers = range(len(crops))
        for _, group in itertools.groupby(numbers, key=lambda number: crops[number].shape[-1]):
            members = list(group)
            levels = torch.cat([crops[number] for number in members])
            of_group = draws[:, members[0] : members[-1] + 1].transpose(0, 1).reshape(-1, DRAW_COLUMNS)
            found += self._change(levels, of_group).chunk(len(members))
        return found

    def _change(self, levels: Tensor, draws: Tensor) -> Tensor:
        scale, shift = self._constants_on(levels.device)
        if self._fused:
            from esvit_core.kernels.colors_triton import change_colors_triton

            return change_colors_triton(levels, draws, scale.flatten(), shift.flatten(), self._most_reach)
        return change_colors(levels, draws, scale, shift, self._most_reach)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            self._constants[device] = self._normalize.scale.to(device), self._normalize.shift.to(device)
        return self._constants[device]


def change_colors(levels: Tensor, draws: Tensor, scale: Tensor, shift: Tensor, most_reach: int) -> Tensor:
    """Change colors and normalize, with torch's operations; no value is read on the CPU.

    Args:
        levels: (N, 3, S, S) uint8.
        draws: (N, 13) float32, see :func:`pack_draws`.
        scale, shift: of the normalization, (3, 1, 1).
        most_reach: largest reach of a blur.

    Returns:
        (N, 3, S, S) float32.
    """
    x = levels.float()
    columns = draws[:, :, None, None, None]  # (N, 13, 1, 1, 1)
    for position in range(4):
        x = _jitter(x, columns[:, position], columns[:, 4 + position])
    x = torch.where(columns[:, GRAYSCALE] > 0, _luma(x), x)
    x = _blur(x, columns[:, REACH], columns[:, RATIO], columns[:, WEIGHT], most_reach)
    x = torch.where((columns[:, SOLARIZE] > 0) & (x >= photometric.SOLARIZE_THRESHOLD), 255 - x, x)
    return x * scale + shift


def _jitter(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Apply one operation of the jitter to each image: (N, 1, 1, 1) each."""
    luma = _luma(x)
    mean = (luma.mean((1, 2, 3), keepdim=True) + 0.5).floor()
    base = torch.where(operation == SATURATION, luma, torch.where(operation == CONTRAST, mean, 0.0))
    blended = (x * factor + base * (1 - factor)).clamp(0, 255)
    x = torch.where((operation >= 0) & (operation != HUE), blended, x)
    return torch.where(operation == HUE, _shift_hue(x, factor), x)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    red, green, blue = x.split(1, 1)
    greatest, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = greatest - least
    per_chroma = 1 / chroma.clamp(min=1e-6)
    of_red, of_green = (green - blue) * per_chroma, (blue - red) * per_chroma + 2
    of_blue = (red - green) * per_chroma + 4
    hue = torch.where(greatest == red, of_red, torch.where(greatest == green, of_green, of_blue)) + 6 * shift
    hue = hue - (hue / 6).floor() * 6
    primaries = [(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()]
    return torch.cat(primaries, 1).clamp(0, 1) * chroma + least


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, 1)
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _blur(x: Tensor, reach: Tensor, ratio: Tensor, weight: Tensor, most_reach: int) -> Tensor:
    """Blur the images whose reach is not negative, with three box blurs in each direction."""
    blurred = x
    for axis in (3, 2):
        for _ in range(3):
            pad = [most_reach + 1] * 2
            padded = F.pad(blurred, [*pad, 0, 0] if axis == 3 else [0, 0, *pad], mode="replicate")
            size = x.shape[axis]
            for step in range(1, most_reach + 2):
                factor = torch.where(reach >= step, 1.0, torch.where(reach == step - 1, ratio, 0.0))
                both = padded.narrow(axis, most_reach + 1 - step, size) + padded.narrow(
                    axis, most_reach + 1 + step, size
                )
                blurred = blurred + both * factor
    return torch.where(reach >= 0, blurred * weight, x)
