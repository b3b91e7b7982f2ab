"""Plain vision transformers with the numerics of the published EsViT code (Dosovitskiy et al., 2021; DINO).

The network is timm's, with its interface, names and layers. The published network differs in this:

* Layer norms use eps 1e-6, and the class token is initialized from a truncated normal like all other weights.
* For other resolutions the position embedding is resized bicubically without antialiasing.
* Images whose side is not a multiple of the patch size are cropped at the right and at the bottom.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import Attention, Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from esvit_core.models.layers.resize import resize
from esvit_core.models.timm_entrypoints import default_cfg, register


class CroppingPatchEmbed(PatchEmbed):
    """Patch embedding that crops images to whole patches."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (side // patch * patch for side, patch in zip(x.shape[-2:], self.patch_size, strict=True))
        return super().forward(x[..., :height, :width])


class VisionTransformer(TimmVisionTransformer):
    """Vision transformer; regions are the patch tokens, the view feature is the class token.

    Args:
        kwargs: arguments of timm's ``VisionTransformer``, except pooling: the view feature is always the class token.
    """

    patch_embed: PatchEmbed
    pos_embed: nn.Parameter
    cls_token: nn.Parameter

    def __init__(self, num_classes: int = 0, **kwargs: Any) -> None:
        super().__init__(
            num_classes=num_classes,
            dynamic_img_size=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            embed_layer=CroppingPatchEmbed,
            **kwargs,
        )
        trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add class token and position embedding to patches (B, H, W, C)."""
        B, H, W, _ = x.shape
        x = torch.cat((self.cls_token.expand(B, -1, -1), x.flatten(1, 2)), 1)  # (B, 1 + N, C)
        return self.pos_drop(x + self._positions(H, W))

    def _positions(self, height: int, width: int) -> Tensor:
        grid = self.patch_embed.grid_size
        if grid == (height, width):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, C, H0, W0)
        patches = resize(patches, (height, width))
        return torch.cat((cls, patches.flatten(2).mT), 1)  # (1, 1 + N, C)

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return view features (B, D) and regions (B, N, D)."""
        tokens = self.forward_features(x)
        return tokens[:, 0], tokens[:, 1:]

    def last_blocks(self, x: Tensor, n: int = 4) -> Tensor:
        """Return the linear-probe feature: normed class tokens of the last ``n`` blocks and the mean of the last patches."""
        return self.view_and_last_blocks(x, n)[1]  # (B, (n + 1) * D)

    def view_and_last_blocks(self, x: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
        """Return the view feature (B, D) of :meth:`forward` and the linear-probe feature (B, D') in one pass."""
        last: Any
        tokens: Any
        last, tokens = self.forward_intermediates(x, n, return_prefix_tokens=True, norm=True, output_fmt="NLC")
        blocks = torch.cat([*(prefix[:, 0] for _, prefix in tokens), tokens[-1][0].mean(1)], -1)
        return self.forward_head(last), blocks

    def last_attention(self, x: Tensor) -> Tensor:
        """Return the attention of the last block, (B, heads, 1 + N, 1 + N)."""
        *blocks, last = self.blocks
        x = self._pos_embed(self.patch_embed(x))
        for block in blocks:
            x = block(x)
        assert isinstance(last, Block) and isinstance(last.attn, Attention)
        attention = last.attn
        qkv = attention.qkv(last.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))  # (B, 1 + N, 3, heads, d)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (q * attention.scale @ k.mT).softmax(-1)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention of the class token to each region, (B, heads, H, W)."""
        height, width = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return self.last_attention(x)[:, :, 0, 1:].unflatten(-1, (height, width))


_NETWORKS: dict[str, dict[str, Any]] = {
    "esvit_deit_tiny": {"embed_dim": 192, "num_heads": 3},
    "esvit_deit_small": {"embed_dim": 384, "num_heads": 6},
    "esvit_vit_base": {"embed_dim": 768, "num_heads": 12},
}

default_cfgs = generate_default_cfgs({name: default_cfg(pool_size=None, classifier="head") for name in _NETWORKS})

for _name, _values in _NETWORKS.items():
    register(__name__, VisionTransformer, _name, **_values)
