"""Mapping from weight names of transformers' ViT and Swin (Hugging Face) to timm's.

The tensors are the same, except that queries, keys and values are three matrices there and one in timm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_FIRST_LAYER = "embeddings.patch_embeddings.projection.weight"
_PARTS = ("query", "key", "value")  # in the order of timm's qkv
_PART = re.compile(r"^(.*)\.attention\.(?:self|attention)\.(query|key|value)\.(weight|bias)$")
_RENAMED = (  # in this order: the attention's output before that of the block
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("encoder.layers.", "layers."),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.self.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def is_huggingface(state: Mapping[str, object]) -> bool:
    """Return whether these are the names of transformers' ViT or Swin, without a prefix."""
    return _FIRST_LAYER in state


def from_huggingface(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename the entries to timm's names.

    Args:
        state: the state of a ``ViTModel`` or ``SwinModel``.

    Returns:
        The state of timm's network, and the names of what is not part of it (the pooler).
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    ignored = []
    for name, value in state.items():
        if found := _PART.match(name):
            block = _rename(f"{found[1]}.").removesuffix(".")
            parts.setdefault((block, found[3]), {})[found[2]] = value
        elif name.startswith("pooler."):
            ignored.append(name)
        else:
            renamed[_rename(name)] = value
    for (block, kind), three in parts.items():
        if all(part in three for part in _PARTS):
            renamed[f"{block}.attn.qkv.{kind}"] = torch.cat([three[part] for part in _PARTS])
    return renamed, tuple(ignored)


def _rename(name: str) -> str:
    for theirs, timms in _RENAMED:
        name = name.replace(theirs, timms)
    return name.replace("layernorm.", "norm.", 1) if name.startswith("layernorm.") else name
