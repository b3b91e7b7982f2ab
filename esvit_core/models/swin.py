"""Swin transformer with the numerics of the published EsViT code (Liu et al., 2021; microsoft/esvit).

The published network differs from stock implementations:

* Layer norms use eps 1e-6, and patch merging is the last step of a stage.
* A map that is not a multiple of the window size is padded after the first norm. No mask hides the padding, so every
  query also attends to padding tokens, whose query, key and value are the bias of the ``qkv`` layer.
* The window and shift of a stage depend on the resolution it was *built* for and apply to every other resolution: a
  stage built for 14 x 14 still shifts on the 6 x 6 map of a local crop.
* Odd maps are padded in patch merging.

All maps are (B, H, W, C).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, Mlp, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from esvit_core.models.layers.activation_checkpointing import checkpoint_activation
from esvit_core.models.layers.stochastic_depth import StochasticDepth
from esvit_core.models.layers.windows import WindowAttention
from esvit_core.models.staged_backbone import StagedBackbone
from esvit_core.models.timm_entrypoints import default_cfg, register

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class SwinBlock(nn.Module):
    """Window attention and MLP, each with a pre-norm and a residual connection."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, shift_size: int, mlp_ratio: float, qkv_bias: bool, drop: float
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, shift_size, qkv_bias)
        self.drop_path = StochasticDepth(drop)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.drop_path(x, self._attention), self._mlp)

    def _attention(self, x: Tensor) -> Tensor:
        return checkpoint_activation(self.norm1, x, self.attn)

    def _mlp(self, x: Tensor) -> Tensor:
        h = checkpoint_activation(self.norm2, x, self.mlp.fc1)
        return checkpoint_activation(self.mlp.act, h, self.mlp.fc2)


