"""Backbones by name, from the configuration of a run."""

from __future__ import annotations

import difflib

import timm
from torch import nn

# These register their architectures with timm.
import esvit_core.models.swin
import esvit_core.models.vit  # noqa: F401
from esvit_core.config import ModelConfig
from esvit_core.errors import UserError

# Name in a recipe -> name in timm's registry.
_ARCHITECTURES = {
    "swin": "esvit_swin",
    **{
        f"swin_{size}_w{window}": f"esvit_swin_{size}_window{window}"
        for size in ("tiny", "small", "base", "large")
        for window in (7, 14)
    },
    **{name: f"esvit_{name}" for name in ("deit_small", "deit_tiny", "vit_base")},
}


def architecture_names() -> list[str]:
    """The names that ``model.arch`` takes."""
    return sorted(_ARCHITECTURES)


def create_backbone(config: ModelConfig, img_size: int | None = None, drop_path: float | None = None) -> nn.Module:
    """Make the backbone of a recipe, with fresh weights.

    Args:
        config: the ``model`` section; keys that are None take what the architecture has.
        img_size: side the network is built for, pixels; ``config.img_size`` comes first; 224 where neither is given.
        drop_path: stochastic depth instead of ``config.drop_path``.

    Returns:
        A module with timm's interface (``forward_features``, ``forward_head``, ``num_features`` ...) and EsViT's
        (``views_and_regions``, ``last_blocks``, ``last_attention``, ``attention_map``).

    Raises:
        UserError: no architecture of that name, or sizes that do not go together.
    """
    if config.arch not in _ARCHITECTURES:
        match = difflib.get_close_matches(config.arch, architecture_names(), n=1)
        hint = f", did you mean {match[0]!r}?" if match else ""
        raise UserError(f"model.arch {config.arch}: unknown{hint}; expected one of {', '.join(architecture_names())}")
    sizes = {
        key: getattr(config, key)
        for key in ("patch_size", "embed_dim", "depths", "num_heads", "window_size")
        if getattr(config, key) is not None
    }
    try:
        return timm.create_model(
            _ARCHITECTURES[config.arch],
            img_size=config.img_size or img_size or 224,
            drop_path_rate=config.drop_path if drop_path is None else drop_path,
            **sizes,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"model {config.arch}: {error}; change the sizes in the recipe's `model` section") from None
