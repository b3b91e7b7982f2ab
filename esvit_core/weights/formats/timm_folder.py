"""Stock timm: a folder with ``model.safetensors`` and ``config.json`` as timm itself writes and reads it.

    timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)

For Swin one thing has to be said that JSON cannot: ``norm_layer=partial(nn.LayerNorm, eps=1e-6)``. Stock timm's Swin
has eps 1e-5, and its features are then others.
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
    """Write the folder; the network in it gives regions whether they are asked for or not.

    Raises:
        UserError: timm has no such network (CvT, ViL), or not with these sizes.
    """
    try:
        name, arguments = stock_arguments(ModelConfig.model_validate(description["model"]), description["img_size"])
    except UserError as error:
        raise UserError(f"format timm: {error}; safetensors, onnx and torch-export take every network") from None
    stock = _create(name, arguments)
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in _state(backbone, description).items()}
    try:
        stock.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"format timm: the weights of {description['arch']} do not fit timm's {name}: {error}"
        ) from None
    path.mkdir()
    with explain_write_errors(path / WEIGHTS, safetensors.SafetensorError, otherwise="name another place"):
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
    """The folder's network made by stock timm, as a function of images (B, 3, S, S)."""
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    eps = config["esvit"]["norm_eps"]
    said: dict[str, Any] = {} if eps is None else {"norm_layer": functools.partial(nn.LayerNorm, eps=eps)}
    stock: Any = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0, **said).eval()

    def features(images: Tensor) -> tuple[Tensor, ...]:
        found = stock.forward_features(images)
        return stock.forward_head(found, pre_logits=True), _map(stock, found)

    return features


def usage(path: Path, description: dict[str, Any]) -> list[str]:
    """Lines of Python that load the folder."""
    _, arguments = stock_arguments(ModelConfig.model_validate(description["model"]), description["img_size"])
    size = description["img_size"]
    return [
        "import functools, timm, torch",
        f"backbone = {loading_code(str(path), arguments)}.eval()",
        f"view = backbone(torch.zeros(1, 3, {size}, {size}))",
    ]


def stock_arguments(model: ModelConfig, img_size: int) -> tuple[str, dict[str, Any]]:
    """The network of stock timm that is like ``model``, whatever its sizes.

    Args:
        model: the ``model`` section.
        img_size: side of the images the network is built for, pixels.

    Returns:
        Name and keyword arguments for ``timm.create_model``.

    Raises:
        UserError: timm has none (CvT, ViL).
    """
    name, arguments = stock_network("swin_tiny_w7" if model.arch == "swin" else model.arch)
    for key in ("patch_size", "embed_dim", "depths", "num_heads", "window_size"):
        if (value := getattr(model, key)) is not None:
            arguments[key] = list(value) if isinstance(value, tuple) else value
    usual: Any = timm.get_pretrained_cfg_value(name, "input_size")
    if img_size != usual[-1] and _is_built_for_a_size(name):
        arguments["img_size"] = img_size
    return name, arguments


def loading_code(folder: str, arguments: dict[str, Any]) -> str:
    """What to type to load the folder, in one statement."""
    eps = "" if _eps(arguments) is None else ", norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)"
    return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True, num_classes=0{eps})"


def _state(backbone: nn.Module, description: dict[str, Any]) -> dict[str, Tensor]:
    return to_timm(description["arch"], backbone.state_dict())


def _create(name: str, arguments: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"format timm: timm's {name} cannot be made with {_shown(arguments)} ({error})") from None


def _is_built_for_a_size(name: str) -> bool:
    with torch.device("meta"):
        try:
            timm.create_model(name, num_classes=0, img_size=224)
        except TypeError:  # fits every size, and has no such argument
            return False
        except (AssertionError, ValueError):  # has it, but wants another size
            return True
    return True


def _eps(arguments: dict[str, Any]) -> float | None:
    """The layer norms' eps where it is not the network's own."""
    return arguments["norm_layer"].keywords["eps"] if "norm_layer" in arguments else None


def _input(stock: Any, description: dict[str, Any]) -> dict[str, Any]:
    """timm's description of the images, from which its transforms are made."""
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


def _map(stock: Any, features: Tensor) -> Tensor:
    """The regions (B, H, W, D) of ``forward_features``, whatever their layout."""
    if features.ndim == 4:
        return features if getattr(stock, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
    tokens = features[:, stock.num_prefix_tokens :]
    return tokens.unflatten(1, (round(tokens.shape[1] ** 0.5), -1))


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in arguments.items() if key != "norm_layer")