class PatchMerging(nn.Module):
    """Merge four neighboring tokens into one of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = x.view(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(B, (H + 1) // 2, (W + 1) // 2, 4 * C)  # columns before rows
        return self.reduction(self.norm(x))


def window_and_shift(resolution: tuple[int, int], window_size: int, block: int) -> tuple[int, int]:
    """Return window and shift of a block for the resolution that its stage is built for."""
    if min(resolution) <= window_size:  # one window covers the whole map: no shift
        return min(resolution), 0
    return window_size, window_size // 2 * (block % 2)


class SwinStage(nn.Module):
    """Blocks at one resolution, followed by patch merging."""

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: Sequence[float],
        downsample: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, *window_and_shift(resolution, window_size, i), mlp_ratio, qkv_bias, drop)
            for i, drop in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if downsample else None
        self.grad_checkpointing = False

    def forward_blocks(self, x: Tensor) -> list[Tensor]:
        """Return the output of every block, each (B, H, W, C)."""
        outputs = []
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            outputs.append(x)
        return outputs

    def merge(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.forward_blocks(x)[-1])


class PatchEmbed(nn.Module):
    """Embed non-overlapping patches with a convolution and a norm."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SwinTransformer(StagedBackbone):
    """Swin transformer of any depth and width.

    Args:
        img_size: side (or height and width) of the images that the network is built for, pixels; it accepts other sizes.
        patch_size: side of a patch, pixels.
        in_chans: channels of an image.
        num_classes: outputs of the classifier; 0: no classifier, the forward pass returns the view feature.
        global_pool: pooling of :meth:`forward_head`: ``"avg"``, another pooling of timm, or ``""`` for none.
        embed_dim: width of the first stage; each stage doubles it.
        depths: number of blocks in each stage.
        num_heads: attention heads of each stage.
        window_size: side of a window, tokens.
        mlp_ratio: ratio of the hidden width of the MLPs to their input width.
        qkv_bias: add a bias to queries, keys and values.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: the image is too small for the stages, or a number of heads does not divide a width.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_stages = stages = len(depths)
        if len(num_heads) != stages:
            raise ValueError(
                f"depths and num_heads need one entry per stage, got {tuple(depths)} and {tuple(num_heads)}"
            )
        if any(embed_dim * 2**i % heads for i, heads in enumerate(num_heads)):
            raise ValueError(f"num_heads {tuple(num_heads)} do not divide the widths of embed_dim {embed_dim}")
        self.patch_size = patch_size
        self.window_size = window_size
        resolutions = self._resolutions(img_size, stages)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.depths = tuple(depths)
        self.embed_dim = embed_dim
        self.num_features = embed_dim * 2 ** (stages - 1)
        self.feature_info = [
            {"num_chs": embed_dim * 2**i, "reduction": patch_size * 2**i, "module": f"layers.{i}"}
            for i in range(stages)
        ]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        drops = np.split(np.linspace(0, drop_path_rate, sum(depths)), np.cumsum(depths)[:-1])
        self.layers = nn.ModuleList(
            SwinStage(
                embed_dim * 2**i,
                resolutions[i],
                num_heads[i],
                window_size,
                mlp_ratio,
                qkv_bias,
                drops[i].tolist(),
                downsample=i < stages - 1,
            )
            for i in range(stages)
        )
        self.norm = LayerNorm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC")
        self.head_hidden_size = self.head.num_features
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _resolutions(self, img_size: int | tuple[int, int], stages: int) -> list[tuple[int, int]]:
        """Return height and width of each stage's map, in tokens."""
        height, width = (side // self.patch_size for side in to_2tuple(img_size))
        if min(height, width) >> (stages - 1) < 1:
            raise ValueError(f"img_size {img_size} is too small for {stages} stages of patch_size {self.patch_size}")
        return [(height // 2**i, width // 2**i) for i in range(stages)]

    def _stages(self) -> list[SwinStage]:
        return cast(list[SwinStage], list(self.layers))

    # timm's interface

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last = (r"^norm", (99999,))
        fine = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (99999,)), last]
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), last] if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self._stages():
            stage.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int], window_size: int | None = None) -> None:
        """Resize windows, shifts and bias tables to those of a network that is built for ``img_size`` pixels."""
        resolutions = self._resolutions(img_size, len(self.layers))
        self.window_size = window_size or self.window_size
        for stage, resolution in zip(self._stages(), resolutions, strict=True):
            for i, block in enumerate(cast(list[SwinBlock], list(stage.blocks))):
                block.attn.set_window(*window_and_shift(resolution, self.window_size, i))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the regions after the last norm, (B, H, W, D)."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def run_stages(self, x: Tensor, stages: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        x = self.patch_embed(x)
        for stage in self._stages()[:stages]:
            blocks = stage.forward_blocks(x)
            x = stage.merge(blocks[-1])
            yield blocks, x

    def keep_stages(self, stages: int) -> None:
        self.layers = self.layers[:stages]
        self._stages()[-1].downsample = None

    # EsViT's interface

    def _before_last_attention(self, x: Tensor) -> tuple[WindowAttention, Tensor]:
        x = self.patch_embed(x)
        *stages, final = self._stages()
        for stage in stages:
            x = stage(x)
        *blocks, last = cast(list[SwinBlock], list(final.blocks))
        for block in blocks:
            x = block(x)
        return last.attn, last.norm1(x)

    def last_attention(self, x: Tensor) -> Tensor:
        """Return the attention of the last block, (B * windows, heads, N, N)."""
        attention, x = self._before_last_attention(x)
        return attention.weights(x).flatten(0, 1)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention that each region receives, averaged over the queries of its window, (B, heads, H, W)."""
        attention, x = self._before_last_attention(x)
        layout = attention.layout(x)
        weights = attention.weights(x)  # (B, windows, heads, N, N)
        real = weights.new_ones(layout.index.shape)
        if layout.padding is not None:
            real.index_fill_(0, layout.padding, 0)
        real = real.view(1, layout.windows, 1, -1, 1)
        received = (weights * real).sum(3) / real.sum(3)  # (B, windows, heads, N)
        received = received.transpose(1, 2).flatten(2)[..., layout.inverse]  # (B, heads, L)
        return received.unflatten(2, x.shape[1:3])


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
_NETWORKS = {"esvit_swin": _SIZES["tiny"]} | {
    f"esvit_swin_{size}_window{window}": {**values, "window_size": window}
    for size, values in _SIZES.items()
    for window in (7, 14)
}

default_cfgs = generate_default_cfgs({name: default_cfg() for name in _NETWORKS})

for _name, _values in _NETWORKS.items():
    register(__name__, SwinTransformer, _name, **_values)
