"""CvT with windows, as the published EsViT code has it (Wu et al., 2021; microsoft/esvit).

The published network differs from the paper:

* Attention logits are scaled by the width of the stage, not by that of a head.
* Queries, keys and values come from a 3 x 3 depth-wise convolution with batch norm over the map, which is padded to
  whole windows first. The window shrinks to a smaller map. No mask hides the padding.
* Layer norms use eps 1e-5 and the activation is QuickGELU.

All maps are (B, H, W, C): 1 x 1 convolutions are computed as linear layers, and depth-wise convolutions get
channels-last memory. The weights keep the published shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, QuickGELU, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from esvit_core.kernels import window_attention
from esvit_core.kernels.half_linear import PointwiseConv
from esvit_core.kernels.window_attention import attend_in_windows
from esvit_core.models.layers.attention import attend
from esvit_core.models.layers.stochastic_depth import StochasticDepth
from esvit_core.models.layers.windows import window_layout
from esvit_core.models.staged_backbone import StagedBackbone
from esvit_core.models.timm_entrypoints import default_cfg, register

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-5)


class DepthWiseConv(nn.Module):
    """Depth-wise 3 x 3 convolution, batch norm, 1 x 1 convolution, on (B, H, W, C)."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool) -> None:
        super().__init__()
        self.dw = nn.Conv2d(in_dim, in_dim, 3, padding=1, groups=in_dim, bias=False)
        self.bn = nn.BatchNorm2d(in_dim)
        self.pw = PointwiseConv(in_dim, out_dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.bn(self.dw(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class Attention(nn.Module):
    """Multi-head attention within windows.

    Attributes:
        use_c_kernel: use the C kernel for shapes it supports; :mod:`esvit_core.kernels.choose` sets it.
    """

    use_c_kernel = False

    def __init__(self, dim: int, num_heads: int, window_size: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.scale = dim**-0.5
        self.qkv = DepthWiseConv(dim, 3 * dim, qkv_bias)
        self.proj_out = PointwiseConv(dim, dim)

    def _window(self, x: Tensor) -> int:
        return min(self.window_size, *x.shape[1:3])

    def _qkv(self, x: Tensor, w: int) -> Tensor:
        """Return queries, keys and values of the map, padded to whole windows, (B, H', W', 3C)."""
        return self.qkv(F.pad(x, (0, 0, 0, -x.shape[2] % w, 0, -x.shape[1] % w)))

    def _windows(self, qkv: Tensor, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partition into queries, keys and values, each (B, rows, columns, heads, window ** 2, C / heads)."""
        qkv = qkv.unflatten(1, (-1, w)).unflatten(3, (-1, w)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).unbind(0)
        return q, k, v

    def _map(self, windows: Tensor, height: int, width: int, w: int) -> Tensor:
        """Merge windows: (B, rows, columns, heads, window ** 2, C / heads) -> (B, height, width, C)."""
        x = windows.unflatten(4, (w, w)).permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, w, columns, w, heads, d)
        return x.flatten(5).flatten(3, 4).flatten(1, 2)[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        w = self._window(x)
        qkv = self._qkv(x, w)
        tokens = qkv.flatten(1, 2)
        if self.use_c_kernel and window_attention.supports(tokens, self.num_heads, w * w):
            index = window_layout(qkv.shape[1], qkv.shape[2], w, 0, x.device).token_index
            out = attend_in_windows(tokens, self.num_heads, None, index, None, None, self.scale)
            return self.proj_out(out.unflatten(1, qkv.shape[1:3])[:, :H, :W])
        q, k, v = self._windows(qkv, w)
        out = attend(q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2), None, self.scale)
        return self.proj_out(self._map(out.view(q.shape), H, W, w))

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights, (B, rows, columns, heads, N, N)."""
        w = self._window(x)
        q, k, _ = self._windows(self._qkv(x, w), w)
        return (q @ k.mT * self.scale).softmax(-1)

    def received(self, x: Tensor) -> Tensor:
        """Return the attention that each position receives, averaged over its window's queries, (B, heads, H, W).

        Queries in the padding do not count.
        """
        w = self._window(x)
        real = F.pad(x.new_ones(x.shape[1:3]), (0, -x.shape[2] % w, 0, -x.shape[1] % w))
        real = real.unflatten(0, (-1, w)).unflatten(2, (-1, w)).transpose(1, 2).flatten(2)  # (rows, columns, N)
        real = real[None, :, :, None, :, None]
        mean = (self.weights(x) * real).sum(-2) / real.sum(-2)  # (B, rows, columns, heads, N)
        return self._map(mean[..., None], x.shape[1], x.shape[2], w).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    """Two layers with a QuickGELU between them.

    Attributes:
        fold_activation: fold QuickGELU's factor into the layers; :mod:`esvit_core.kernels.choose` sets it.
    """

    fold_activation = False

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.net = nn.Sequential(PointwiseConv(dim, hidden), QuickGELU(), PointwiseConv(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        if not self.fold_activation:
            return self.net(x)
        # x sigmoid(1.702 x) = silu(1.702 x) / 1.702: one pass over the wide map instead of three
        first, _, second = cast(tuple[PointwiseConv, nn.Module, PointwiseConv], self.net)
        x = F.silu(first.linear(x, 1.702 * first.weight.flatten(1), 1.702 * cast(Tensor, first.bias)))
        return second.linear(x, second.weight.flatten(1) / 1.702, second.bias)


class PreNorm(nn.Module):
    """Apply a layer norm, then a module."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Transformer(nn.Module):
    """The blocks of a stage: attention and MLP with stochastic depth."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: Sequence[float],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, num_heads, window_size, qkv_bias)),
                    PreNorm(dim, FeedForward(dim, mlp_ratio)),
                    DropPath(drop),  # does not skip dropped images: the batch norms need all of them
                    StochasticDepth(drop),
                ]
            )
            for drop in drop_path
        )
        self.grad_checkpointing = False

    def block(self, i: int, x: Tensor) -> Tensor:
        attention, feed_forward, drop_path, stochastic_depth = cast(nn.ModuleList, self.layers[i])
        x = x + drop_path(attention(x))
        return stochastic_depth(x, feed_forward)

    def forward_blocks(self, x: Tensor) -> list[Tensor]:
        """Return the output of every block, each (B, H, W, C)."""
        outputs = []
        for i in range(len(self.layers)):
            x = checkpoint(functools.partial(self.block, i), x) if self.grad_checkpointing else self.block(i, x)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_blocks(x)[-1]

    def before_last_attention(self, x: Tensor) -> tuple[Attention, Tensor]:
        """Return the attention module of the last block and its input."""
        for i in range(len(self.layers) - 1):
            x = self.block(i, x)
        last = cast(PreNorm, cast(nn.ModuleList, self.layers[-1])[0])
        return cast(Attention, last.fn), last.norm(x)


class ConvEmbed(nn.Module):
    """Embed overlapping patches of images (B, C, H, W) or maps (B, H, W, C) with a strided convolution and a norm."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, padding: int, first: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding)
        self.norm = LayerNorm(dim)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class CvT(StagedBackbone):
    """Convolutional vision transformer with window attention.

    Args:
        img_size: accepted for the interface; the network takes any resolution.
        in_chans: channels of an image.
        num_classes: outputs of the classifier; 0: no classifier, the forward pass returns the view feature.
        global_pool: pooling of :meth:`forward_head`: ``"avg"``, another pooling of timm, or ``""`` for none.
        dims: width of each stage.
        depths: number of blocks in each stage.
        num_heads: attention heads of each stage.
        window_size: side of a window, tokens.
        mlp_ratio: ratio of the hidden width of the MLPs to their input width.
        qkv_bias: add a bias to queries, keys and values.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: the lists differ in length, or a number of heads does not divide a width.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 3, 6, 12),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(
                f"dims {tuple(dims)}, depths {tuple(depths)} and num_heads {tuple(num_heads)} differ in length"
            )
        if any(dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(f"num_heads {tuple(num_heads)} do not divide the widths {tuple(dims)}")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.depths = tuple(depths)
        self.num_features = dims[-1]
        self.num_stages = len(dims)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stage{i}"} for i, dim in enumerate(dims)
        ]
        drops = np.split(np.linspace(0, drop_path_rate, sum(depths)), np.cumsum(depths)[:-1])
        for i, dim in enumerate(dims):
            embed = ConvEmbed(in_chans, dim, 7, 4, 2, True) if i == 0 else ConvEmbed(dims[i - 1], dim, 3, 2, 1, False)
            blocks = Transformer(dim, num_heads[i], window_size, mlp_ratio, qkv_bias, drops[i].tolist())
            setattr(self, f"stage{i}", nn.Sequential(embed, blocks))
        self.norm = LayerNorm(dims[-1])
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC")
        self.head_hidden_size = self.head.num_features
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _stages(self) -> list[tuple[ConvEmbed, Transformer]]:
        stages = (cast(nn.Sequential, getattr(self, f"stage{i}")) for i in range(self.num_stages))
        return [(cast(ConvEmbed, stage[0]), cast(Transformer, stage[1])) for stage in stages]

    # timm's interface

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last = (r"^norm", (99999,))
        fine = [(r"^stage(\d+)\.1\.layers\.(\d+)", None), (r"^stage(\d+)\.0", (-1,)), last]
        return {"stem": r"^stage0\.0", "blocks": [(r"^stage(\d+)", None), last] if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for _, blocks in self._stages():
            blocks.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the regions after the last norm, (B, H, W, D)."""
        for embed, blocks in self._stages():
            x = blocks(embed(x))
        return self.norm(x)

    def run_stages(self, x: Tensor, stages: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        for embed, transformer in self._stages()[:stages]:
            blocks = transformer.forward_blocks(embed(x))
            x = blocks[-1]
            yield blocks, x

    def keep_stages(self, stages: int) -> None:
        for i in range(stages, self.num_stages):
            delattr(self, f"stage{i}")

    # EsViT's interface

    def _before_last_attention(self, x: Tensor) -> tuple[Attention, Tensor]:
        *stages, (last_embed, last_blocks) = self._stages()
        for embed, blocks in stages:
            x = blocks(embed(x))
        return last_blocks.before_last_attention(last_embed(x))

    def last_attention(self, x: Tensor) -> Tensor:
        """Return the attention of the last block, (B * windows, heads, N, N)."""
        attention, x = self._before_last_attention(x)
        return attention.weights(x).flatten(0, 2)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention that each region receives, averaged over the queries of its window, (B, heads, H, W)."""
        attention, x = self._before_last_attention(x)
        return attention.received(x)


# The published configurations s1 and s3.
_NETWORKS: dict[str, dict[str, Any]] = {
    "esvit_cvt_tiny": {"dims": (64, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (1, 3, 6, 12)},
    "esvit_cvt_small": {"dims": (64, 128, 256, 512), "depths": (2, 2, 10, 4), "num_heads": (2, 4, 8, 16)},
}

default_cfgs = generate_default_cfgs({name: default_cfg(first_conv="stage0.0.proj") for name in _NETWORKS})

for _name, _values in _NETWORKS.items():
    register(__name__, CvT, _name, **_values)
