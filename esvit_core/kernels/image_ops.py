"""Crops of an 8-bit image in C: cut out, resized and with photometric augmentation (``crop_resize.c``, ``photometric.c``).

The resized crop is bit for bit that of torch and PIL. The photometric operations are those of
:mod:`esvit_core.data.loading.photometric`, in the same order; the luma of large crops may differ in its last bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from esvit_core.kernels import library

HUE = 3  # the operations of the color jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue


class Crop(ctypes.Structure):
    """``struct crop`` of ``image_ops.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("left", "top", "width", "height", "size", "flip")),
        ("operations", ctypes.c_int64 * 4),
        ("rests", ctypes.c_double * 4),
        ("factors", ctypes.c_float * 4),
        ("hues", ctypes.c_float * 3),
        ("blur_ratio", ctypes.c_float),
        ("blur_weight", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("blur", "blur_reach", "grayscale", "solarize")),
        ("out", ctypes.c_void_p),
    )


def describe_crop(
    box: tuple[int, int, int, int],
    flip: bool,
    jitter: Sequence[tuple[int, float]],
    grayscale: bool,
    blur: tuple[int, float, float] | None,
    solarize: bool,
    out: Tensor,
) -> Crop:
    """Return the arguments of a crop.

    Args:
        box: left, top, right, bottom in the image, pixels.
        flip: mirror the crop.
        jitter: operations and their factors, in order; the shift of the hue as a fraction of the circle.
        grayscale: set all channels to the luma.
        blur: reach, ratio of the last neighbors, and weight of a Gaussian blur; None: no blur.
        solarize: invert bright values.
        out: result, (3, S, S) float32, contiguous; it has to exist until the crop is made.
    """
    left, top, right, bottom = box
    crop = Crop(left, top, right - left, bottom - top, out.shape[-1], flip, grayscale=grayscale, solarize=solarize)
    crop.operations[:] = [-1] * 4
    for number, (operation, factor) in enumerate(jitter):
        crop.operations[number] = operation
        if operation == HUE:
            crop.hues[:] = [6 * factor + hue for hue in (0, 2, 4)]
        else:
            crop.factors[number], crop.rests[number] = factor, 1 - factor
    if blur is not None:
        crop.blur, (crop.blur_reach, crop.blur_ratio, crop.blur_weight) = True, blur
    crop.out = out.data_ptr()
    return crop


def can_make_crops() -> bool:
    """Whether :func:`make_crops` works here: the kernels are compiled, for a processor with AVX2."""
    return hasattr(library(), "make_crops")


def make_crops(image: np.ndarray, crops: Sequence[Crop], scales: Tensor, shifts: Tensor) -> None:
    """Make crops of an image, normalized: ``values * scales + shifts``.

    Args:
        image: (H, W, 3) uint8, contiguous.
        crops: see :func:`describe_crop`.
        scales, shifts: of the three channels, float32.

    Raises:
        MemoryError: the working memory could not be allocated.
    """
    array = (Crop * len(crops))(*crops)
    height, width, _ = image.shape
    pointers = image.ctypes.data, height, width, array, len(crops), scales.data_ptr(), shifts.data_ptr()
    if library().make_crops(*pointers):  # type: ignore[union-attr]
        raise MemoryError(f"the crops of an image of {width:,} x {height:,} pixels: out of memory")
