"""Vision Longformer with the numerics of the published EsViT code (Zhang et al., 2021; microsoft/esvit).

Stages of alternating attention and MLP blocks behind a patch embedding; the early stages attend sparsely, the late
ones fully (:mod:`esvit_core.models.longformer`). The global token of a stage is dropped before the next.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from esvit_core.models.entrypoints import default_cfg, register
from esvit_core.models.longformer import FullAttention, SparseAttention

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class AttnBlock(nn.Module):
    """Attention with a norm before and a residual connection around."""

    def __init__(self, dim: int, attention: FullAttention | SparseAttention, drop: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.drop_path(self.attn(self.norm(x), height, width))


class MlpBlock(nn.Module):
    """MLP with a norm before and a residual connection around."""

    def __init__(self, dim: int, mlp_ratio: float, drop: float) -> None:
        super().__init__()
        self.drop_path = DropPath(drop) if drop > 0 else nn.Identity()
        self.norm = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, a norm, and the global tokens of the stage."""

    cls_token: nn.Parameter | None

    def __init__(self, patch_size: int, in_chans: int, dim: int, global_tokens: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm_embed = LayerNorm(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, global_tokens, dim)) if global_tokens else None
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """(B, C, H, W) -> tokens (B, G + H' * W', D), H', W'."""
        x = self.proj(x)
        height, width = x.shape[-2:]
        x = self.norm_embed(x.flatten(2).mT)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
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


def parse_architecture(text: str) -> list[StageSpec]:
    """Read a published architecture string: stages joined by ``_``, each a list of letters with numbers.

    Raises:
        ValueError: absolute position embeddings (``a1``) or pooled keys (``r1``), which no EsViT network has.
    """
    stages = []
    for i, part in enumerate(text.split("_")):
        given = {item[0]: int(item[1:]) for item in part.split(",")}
        values = {"h": 3, "d": 192, "n": 1, "s": 1, "g": 1, "p": 2, "f": 7, "a": 1, "r": 0} | given
        if values["a"] or values["r"]:
            raise ValueError(f"stage {i + 1} of {text}: expected a0 (relative positions) and r0")
        stages.append(
            StageSpec(
                heads=values["h"],
                dim=values["d"],
                blocks=values["n"],
                sparse=bool(values["s"]),
                global_tokens=values["g"],
                patch=values["p"],
                window=values["f"],
            )
        )
    return stages


