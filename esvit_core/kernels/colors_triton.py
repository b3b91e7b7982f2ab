"""Color changes of crops on a GPU, fused: eight kernels per size of crop instead of some two hundred.

The first kernel finds the mean gray value that the contrast needs, the second does everything up to the blur, and six more
do the box blurs of those images that have one. The reference is :func:`esvit_core.data.loading.device_colors.change_colors`;
``tests/data/test_device_colors.py`` runs the kernels in Triton's interpreter on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_COLUMNS = tl.constexpr(13)


@triton.jit
def _blend(red, green, blue, base_red, base_green, base_blue, factor):  # type: ignore[no-untyped-def]
    rest = 1 - factor
    red = tl.minimum(tl.maximum(red * factor + base_red * rest, 0.0), 255.0)
    green = tl.minimum(tl.maximum(green * factor + base_green * rest, 0.0), 255.0)
    blue = tl.minimum(tl.maximum(blue * factor + base_blue * rest, 0.0), 255.0)
    return red, green, blue


@triton.jit
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    return red * 0.2989959716796875 + green * 0.587005615234375 + blue * 0.1139984130859375


@triton.jit
def _primary(distance, chroma, least):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(distance, 0.0), 1.0) * chroma + least


@triton.jit
def _shift_hue(red, green, blue, shift):  # type: ignore[no-untyped-def]
    greatest = tl.maximum(tl.maximum(red, green), blue)
    least = tl.minimum(tl.minimum(red, green), blue)
    chroma = greatest - least
    per_chroma = 1 / tl.maximum(chroma, 1e-6)
    of_green, of_blue = (blue - red) * per_chroma + 2, (red - green) * per_chroma + 4
    hue = tl.where(greatest == red, (green - blue) * per_chroma, tl.where(greatest == green, of_green, of_blue))
    hue = hue + 6 * shift
    hue = hue - tl.floor(hue / 6) * 6
    return (
        _primary(tl.abs(hue - 3) - 1, chroma, least),
        _primary(2 - tl.abs(hue - 2), chroma, least),
        _primary(2 - tl.abs(hue - 4), chroma, least),
    )


@triton.jit
def _change(red, green, blue, operation, factor, mean):  # type: ignore[no-untyped-def]
    """Apply one operation: 0 brightness, 1 contrast, 2 saturation, 3 hue; -1 none."""
    if operation == 0:
        red, green, blue = _blend(red, green, blue, red * 0, green * 0, blue * 0, factor)
    elif operation == 1:
        base = red * 0 + mean
        red, green, blue = _blend(red, green, blue, base, base, base, factor)
    elif operation == 2:
        base = _luma(red, green, blue)
        red, green, blue = _blend(red, green, blue, base, base, base, factor)
    elif operation == 3:
        red, green, blue = _shift_hue(red, green, blue, factor)
    return red, green, blue


@triton.jit
def _load(levels, image, pixels, inside, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    first = levels + image * (3 * SIZE) + pixels
    red = tl.load(first, mask=inside, other=0).to(tl.float32)
    green = tl.load(first + SIZE, mask=inside, other=0).to(tl.float32)
    blue = tl.load(first + 2 * SIZE, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _mean_kernel(levels, draws, means, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the rounded mean gray value of each image before its contrast is changed; 0 for the others."""
    image = tl.program_id(0).to(tl.int64)
    draw = draws + image * _COLUMNS
    where = tl.full((), -1, tl.int32)
    for position in tl.static_range(4):
        where = tl.where(tl.load(draw + position) == 1, position, where)
    total = tl.zeros((BLOCK,), tl.float32)
    if where >= 0:
        for start in range(0, SIZE, BLOCK):
            pixels = start + tl.arange(0, BLOCK)
            inside = pixels < SIZE
            red, green, blue = _load(levels, image, pixels, inside, SIZE)
            for position in tl.static_range(3):
                if position < where:
                    operation, factor = tl.load(draw + position), tl.load(draw + 4 + position)
                    red, green, blue = _change(red, green, blue, operation, factor, 0.0)
            total += tl.where(inside, _luma(red, green, blue), 0.0)
    tl.store(means + image, tl.floor(tl.sum(total, 0) / SIZE + 0.5))


