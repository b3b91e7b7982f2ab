"""Vision Longformer with the numerics of the published EsViT code (Zhang et al., 2021; microsoft/esvit).

Each stage is a patch embedding followed by alternating attention and MLP blocks. Early stages use sparse attention,
late stages full attention (:mod:`esvit_core.models.layers.longformer`). The global tokens of a stage are dropped before
the next one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from timm.layers import ClassifierHead, Mlp, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from esvit_core.models.layers.longformer import FullAttention, SparseAttention
from esvit_core.models.layers.resize import resize
from esvit_core.models.layers.stochastic_depth import StochasticDepth
from esvit_core.models.staged_backbone import StagedBackbone
from esvit_core.models.timm_entrypoints import default_cfg, register

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class AttnBlock(nn.Module):
    """Attention with a pre-norm and a residual connection."""

    def __init__(self, dim: int, attention: FullAttention | SparseAttention, drop: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.attn = attention
        self.drop_path = StochasticDepth(drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.drop_path(x, lambda x: self.attn(self.norm(x), height, width))


class MlpBlock(nn.Module):
    """MLP with a pre-norm and a residual connection."""

    def __init__(self, dim: int, mlp_ratio: float, drop: float) -> None:
        super().__init__()
        self.drop_path = StochasticDepth(drop)
        self.norm = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(x, lambda x: self.mlp(self.norm(x)))


class PatchEmbed(nn.Module):
    """Embed non-overlapping patches with a norm; add the stage's global tokens and the absolute positions of a ``grid``."""

    cls_token: nn.Parameter | None

    def __init__(
        self, patch_size: int, in_chans: int, dim: int, global_tokens: int, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm_embed = LayerNorm(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, global_tokens, dim)) if global_tokens else None
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if grid is not None:
            self.cls_pos_embed = nn.Parameter(torch.zeros(1, global_tokens, dim))
            self.x_pos_embed = nn.Parameter(torch.zeros(1, grid[0], dim // 2))
            self.y_pos_embed = nn.Parameter(torch.zeros(1, grid[1], dim // 2))
            for embed in (self.cls_pos_embed, self.x_pos_embed, self.y_pos_embed):
                trunc_normal_(embed, std=0.02)

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the absolute positions, (1, G + height * width, D)."""
        assert self.grid is not None
        rows, columns = self.grid
        x = self.x_pos_embed[:, :, None].expand(-1, -1, columns, -1)
        y = self.y_pos_embed[:, None].expand(-1, rows, -1, -1)
        positions = torch.cat((x, y), -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        tokens = self.cls_pos_embed.shape[1] + height * width
        if tokens != rows * columns:
            # As published: the side length is derived from a token count that includes the global token.
            scale = math.sqrt(tokens / (rows * columns))
            square = rows == columns and height == width and int(rows * scale) == height
            size: dict[str, Any] = {"scale_factor": scale} if square else {"size": (height, width)}
            positions = resize(positions, **size)
        return torch.cat((self.cls_pos_embed, positions.flatten(2).mT), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """(B, C, H, W) -> tokens (B, G + H' * W', D), H', W'."""
        x = self.proj(x)
        height, width = x.shape[-2:]
        x = self.norm_embed(x.flatten(2).mT)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        if self.grid is not None:
            x = x + self._positions(height, width)
        return x, height, width


@dataclass(frozen=True)
class StageSpec:
    """One stage of an architecture string such as ``l1,h3,d96,n2,s1,g1,p4,f7,a0``."""

    heads: int
    dim: int
    blocks: int
    sparse: bool
    global_tokens: int
    patch: int
    window: int
    absolute: bool


def parse_architecture(text: str) -> list[StageSpec]:
    """Parse a published architecture string: stages joined by ``_``, each a list of letters with numbers.

    Letters: heads h, width d, blocks n, sparse s, global tokens g, patch p, window f, absolute positions a. As
    published, every stage after one with full attention (``s0``) has full attention, too.

    Raises:
        ValueError: the string cannot be parsed, or it asks for pooled keys (``r1``), which no EsViT network has.
    """
    defaults = {"l": 1, "h": 3, "d": 192, "n": 1, "s": 1, "g": 1, "p": 2, "f": 7, "a": 1, "r": 0}
    stages: list[StageSpec] = []
    for i, part in enumerate(text.split("_")):
        items = [re.fullmatch(r"([a-z])(\d+)", item) for item in part.split(",")]
        given = {item[1]: int(item[2]) for item in items if item}
        if None in items or not given.keys() <= defaults.keys():
            raise ValueError(
                f"stage {i + 1}, {part!r}, of {text!r}: expected letters with numbers such as l1,h3,d96,n2"
            )
        values = defaults | given
        if values["r"]:
            raise ValueError(f"stage {i + 1} of {text}: expected r0 (pooled keys are not supported)")
        stages.append(
            StageSpec(
                heads=values["h"],
                dim=values["d"],
                blocks=values["n"],
                sparse=bool(values["s"]) and all(stage.sparse for stage in stages),
                global_tokens=values["g"],
                patch=values["p"],
                window=values["f"],
                absolute=bool(values["a"]),
            )
        )
    return stages


class VisionLongformer(StagedBackbone):
    """Multi-stage Vision Longformer.

    Args:
        arch: published architecture string, see :func:`parse_architecture`.
        img_size: side (or height and width) of the images that the network is built for, pixels; it accepts other sizes.
        in_chans: channels of an image.
        num_classes: outputs of the classifier; 0: no classifier, the forward pass returns the view feature.
        global_pool: pooling of :meth:`forward_head`: ``"avg"``, another pooling of timm, or ``""`` for none.
        mlp_ratio: ratio of the hidden width of the MLPs to their input width.
        qkv_bias: add a bias to queries, keys and values.
        mode: mode of the sparse attention, see :mod:`esvit_core.models.layers.longformer`.
        share_weights: global tokens use the attention weights of the local tokens (published: ``SHARE_W``).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; the rates rise linearly from 0.

    Raises:
        ValueError: the image is too small for the stages, or the architecture string is invalid.
    """

    def __init__(
        self,
        arch: str,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "avg",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mode: int = 1,
        share_weights: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.specs = specs = parse_architecture(arch)
        if specs[-1].global_tokens:
            raise ValueError(f"{arch}: expected g0 in the last stage, because its regions are averaged")
        self.mode = mode
        self.num_stages = len(specs)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.depths = tuple(spec.blocks for spec in specs)
        self.num_features = specs[-1].dim
        self.grad_checkpointing = False
        self.feature_info = []
        drops = iter(np.linspace(0, drop_path_rate, sum(self.depths)).tolist())
        height, width = to_2tuple(img_size)
        reduction = 1
        for i, spec in enumerate(specs):
            height, width, reduction = height // spec.patch, width // spec.patch, reduction * spec.patch
            if min(height, width) < 1:
                raise ValueError(f"img_size {img_size} is too small for the {len(specs)} stages of {arch}")
            grid, absolute, G = (height, width), spec.absolute, spec.global_tokens
            layers: list[nn.Module] = [PatchEmbed(spec.patch, in_chans, spec.dim, G, grid if absolute else None)]
            for _ in range(spec.blocks):
                attention: FullAttention | SparseAttention = (
                    SparseAttention(spec.dim, spec.heads, spec.window, G, qkv_bias, mode, not absolute, share_weights)
                    if spec.sparse
                    else FullAttention(spec.dim, spec.heads, grid, G, qkv_bias, not absolute)
                )
                drop = next(drops)
                layers += [AttnBlock(spec.dim, attention, drop), MlpBlock(spec.dim, mlp_ratio, drop)]
            setattr(self, f"layer{i + 1}", nn.ModuleList(layers))
            self.feature_info.append({"num_chs": spec.dim, "reduction": reduction, "module": f"layer{i + 1}"})
            in_chans = spec.dim
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

    def set_mode(self, mode: int) -> None:
        """Set the mode of the sparse attention."""
        for module in self.modules():
            if isinstance(module, SparseAttention):
                module.mode = mode

    def _embed(self, stage: int, x: Tensor) -> tuple[Tensor, int, int]:
        return cast(nn.ModuleList, getattr(self, f"layer{stage + 1}"))[0](x)

    def _pairs(self, stage: int) -> list[tuple[AttnBlock, MlpBlock]]:
        layers = list(cast(nn.ModuleList, getattr(self, f"layer{stage + 1}")))
        return cast(list[tuple[AttnBlock, MlpBlock]], list(zip(layers[1::2], layers[2::2], strict=True)))

    def _forward_stage(self, stage: int, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the tokens (B, G + N, C) after each block, and the last map (B, C, H, W)."""
        tokens, height, width = self._embed(stage, x)
        outputs = []
        for attention, mlp in self._pairs(stage):
            if self.grad_checkpointing:
                tokens = checkpoint(lambda t, a=attention, m=mlp: m(a(t, height, width)), tokens)
            else:
                tokens = mlp(attention(tokens, height, width))
            outputs.append(tokens)
        local = tokens[:, self.specs[stage].global_tokens :]
        return outputs, local.mT.unflatten(2, (height, width))

    # timm's interface

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^layer1\.0", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the regions after the last norm, (B, H, W, D)."""
        for stage in range(len(self.specs)):
            _, x = self._forward_stage(stage, x)
        return self.norm(x.permute(0, 2, 3, 1))

    def run_stages(self, x: Tensor, stages: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Run the stages; each yields the map of its last block only, without global tokens."""
        for stage in range(stages):
            _, x = self._forward_stage(stage, x)
            y = x.permute(0, 2, 3, 1)
            yield [y], y

    def keep_stages(self, stages: int) -> None:
        for i in range(stages, self.num_stages):
            delattr(self, f"layer{i + 1}")
        self.specs = self.specs[:stages]

    # EsViT's interface

    def view_and_last_blocks(self, x: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
        """Return the view feature (B, D) of :meth:`forward` and the linear-probe feature (B, D') in one pass.

        The linear-probe feature concatenates the first global token of the last ``n`` blocks; blocks without global
        tokens contribute the average of their regions.
        """
        outputs = []
        for stage, spec in enumerate(self.specs):
            tokens, x = self._forward_stage(stage, x)
            for y in tokens:
                y = self.norm(y) if stage == len(self.specs) - 1 else y
                outputs.append(y[:, 0] if spec.global_tokens else y.mean(1))
        return self.forward_head(self.norm(x.permute(0, 2, 3, 1))), torch.cat(outputs[-n:], -1)

    def last_attention(self, x: Tensor) -> Tensor:
        """Return the attention of the last block, which must have full attention, (B, heads, N, N)."""
        return self._last_attention(x)[0]

    def _last_attention(self, x: Tensor) -> tuple[Tensor, int, int]:
        final = len(self.specs) - 1
        for stage in range(final):
            _, x = self._forward_stage(stage, x)
        tokens, height, width = self._embed(final, x)
        *pairs, (last, _) = self._pairs(final)
        for attention, mlp in pairs:
            tokens = mlp(attention(tokens, height, width))
        if not isinstance(last.attn, FullAttention):
            raise ValueError("attention is only available for networks whose last stage has full attention (s0)")
        return last.attn.weights(last.norm(tokens), height, width), height, width

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention that each region receives, averaged over all queries, (B, heads, H, W)."""
        weights, height, width = self._last_attention(x)
        return weights.mean(-2).unflatten(-1, (height, width))


def switch_mode_(backbone: nn.Module, mode_switch: float, epoch: int, epochs: int) -> None:
    """Set the attention mode of a Vision Longformer for an epoch; other networks do not change.

    Random neighbors (a mode above 0) end after the fraction ``mode_switch`` of the epochs, as in
    microsoft/vision-longformer. EsViT's published code has the setting (``VIL_MODE_SWITCH``) but never reads it: every
    epoch has the initial mode, which corresponds to a ``mode_switch`` of 1 here.
    """
    if isinstance(backbone, VisionLongformer) and backbone.mode > 0:
        backbone.set_mode(0 if epoch >= mode_switch * epochs else backbone.mode)


_NETWORKS: dict[str, dict[str, Any]] = {
    "esvit_vil_2262": {
        "arch": "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_"
        "l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0",
    },
    # The published vil_small/base.yaml, which has absolute positions.
    "esvit_vil_1281": {
        "arch": "l1,h3,d96,n1,s1,g1,p4,f7_l2,h3,d192,n2,s1,g1,p2,f7_l3,h6,d384,n8,s0,g1,p2,f7_"
        "l4,h12,d768,n1,s0,g0,p2,f7",
        "mode": 0,
    },
}

default_cfgs = generate_default_cfgs({name: default_cfg(first_conv="layer1.0.proj") for name in _NETWORKS})

for _name, _values in _NETWORKS.items():
    register(__name__, VisionLongformer, _name, **_values)
