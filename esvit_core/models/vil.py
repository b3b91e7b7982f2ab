"""Vision Longformer with the numerics of the published EsViT code (Zhang et al., 2021; microsoft/esvit).

Stages alternate attention and MLP blocks behind a patch embedding. Two kinds of attention:

* Sparse: a token sees its own window, the eight windows around it, and the global token; the global token sees all.
  The map is padded to whole windows, and padding is masked. ``mode`` 1 is the published training: each call sees,
  besides its own window, one randomly drawn neighbour; in eval mode all eight. Mode 0: always all; -1: none.
* Full, with relative position biases that are resized bicubically, as an image of tokens by tokens, for a
  resolution other than the one built for.

The global token of a stage is dropped before the next. Weights of the global token's attention are those of the
local one (``SHARE_W``) and carry both names, as published; loaded last, the global names win.
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

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)

# Offsets of the nine windows a window sees, row by row; the fifth is the window itself.
OFFSETS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
OWN = 4


@functools.lru_cache(maxsize=256)
def _window_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """-inf where a window would see padding or beyond the map, (windows, 9, 1, window ** 2)."""
    with torch.inference_mode(False):  # a cached tensor may meet autograd later
        rows, columns = -(-height // window), -(-width // window)
        inside = torch.zeros(rows + 2, columns + 2, window, window, dtype=torch.bool)  # a border of windows around
        grid = torch.zeros(rows * window, columns * window, dtype=torch.bool)
        grid[:height, :width] = True
        inside[1:-1, 1:-1] = grid.view(rows, window, columns, window).transpose(1, 2)
        seen = torch.stack([inside[1 + r : 1 + r + rows, 1 + c : 1 + c + columns] for r, c in OFFSETS], 2)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return mask.view(rows * columns, 9, 1, window**2).to(device)


def window_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """The mask of a map, computed once per resolution and device."""
    if torch.compiler.is_compiling():  # tensors of a trace must not outlive it
        return _window_mask.__wrapped__(height, width, window, device)
    return _window_mask(height, width, window, device)


def _coordinates(rows: range, columns: range) -> Tensor:
    grid = torch.meshgrid(torch.tensor(rows), torch.tensor(columns), indexing="ij")
    return torch.stack(grid).flatten(1)  # (2, N)


def _position_index(queries: Tensor, keys: Tensor, reach: int) -> Tensor:
    """Row of the bias table for each query and key, (N, M); differences lie within ``reach``."""
    row, column = queries[:, :, None] - keys[:, None] + reach
    return row * (2 * reach + 1) + column


class GlobalBias(nn.Module):
    """Mixin: biases between the global tokens and the rest."""

    g2l_relative_position_bias: nn.Parameter
    g2g_relative_position_bias: nn.Parameter

    def _make_global_bias(self, num_heads: int, global_tokens: int) -> None:
        if global_tokens:
            self.g2l_relative_position_bias = nn.Parameter(torch.zeros(2, num_heads, global_tokens))
            self.g2g_relative_position_bias = nn.Parameter(torch.zeros(num_heads, global_tokens, global_tokens))
            trunc_normal_(self.g2l_relative_position_bias, std=0.02)
            trunc_normal_(self.g2g_relative_position_bias, std=0.02)

    def _from_global(self, tokens: int) -> Tensor:
        """Bias of the global queries, (heads, G, G + tokens)."""
        to_local = self.g2l_relative_position_bias[0][..., None].expand(-1, -1, tokens)
        return torch.cat((self.g2g_relative_position_bias, to_local), -1)

    def _to_global(self, tokens: int) -> Tensor:
        """Bias of local queries towards the global keys, (heads, tokens, G)."""
        return self.g2l_relative_position_bias[1][:, None].expand(-1, tokens, -1)


class FullAttention(GlobalBias):
    """Attention between all tokens of a map and its global tokens."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, size: tuple[int, int], global_tokens: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.global_tokens = global_tokens
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        height, width = size
        self.local_relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * height - 1) * (2 * width - 1), num_heads)
        )
        trunc_normal_(self.local_relative_position_bias_table, std=0.02)
        self._make_global_bias(num_heads, global_tokens)
        places = _coordinates(range(height), range(width))
        row, column = places[:, :, None] - places[:, None]
        self.register_buffer("relative_position_index", (row + height - 1) * (2 * width - 1) + column + width - 1)

    def _bias(self, tokens: int) -> Tensor:
        """(1, heads, G + tokens, G + tokens)."""
        built = len(self.relative_position_index)
        bias = self.local_relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(1, built, built, -1).permute(0, 3, 1, 2)  # (1, heads, built, built)
        if built != tokens:
            bias = F.interpolate(bias, size=(tokens, tokens), mode="bicubic")
        if self.global_tokens:
            local = torch.cat((self._to_global(tokens), bias[0]), -1)
            bias = torch.cat((self._from_global(tokens), local), 1)[None]
        return bias

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        q, k, v = self._qkv(x)
        bias = self._bias(height * width).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, height: int, width: int) -> Tensor:
        """The attention itself, (B, heads, G + N, G + N)."""
        q, k, _ = self._qkv(x)
        return (q * self.scale @ k.mT + self._bias(height * width)).softmax(-1)