@triton.jit
def _finish(x, solarize, scale, shift):  # type: ignore[no-untyped-def]
    x = tl.where(solarize > 0, tl.where(x >= 128, 255 - x, x), x)
    return x * scale + shift


@triton.jit
def _color_kernel(levels, draws, means, scale, shift, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store what precedes the blur, and for images without one the result."""
    image = tl.program_id(0).to(tl.int64)
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < SIZE
    draw = draws + image * _COLUMNS
    red, green, blue = _load(levels, image, pixels, inside, SIZE)
    mean = tl.load(means + image)
    for position in tl.static_range(4):
        operation, factor = tl.load(draw + position), tl.load(draw + 4 + position)
        red, green, blue = _change(red, green, blue, operation, factor, mean)
    if tl.load(draw + 8) > 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    if tl.load(draw + 9) < 0:
        solarize = tl.load(draw + 12)
        red = _finish(red, solarize, tl.load(scale), tl.load(shift))
        green = _finish(green, solarize, tl.load(scale + 1), tl.load(shift + 1))
        blue = _finish(blue, solarize, tl.load(scale + 2), tl.load(shift + 2))
    first = out + image * (3 * SIZE) + pixels
    tl.store(first, red, mask=inside)
    tl.store(first + SIZE, green, mask=inside)
    tl.store(first + 2 * SIZE, blue, mask=inside)


@triton.jit
def _box_kernel(  # type: ignore[no-untyped-def]
    source, target, draws, scale, shift, MOST: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add neighbors along one axis, with borders repeated; the last of the six box blurs weights the sum and finishes."""
    plane = tl.program_id(0).to(tl.int64)  # image and channel
    image, channel = plane // 3, plane % 3
    draw = draws + image * _COLUMNS
    reach = tl.load(draw + 9)
    if reach >= 0:
        ratio = tl.load(draw + 10)
        pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pixels < SIDE * SIDE
        place = (pixels // STRIDE) % SIDE  # along the axis
        first = source + plane * (SIDE * SIDE)
        total = tl.load(first + pixels, mask=inside, other=0.0)
        for step in tl.static_range(1, MOST + 2):
            before = pixels + (tl.maximum(place - step, 0) - place) * STRIDE
            after = pixels + (tl.minimum(place + step, SIDE - 1) - place) * STRIDE
            both = tl.load(first + before, mask=inside, other=0.0) + tl.load(first + after, mask=inside, other=0.0)
            total += both * tl.where(step <= reach, 1.0, tl.where(step == reach + 1, ratio, 0.0))
        if LAST:
            total = total * tl.load(draw + 11)
            total = _finish(total, tl.load(draw + 12), tl.load(scale + channel), tl.load(shift + channel))
        tl.store(target + plane * (SIDE * SIDE) + pixels, total, mask=inside)


def change_colors_triton(levels: Tensor, draws: Tensor, scale: Tensor, shift: Tensor, most_reach: int) -> Tensor:
    """Change colors and normalize; arguments as in :func:`esvit_core.data.loading.device_colors.change_colors`."""
    levels, draws = levels.contiguous(), draws.contiguous()
    number, _, side, _ = levels.shape
    out = torch.empty(levels.shape, dtype=torch.float32, device=levels.device)
    if not number:
        return out
    means, size = out.new_empty(number), side * side
    block = min(_BLOCK, triton.next_power_of_2(size))
    blocks = triton.cdiv(size, block)
    _mean_kernel[(number,)](levels, draws, means, SIZE=size, BLOCK=block)
    _color_kernel[(number, blocks)](levels, draws, means, scale, shift, out, SIZE=size, BLOCK=block)
    source, target = out, torch.empty_like(out)
    for stride in (1, side):
        for step in range(3):
            _box_kernel[(3 * number, blocks)](
                *(source, target, draws, scale, shift),
                MOST=most_reach,
                SIDE=side,
                STRIDE=stride,
                LAST=stride == side and step == 2,
                BLOCK=block,
            )
            source, target = target, source
    return out
