"""Resize maps by interpolation, with a gradient that is the same in every run on a GPU, too.

torch's bicubic and linear interpolation have no deterministic backward pass on a GPU. Interpolation along one axis is a
product with a matrix that depends on nothing but the sizes, and products are deterministic.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from esvit_core.torch_private import outside_modes

_LINEAR = {"linear": "bilinear", "bilinear": "bilinear", "bicubic": "bicubic"}


def resize(
    x: Tensor,
    size: int | tuple[int, ...] | None = None,
    scale_factor: float | tuple[float, ...] | None = None,
    mode: str = "bicubic",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Resize ``x`` like :func:`torch.nn.functional.interpolate`, whose arguments and errors it shares.

    Unless ``x`` is on a GPU, this is torch's function itself. There linear, bilinear and bicubic interpolation are computed in
    float32 by :func:`resize_by_products`, whatever autocast is set.

    Args:
        x: (B, C, L) or (B, C, H, W).
        size, scale_factor, mode, align_corners, recompute_scale_factor, antialias: see torch's function.

    Returns:
        (B, C, L') or (B, C, H', W').
    """
    if not x.is_cuda or mode not in _LINEAR or recompute_scale_factor or x.ndim not in (3, 4):
        return F.interpolate(x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    return resize_by_products(x, size, scale_factor, mode, align_corners, antialias)


def resize_by_products(
    x: Tensor,
    size: int | tuple[int, ...] | None = None,
    scale_factor: float | tuple[float, ...] | None = None,
    mode: str = "bicubic",
    align_corners: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Resize ``x`` by one product per axis; see :func:`resize`. The result has the dtype of ``x``."""
    axes = x.ndim - 2
    sizes: list[int | None] = [*size] if isinstance(size, (tuple, list)) else [size] * axes
    scales = [*scale_factor] if isinstance(scale_factor, (tuple, list)) else [scale_factor] * axes
    matrices = axis_matrices((*x.shape[2:],), (*sizes,), (*scales,), mode, align_corners, antialias, x.device)
    with torch.autocast(x.device.type, enabled=False):
        out = x.float() @ matrices[-1].mT  # (B, C, H, W') or (B, C, L')
        if axes == 2:
            out = matrices[0] @ out  # (B, C, H', W')
    return out.to(x.dtype)


def axis_matrices(
    lengths: tuple[int, ...], sizes: tuple[int | None, ...], scales: tuple[float | None, ...], *arguments: Any
) -> tuple[Tensor, ...]:
    """Return the matrix of the interpolation along each axis; each is computed once per resolution and device."""
    if torch.compiler.is_compiling():  # a trace's tensors must not outlive it
        cached = _cached_matrix.__wrapped__
    else:
        cached = functools.partial(outside_modes, _cached_matrix)  # nor must fake tensors
    return tuple(cached(*axis, *arguments) for axis in zip(lengths, sizes, scales, strict=True))


@functools.lru_cache(maxsize=64)
def _cached_matrix(
    length: int,
    size: int | None,
    scale: float | None,
    mode: str,
    align_corners: bool | None,
    antialias: bool,
    device: torch.device,
) -> Tensor:
    """Return the matrix (size, length) of the interpolation along one axis: the resized unit vectors."""
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(length, device="cpu").view(1, 1, length, length)
        matrix = F.interpolate(
            units,
            size=None if size is None else (size, length),
            scale_factor=None if scale is None else (scale, 1.0),
            mode=_LINEAR[mode],
            align_corners=align_corners,
            antialias=antialias,
        )
        return matrix[0, 0].to(device)


class ResizeByProducts(TorchFunctionMode):
    """Replaces torch's interpolation by :func:`resize` in code that is not ours."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (resize if func is F.interpolate else func)(*args, **(kwargs or {}))
