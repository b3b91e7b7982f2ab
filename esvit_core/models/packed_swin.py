"""Swin's forward pass for crops of several sizes at once, in fused kernels, for trainings on a GPU.

The tokens of all crops are the rows of one matrix, ordered by size, image and position, so that each layer is computed
once. Attention finds its windows through a table, whatever the size of the map. The residual connection of one branch and
the norm of the next are one kernel. The result is that of :class:`~esvit_core.models.swin.SwinTransformer`, up to rounding
and to the random numbers of stochastic depth, which are drawn once for all blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor

from esvit_core.kernels.add_norm_triton import add_norm
from esvit_core.kernels.gelu_triton import gelu_linear
from esvit_core.kernels.half_linear import HalfLinear
from esvit_core.models.swin import PatchEmbed, PatchMerging, SwinBlock, SwinTransformer
from esvit_core.torch_private import outside_modes

Maps = tuple[tuple[int, int, int], ...]  # images, height and width of each kind of map, tokens


def views_and_regions_of_sizes(backbone: SwinTransformer, crops: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Compute view features (B, D) and regions (B, N, D) of each batch of crops (B, 3, H, W)."""
    side = backbone.patch_size
    maps: Maps = tuple((len(batch), batch.shape[2] // side, batch.shape[3] // side) for batch in crops)
    if not _is_supported(backbone, maps):
        return [backbone.views_and_regions(batch) for batch in crops]
    x, maps = _run_stages(backbone, _embed(backbone.patch_embed, crops, maps), maps)
    parts = x.split([_tokens((kind,)) for kind in maps])
    regions = [part.view(images, -1, x.shape[1]) for part, (images, _, _) in zip(parts, maps, strict=True)]
    return [(batch.mean(1), batch) for batch in regions]


def _is_supported(backbone: SwinTransformer, maps: Maps) -> bool:
    for stage in backbone._stages():
        for block in cast(list[SwinBlock], list(stage.blocks)):
            if not block.attn.supports_triton(_tokens(maps)) or not isinstance(block.mlp.fc2, HalfLinear):
                return False
        maps = _merged(maps)
    return True


def _tokens(maps: Maps) -> int:
    return sum(images * height * width for images, height, width in maps)


def _merged(maps: Maps) -> Maps:
    return tuple((images, -(-height // 2), -(-width // 2)) for images, height, width in maps)


def _embed(embed: PatchEmbed, crops: list[Tensor], maps: Maps) -> Tensor:
    """Embed patches with one product, (T, C); each output of the convolution is a product with its patch."""
    convolution, device = embed.proj, crops[0].device
    _, channels, side, _ = convolution.weight.shape
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else crops[0].dtype
    patches = torch.empty(_tokens(maps), channels * side**2, dtype=dtype, device=device)
    for rows, batch, kind in zip(patches.split([_tokens((kind,)) for kind in maps]), crops, maps, strict=True):
        images, height, width = kind
        batch = batch[:, :, : height * side, : width * side].unflatten(2, (height, side)).unflatten(4, (width, side))
        rows.view(images, height, width, channels, side, side).copy_(batch.permute(0, 2, 4, 1, 3, 5))
    x = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    return add_norm(x, None, None, _image_of_row(maps, device), embed.norm, torch.float32)[1]


def _run_stages(backbone: SwinTransformer, x: Tensor, maps: Maps) -> tuple[Tensor, Maps]:
    """Return the tokens after the last norm, (T, D), float32, and their maps."""
    scales = _draw_scales(backbone, sum(images for images, _, _ in maps), x.device)
    y: Tensor | None = None
    scale: Tensor | None = None
    for stage in backbone._stages():
        images = _image_of_row(maps, x.device)
        for block in cast(list[SwinBlock], list(stage.blocks)):
            own = next(scales), next(scales)
            run: Any = functools.partial(checkpoint, _run_block) if stage.grad_checkpointing else _run_block
            x, y = run(block, x, y, scale, own[0], images, maps)
            scale = own[1]
        if stage.downsample is not None:
            assert y is not None
            x, y = _merge(stage.downsample, _add(x, y, scale, images), maps), None
            maps = _merged(maps)
    images = _image_of_row(maps, x.device)
    return add_norm(x, y, scale, images, cast(torch.nn.LayerNorm, backbone.norm), torch.float32)[1], maps


def _run_block(
    block: SwinBlock, x: Tensor, y: Tensor | None, scale: Tensor | None, own: Tensor | None, images: Tensor, maps: Maps
) -> tuple[Tensor, Tensor]:
    """Add the branch ``y`` of the block before, and run the block up to its last branch, which the next one adds.

    Args:
        block: to run.
        x: residual stream, (T, C).
        y: (T, C); None: none.
        scale: factor of ``y`` for each image; None: 1.
        own: the same for the attention branch of this block.
        images: image of each row, (T,).
        maps: of the tokens.
    """
    mlp = block.mlp
    dtype = cast(HalfLinear, mlp.fc2).half_weight.dtype
    x, h = add_norm(x, y, scale, images, block.norm1, dtype)
    y = block.attn.proj(block.attn.attend_to_maps(block.attn.qkv(h), maps))
    x, h = add_norm(x, y, own, images, block.norm2, dtype)
    return x, gelu_linear(mlp.fc1(h), cast(HalfLinear, mlp.fc2))


def _draw_scales(backbone: SwinTransformer, images: int, device: torch.device) -> Iterator[Tensor | None]:
    """Yield the factors of the two branches of each block for each image, None where nothing is dropped."""
    blocks = [cast(SwinBlock, block) for stage in backbone._stages() for block in stage.blocks]
    keep = [1 - block.drop_path.drop_prob if block.drop_path.training else 1.0 for block in blocks for _ in range(2)]
    if min(keep) == 1:
        return (None for _ in keep)
    shares = outside_modes(_column, tuple(keep), device)
    scales = torch.bernoulli(shares.expand(-1, images)).div_(shares)  # (branches, images)
    return (None if share == 1 else row for share, row in zip(keep, scales, strict=True))


@functools.lru_cache(maxsize=16)
def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device="cpu")[:, None].to(device)


def _add(x: Tensor, y: Tensor, scale: Tensor | None, images: Tensor) -> Tensor:
    if scale is None:
        return x + y
    return x + y * scale.index_select(0, images)[:, None].to(y.dtype)


def _merge(merging: PatchMerging, x: Tensor, maps: Maps) -> Tensor:
    """Merge four neighboring tokens: (T, C) -> (T / 4, 2C)."""
    index, inverse = outside_modes(_neighbors, maps, x.device)
    x = _Gather.apply(x, index, inverse).view(-1, 4 * x.shape[1])
    norm = merging.norm
    half = merging.reduction.half_weight.dtype if isinstance(merging.reduction, HalfLinear) else x.dtype
    return merging.reduction(add_norm(x, None, None, index, norm, half)[1])


class _Gather(torch.autograd.Function):
    """Rows ``index`` of x (T, C), each at most once; row T is zero. The gradient is a lookup, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        x = F.pad(x, (0, 0, 0, 1)) if len(index) > len(x) else x
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


@functools.lru_cache(maxsize=64)
def _neighbors(maps: Maps, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the four tokens of each merged one, columns before rows, and where each token is among them."""
    tables, first, total = [], 0, _tokens(maps)
    for images, height, width in maps:
        tokens = np.arange(first, first + images * height * width).reshape(images, height, width)
        tokens = np.pad(tokens, ((0, 0), (0, height % 2), (0, width % 2)), constant_values=total)
        tokens = tokens.reshape(images, -(-height // 2), 2, -(-width // 2), 2)
        tables.append(tokens.transpose(0, 1, 3, 4, 2).ravel())
        first += images * height * width
    index = np.concatenate(tables)
    inverse = index.argsort(kind="stable")[:total]
    with torch.inference_mode(False):
        return torch.from_numpy(index).to(device), torch.from_numpy(inverse).to(device)


def _image_of_row(maps: Maps, device: torch.device) -> Tensor:
    return outside_modes(_cached_image_of_row, maps, device)


@functools.lru_cache(maxsize=64)
def _cached_image_of_row(maps: Maps, device: torch.device) -> Tensor:
    """Return the image of each token, counted over all maps, (T,), int32."""
    counts = np.concatenate([np.full(images, height * width) for images, height, width in maps])
    images = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    with torch.inference_mode(False):
        return torch.from_numpy(images).to(device)
