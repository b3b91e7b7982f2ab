"""Create backbones by name from the configuration of a run."""

from __future__ import annotations

import difflib

import timm
from torch import nn

# Importing these modules registers their architectures with timm.
import esvit_core.models.cvt
import esvit_core.models.resnet
import esvit_core.models.swin
import esvit_core.models.vil
import esvit_core.models.vit  # noqa: F401
from esvit_core.config import ModelConfig
from esvit_core.errors import UserError
from esvit_core.models.timm_backbone import TimmBackbone

_TIMM = "timm:"
# Name in a recipe -> name in timm's registry.
_ARCHITECTURES = {
    "swin": "esvit_swin",
    "vil": "esvit_vil_2262",  # the recipe gives its stages
    **{
        f"swin_{size}_w{window}": f"esvit_swin_{size}_window{window}"
        for size in ("tiny", "small", "base", "large")
        for window in (7, 14)
    },
    **{
        name: f"esvit_{name}"
        for name in (
            *("cvt_tiny", "cvt_small", "vil_2262", "vil_1281", "deit_tiny", "deit_small", "vit_base"),
            *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"),
        )
    },
}
# Key in a recipe -> argument of the network, where the two differ.
_ARGUMENTS = {"stages": "arch"}


def architecture_names() -> list[str]:
    """Return the names that ``model.arch`` accepts, besides ``timm:<name>`` for a network of timm."""
    return sorted(_ARCHITECTURES)


def create_backbone(config: ModelConfig, img_size: int | None = None, drop_path: float | None = None) -> nn.Module:
    """Create the backbone of a recipe with randomly initialized weights.

    Args:
        config: the ``model`` section; a key that is None takes the architecture's default.
        img_size: side of the images that the network is built for, pixels; ``config.img_size`` takes precedence;
            224 if neither is given.
        drop_path: stochastic depth rate; overrides ``config.drop_path``.

    Returns:
        A module with timm's interface (``forward_features``, ``forward_head``, ``num_features`` ...) and EsViT's
        (``views_and_regions``, ``last_blocks``, ``view_and_last_blocks``, ``last_attention``, ``attention_map``).

    Raises:
        UserError: there is no architecture of that name, or the sizes are incompatible.
    """
    from_timm = config.arch.startswith(_TIMM)
    if not from_timm and config.arch not in _ARCHITECTURES:
        match = difflib.get_close_matches(config.arch, architecture_names(), n=1)
        hint = f", did you mean {match[0]!r}?" if match else ""
        raise UserError(
            f"model.arch {config.arch}: unknown{hint}; expected one of {', '.join(architecture_names())}, "
            f"or {_TIMM}<name> for a network of timm"
        )
    sizes = {
        _ARGUMENTS.get(key, key): getattr(config, key)
        for key in ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "stages", "mode")
        if getattr(config, key) is not None
    }
    sizes["img_size"] = config.img_size or img_size or 224
    sizes["drop_path_rate"] = config.drop_path if drop_path is None else drop_path
    try:
        if from_timm:
            return TimmBackbone(config.arch.removeprefix(_TIMM), **sizes)
        return timm.create_model(_ARCHITECTURES[config.arch], **sizes)
    except TypeError as error:
        argument = str(error).rpartition("unexpected keyword argument ")[2].strip("'")
        key = next((key for key, name in _ARGUMENTS.items() if name == argument), argument)
        raise UserError(f"model.{key}: {config.arch} has no such setting; remove the key") from None
    except ValueError as error:
        raise UserError(f"model {config.arch}: {error}; change the recipe's `model` section") from None
