"""Stock timm: a folder with ``model.safetensors`` and ``config.json`` in timm's own format.

    timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)

For Swin the caller must pass ``norm_layer=partial(nn.LayerNorm, eps=1e-6)``, which JSON cannot express. Stock timm's
Swin has eps 1e-5, with which the features differ.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from esvit_core.config import ModelConfig
from esvit_core.errors import UserError
from esvit_core.storage.disk import explain_write_errors
from esvit_core.weights.timm_names import stock_network, to_timm

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TIMM = "timm:"


def write(backbone: nn.Module, path: Path, description: dict[str, Any], regions: bool) -> None:
    """Write the folder; its network always provides regions.

    Raises:
        UserError: timm has no such network (CvT, ViL), or does not support its sizes.
    """
    try:
        name, arguments = stock_arguments(ModelConfig.model_validate(description["model"]), description["img_size"])
    except UserError as error:
        raise UserError(f"format timm: {error}; safetensors, onnx and torch-export support every network") from None
    stock = _create(name, arguments)
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in _state(backbone, description).items()}
    try:
        stock.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"format timm: the weights of {description['arch']} do not fit timm's {name}: {error}"
        ) from None
    path.mkdir()
    with explain_write_errors(path / WEIGHTS, safetensors.SafetensorError, otherwise="choose another path"):
        safetensors.torch.save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": stock.num_features,
        "pretrained_cfg": _input(stock, description),
        "model_args": {key: value for key, value in arguments.items() if key != "norm_layer"},
        "esvit": description | {"load": loading_code(path.name, arguments), "norm_eps": _eps(arguments)},
    }
    (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Load the network with stock timm as a function of images (B, 3, S, S)."""
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    eps = config["esvit"]["norm_eps"]
    arguments: dict[str, Any] = {} if eps is None else {"norm_layer": functools.partial(nn.LayerNorm, eps=eps)}
    stock: Any = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0, **arguments).eval()

    def features(images: Tensor) -> tuple[Tensor, ...]:
        regions = stock.forward_features(images)
        return stock.forward_head(regions, pre_logits=True), _region_map(stock, regions)

    return features


def usage(path: Path, description: dict[str, Any]) -> list[str]:
    """Return the lines of Python that load the folder."""
    _, arguments = stock_arguments(ModelConfig.model_validate(description["model"]), description["img_size"])
    size = description["img_size"]
    return [
        "import functools, timm, torch",
        f"backbone = {loading_code(str(path), arguments)}.eval()",
        f"view = backbone(torch.zeros(1, 3, {size}, {size}))",
    ]


def stock_arguments(model: ModelConfig, img_size: int) -> tuple[str, dict[str, Any]]:
    """Return the stock timm network that is equivalent to ``model``, of any size.

    Args:
        model: the ``model`` section.
        img_size: side of the images that the network is built for, pixels.

    Returns:
        Name and keyword arguments for ``timm.create_model``.

    Raises:
        UserError: timm has no equivalent network (CvT, ViL).
    """
    name, arguments = stock_network("swin_tiny_w7" if model.arch == "swin" else model.arch)
    for key in ("patch_size", "embed_dim", "depths", "num_heads", "window_size"):
        if (value := getattr(model, key)) is not None:
            arguments[key] = list(value) if isinstance(value, tuple) else value
    default: Any = timm.get_pretrained_cfg_value(name, "input_size")
    if img_size != default[-1] and _is_built_for_a_size(name):
        arguments["img_size"] = img_size
    return name, arguments


def loading_code(folder: str, arguments: dict[str, Any]) -> str:
    """Return the expression that loads the folder."""
    eps = "" if _eps(arguments) is None else ", norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)"
    return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True, num_classes=0{eps})"


def _state(backbone: nn.Module, description: dict[str, Any]) -> dict[str, Tensor]:
    return to_timm(description["arch"], backbone.state_dict())


def _create(name: str, arguments: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"format timm: timm's {name} cannot be created with {_shown(arguments)} ({error})") from None


def _is_built_for_a_size(name: str) -> bool:
    with torch.device("meta"):
        try:
            timm.create_model(name, num_classes=0, img_size=224)
        except TypeError:  # takes any size and has no such argument
            return False
        except (AssertionError, ValueError):  # has the argument, but requires another size
            return True
    return True


def _eps(arguments: dict[str, Any]) -> float | None:
    """Return the eps of the layer norms if it differs from timm's default, else None."""
    return arguments["norm_layer"].keywords["eps"] if "norm_layer" in arguments else None


def _input(stock: Any, description: dict[str, Any]) -> dict[str, Any]:
    """Return timm's description of the input, from which timm creates its transforms."""
    kept = ("pool_size", "first_conv", "classifier")
    size = description["eval_crop"]
    return {key: stock.pretrained_cfg[key] for key in kept if key in stock.pretrained_cfg} | {
        "input_size": [3, size, size],
        "fixed_input_size": stock.pretrained_cfg.get("fixed_input_size", False),
        "crop_pct": size / description["eval_resize"],
        "interpolation": "bicubic",
        "mean": description["mean"],
        "std": description["std"],
        "num_classes": 0,
    }


def _region_map(stock: Any, features: Tensor) -> Tensor:
    """Convert the output of ``forward_features`` in any layout to regions (B, H, W, D)."""
    if features.ndim == 4:
        return features if getattr(stock, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
    tokens = features[:, stock.num_prefix_tokens :]
    return tokens.unflatten(1, (round(tokens.shape[1] ** 0.5), -1))


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in arguments.items() if key != "norm_layer")
