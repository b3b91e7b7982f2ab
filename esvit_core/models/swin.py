"""Swin transformer with the numerics of the published EsViT code (Liu et al., 2021; microsoft/esvit).

What the published network does, and stock implementations do not:

* Layer norms use eps 1e-6, and patch merging is the last step of a stage.
* A map that is not a multiple of the window is padded after the first norm; no mask hides the padding, so every
  query also sees its tokens, whose query, key and value are the bias of the ``qkv`` layer.
* Window and shift of a stage follow from the resolution it was *built* for and hold for every other resolution: a
  stage built for 14 x 14 still shifts on the 6 x 6 map of a local crop.
* Odd maps are padded in patch merging.

Maps are (B, H, W, C) throughout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, Mlp, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from esvit_core.models.layers.activation_checkpointing import without_keeping
from esvit_core.models.layers.stochastic_depth import StochasticDepth
from esvit_core.models.layers.windows import WindowAttention
from esvit_core.models.timm_entrypoints import default_cfg, register

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class SwinBlock(nn.Module):
    """Window attention and MLP, each with a norm before and a residual connection around."""

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
        return without_keeping(self.norm1, x, self.attn)

    def _mlp(self, x: Tensor) -> Tensor:
        h = without_keeping(self.norm2, x, self.mlp.fc1)
        return without_keeping(self.mlp.act, h, self.mlp.fc2)


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

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
    """Window and shift of a stage's block, by the resolution that the stage is built for."""
    if min(resolution) <= window_size:  # the whole map in one window: no shift
        return min(resolution), 0
    return window_size, window_size // 2 * (block % 2)


class SwinStage(nn.Module):
    """Blocks of one resolution, then patch merging."""

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
        """The output of every block, each (B, H, W, C)."""
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
    """Non-overlapping patches through a convolution and a norm."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SwinTransformer(nn.Module):
    """Swin transformer of any depth and width.

    Args:
        img_size: side (or height and width) of the images it is built for, pixels; others can be fed.
        patch_size: side of a patch, pixels.
        in_chans: channels of an image.
        num_classes: outputs of the classifier; 0: none, the forward pass gives the view feature.
        global_pool: pooling of :meth:`forward_head`: ``"avg"``, another of timm's, or ``""`` for none.
        embed_dim: width of the first stage; each stage doubles it.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: side of a window, tokens.
        mlp_ratio: hidden width of the MLPs over their width.
        qkv_bias: bias in the layers of queries, keys and values.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: the image is too small for the stages, or heads do not divide a width.
    """

    output_fmt = "NHWC"

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
        stages = len(depths)
        if len(num_heads) != stages:
            raise ValueError(f"depths and num_heads need one entry a stage, got {tuple(depths)} and {tuple(num_heads)}")
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
        self.norm: nn.Module = LayerNorm(self.num_features)
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
        """Height and width of each stage's map, tokens."""
        height, width = (side // self.patch_size for side in to_2tuple(img_size))
        if min(height, width) >> (stages - 1) < 1:
            raise ValueError(f"img_size {img_size} is too small for {stages} stages of patch_size {self.patch_size}")
        return [(height // 2**i, width // 2**i) for i in range(stages)]

    def _stages(self) -> list[SwinStage]:
        return cast(list[SwinStage], list(self.layers))

    # timm's interface

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that are to be spared beside biases and norms: none, the published recipe decays the tables."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last = (r"^norm", (99999,))
        fine = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (99999,)), last]
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), last] if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self._stages():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def set_input_size(self, img_size: int | tuple[int, int], window_size: int | None = None) -> None:
        """Give windows, shifts and bias tables the sizes of a network that is built for ``img_size`` pixels."""
        resolutions = self._resolutions(img_size, len(self.layers))
        self.window_size = window_size or self.window_size
        for stage, resolution in zip(self._stages(), resolutions, strict=True):
            for i, block in enumerate(cast(list[SwinBlock], list(stage.blocks))):
                block.attn.set_window(*window_and_shift(resolution, self.window_size, i))

    def forward_features(self, x: Tensor) -> Tensor:
        """Regions after the last norm, (B, H, W, D)."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """View feature (B, D), or class logits, of regions (B, H, W, D)."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of the stages before patch merging, as in timm's models.

        Returns:
            The maps of the chosen stages (B, C, H, W); before them, unless ``intermediates_only``, the regions.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt}: expected NCHW or NHWC")
        chosen, last = feature_take_indices(len(self.layers), indices)
        maps = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self._stages()[: last + 1 if stop_early else None]):
            x = stage.forward_blocks(x)[-1]
            if i in chosen:
                y = self.norm(x) if norm and i == len(self.layers) - 1 else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
            x = stage.merge(x)
        if intermediates_only:
            return maps
        return (self.norm(x) if i == len(self.layers) - 1 else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need, as in timm's models.

        Returns:
            The chosen stages, counted from the first.
        """
        chosen, last = feature_take_indices(len(self.layers), indices)
        shortened = last < len(self.layers) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.layers = self.layers[: last + 1]
            self._stages()[-1].downsample = None
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return chosen

    # EsViT's interface

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """View features (B, D) and regions (B, N, D)."""
        regions = self.forward_features(x).flatten(1, 2)  # (B, N, D)
        return regions.mean(1), regions

    def last_blocks(self, x: Tensor, n: int = 4) -> Tensor:
        """The linear-probe feature: averages of the last ``n`` blocks, concatenated; only the last stage is normed."""
        return self.view_and_last_blocks(x, n)[1]

    def view_and_last_blocks(self, x: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
        """View feature (B, D), as of :meth:`forward`, and linear-probe feature (B, D') in one pass."""
        outputs = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self._stages()):
            blocks = stage.forward_blocks(x)
            outputs += [self.norm(y) if i == len(self.layers) - 1 else y for y in blocks]
            x = stage.merge(blocks[-1])
        return self.forward_head(outputs[-1]), torch.cat([y.mean((1, 2)) for y in outputs[-n:]], -1)

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
        """Attention of the last block, (B * windows, heads, N, N)."""
        attention, x = self._before_last_attention(x)
        return attention.weights(x).flatten(0, 1)

    def attention_map(self, x: Tensor) -> Tensor:
        """Attention that each region receives, averaged over the queries of its window, (B, heads, H, W)."""
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