class SparseAttention(GlobalBias):
    """Attention within a window, to its neighbours, and to and from the global tokens."""

    relative_position_index: Tensor

    def __init__(
        self, dim: int, num_heads: int, window_size: int, global_tokens: int, qkv_bias: bool, mode: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.global_tokens = global_tokens
        self.mode = mode
        self.scale = (dim // num_heads) ** -0.5
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if global_tokens:
            self.query_global, self.kv_global, self.proj_global = self.query, self.kv, self.proj
        w = window_size
        self.local_relative_position_bias_table = nn.Parameter(torch.zeros((4 * w - 1) ** 2, num_heads))
        trunc_normal_(self.local_relative_position_bias_table, std=0.02)
        self._make_global_bias(num_heads, global_tokens)
        own = _coordinates(range(w), range(w))
        keys = [_coordinates(range(r * w, r * w + w), range(c * w, c * w + w)) for r, c in OFFSETS]
        self.register_buffer("relative_position_index", _position_index(own, torch.cat(keys, 1), 2 * w - 1))

    def _neighbours(self) -> list[int]:
        """The windows of this call, its own first, as places in OFFSETS; drawn anew in training with mode 1."""
        if self.mode == -1:
            return [OWN]
        if self.mode > 0 and self.training:
            drawn = int(torch.randint(8, ()))
            return [OWN, drawn + (drawn >= OWN)]
        return [OWN, *(i for i in range(9) if i != OWN)]

    def _bias(self, windows: list[int], mask: Tensor) -> Tensor:
        """Position bias and mask, (windows, heads, w ** 2, G + keys)."""
        w2 = self.window_size**2
        index = self.relative_position_index.view(w2, 9, w2)[:, windows].flatten(1)  # (w2, keys)
        bias = self.local_relative_position_bias_table[index.view(-1)].view(w2, index.shape[1], -1)
        bias = (
            bias.permute(2, 0, 1) + mask[:, windows].transpose(1, 2).flatten(2)[:, None]
        )  # (windows, heads, w2, keys)
        if self.global_tokens:
            to_global = self._to_global(w2).expand(len(bias), -1, -1, -1)
            bias = torch.cat((to_global, bias), -1)
        return bias

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        G = self.global_tokens
        q, kv = self.query(x), self.kv(x)  # (B, G + N, C), (B, G + N, 2C)
        out = self._local(q[:, G:], kv, height, width)
        if G:
            out = torch.cat((self._global(q[:, :G], kv), out), 1)
        return self.proj(out)

    def _local(self, q: Tensor, kv: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) and (B, G + N, 2C) -> (B, N, C)."""
        B, _, C = q.shape
        G, w, heads = self.global_tokens, self.window_size, self.num_heads
        windows = self._neighbours()
        q = self._partition(q, height, width)  # (B, rows, columns, w2, C)
        local = self._partition(kv[:, G:], height, width)  # (B, rows, columns, w2, 2C)
        rows, columns = q.shape[1:3]
        parts = [kv[:, None, None, :G].expand(-1, rows, columns, -1, -1)] if G else []
        parts += [local.roll((-OFFSETS[i][0], -OFFSETS[i][1]), (1, 2)) if i != OWN else local for i in windows]
        k, v = (
            torch.cat(parts, 3).flatten(1, 2).unflatten(-1, (2, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        )  # (B, windows, heads, keys, d)
        q = q.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(2, 3)
        bias = self._bias(windows, window_mask(height, width, w, q.device)).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        out = out.transpose(2, 3).reshape(B, rows, columns, w, w, C)
        out = out.transpose(2, 3).reshape(B, rows * w, columns * w, C)
        return out[:, :height, :width].flatten(1, 2)

    def _partition(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) -> (B, rows, columns, w ** 2, C), padded with zeros."""
        w = self.window_size
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % w, 0, -height % w))
        return x.unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3).flatten(3, 4)

    def _global(self, q: Tensor, kv: Tensor) -> Tensor:
        """(B, G, C) and (B, G + N, 2C) -> (B, G, C)."""
        heads = self.num_heads
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, G, d)
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, G + N, d)
        bias = self._from_global(kv.shape[1] - self.global_tokens)[None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return out.transpose(1, 2).flatten(2)


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
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
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