class VisionLongformer(nn.Module):
    """Multi-stage Vision Longformer.

    Args:
        arch: published architecture string, see :func:`parse_architecture`.
        img_size: side (or height and width) of the pictures it is built for, pixels; others can be fed.
        in_chans: channels of a picture.
        num_classes: outputs of the classifier; 0: none, the forward pass gives the view feature.
        global_pool: ``"avg"``, or ``""`` for no pooling in :meth:`forward_head`.
        mlp_ratio: hidden width of the MLPs over their width.
        qkv_bias: bias in the layers of queries, keys and values.
        mode: of the sparse attention, see the module.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        ValueError: the picture is too small for the stages, or the architecture is not one of these.
    """

    output_fmt = "NHWC"

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
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.specs = specs = parse_architecture(arch)
        if specs[-1].global_tokens:
            raise ValueError(f"{arch}: expected g0 in the last stage, whose regions are averaged")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.depths = tuple(spec.blocks for spec in specs)
        self.num_features = self.head_hidden_size = specs[-1].dim
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = []
        drops = iter(np.linspace(0, drop_path_rate, sum(self.depths)).tolist())
        height, width = to_2tuple(img_size)
        reduction = 1
        for i, spec in enumerate(specs):
            height, width, reduction = height // spec.patch, width // spec.patch, reduction * spec.patch
            if min(height, width) < 1:
                raise ValueError(f"img_size {img_size} is too small for the {len(specs)} stages of {arch}")
            layers: list[nn.Module] = [PatchEmbed(spec.patch, in_chans, spec.dim, spec.global_tokens)]
            for _ in range(spec.blocks):
                attention: FullAttention | SparseAttention
                if spec.sparse:
                    attention = SparseAttention(spec.dim, spec.heads, spec.window, spec.global_tokens, qkv_bias, mode)
                else:
                    attention = FullAttention(spec.dim, spec.heads, (height, width), spec.global_tokens, qkv_bias)
                drop = next(drops)
                layers += [AttnBlock(spec.dim, attention, drop), MlpBlock(spec.dim, mlp_ratio, drop)]
            setattr(self, f"layer{i + 1}", nn.ModuleList(layers))
            self.feature_info.append({"num_chs": spec.dim, "reduction": reduction, "module": f"layer{i + 1}"})
            in_chans = spec.dim
        self.norm = LayerNorm(self.num_features)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def set_mode(self, mode: int) -> None:
        """Change the mode of the sparse attention, see the module (published: ``VIL_MODE_SWITCH``)."""
        for module in self.modules():
            if isinstance(module, SparseAttention):
                module.mode = mode

    def _embed(self, stage: int, x: Tensor) -> tuple[Tensor, int, int]:
        return cast(nn.ModuleList, getattr(self, f"layer{stage + 1}"))[0](x)

    def _pairs(self, stage: int) -> list[tuple[AttnBlock, MlpBlock]]:
        layers = list(cast(nn.ModuleList, getattr(self, f"layer{stage + 1}")))
        return cast(list[tuple[AttnBlock, MlpBlock]], list(zip(layers[1::2], layers[2::2], strict=True)))

    def _forward_stage(self, stage: int, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The tokens (B, G + N, C) after each block, and the last map (B, C, H, W)."""
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
    def no_weight_decay(self) -> set[str]:
        """Parameters that are to be spared beside biases and norms: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^layer1\.0", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Regions after the last norm, (B, H, W, D)."""
        for stage in range(len(self.specs)):
            _, x = self._forward_stage(stage, x)
        return self.norm(x.permute(0, 2, 3, 1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """View feature (B, D), or class logits, of regions (B, H, W, D)."""
        if self.global_pool:
            x = x.mean((1, 2))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

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
        """Outputs of the stages without global tokens, as in timm's models.

        Returns:
            The maps of the chosen stages (B, C, H, W); before them, unless ``intermediates_only``, the regions.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt}: expected NCHW or NHWC")
        final = len(self.specs) - 1
        chosen, last = feature_take_indices(final + 1, indices)
        maps = []
        for stage in range(last + 1 if stop_early else final + 1):
            _, x = self._forward_stage(stage, x)
            if stage in chosen:
                y = x.permute(0, 2, 3, 1)
                y = self.norm(y) if norm and stage == final else y
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        x = x.permute(0, 2, 3, 1)
        return (self.norm(x) if stage == final else x), maps

    # EsViT's interface

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """View features (B, D) and regions (B, N, D)."""
        regions = self.forward_features(x).flatten(1, 2)  # (B, N, D)
        return regions.mean(1), regions

    def last_blocks(self, x: Tensor, n: int = 4) -> Tensor:
        """The linear-probe feature of the last ``n`` blocks: first global token, or the average where there is none.

        Only the last stage is normed.
        """
        outputs = []
        for stage, spec in enumerate(self.specs):
            tokens, x = self._forward_stage(stage, x)
            for y in tokens:
                y = self.norm(y) if stage == len(self.specs) - 1 else y
                outputs.append(y[:, 0] if spec.global_tokens else y.mean(1))
        return torch.cat(outputs[-n:], -1)  # (B, D')

    def last_attention(self, x: Tensor) -> Tensor:
        """Attention of the last block, which must be a full one, (B, heads, N, N)."""
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
            raise ValueError("attention is only given for networks whose last stage has full attention (s0)")
        return last.attn.weights(last.norm(tokens), height, width), height, width

    def attention_map(self, x: Tensor) -> Tensor:
        """Attention that each region receives, averaged over all queries, (B, heads, H, W)."""
        weights, height, width = self._last_attention(x)
        return weights.mean(-2).unflatten(-1, (height, width))


_ARCHITECTURES = {
    "esvit_vil_2262": "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_"
    "l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0",
}

default_cfgs = generate_default_cfgs({name: default_cfg(first_conv="layer1.0.proj") for name in _ARCHITECTURES})

for _name, _arch in _ARCHITECTURES.items():
    register(__name__, VisionLongformer, _name, arch=_arch, out_indices=(0, 1, 2, 3))
