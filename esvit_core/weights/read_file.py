"""Read weights from files of any supported origin, under this project's names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from safetensors import SafetensorError

from esvit_core.errors import UserError
from esvit_core.weights.esvit_checkpoint import from_payload, network_entry
from esvit_core.weights.pickled import load_pickled
from esvit_core.weights.snapshot import Snapshot, part_of
from esvit_core.weights.timm_names import from_timm
from esvit_core.weights.weight_source import split_timm

_TIMM = "timm:"


def read_file(path: Path, arch: str) -> Snapshot:
    """Read a published checkpoint, a state dict of this project or timm, or a ``.safetensors`` file.

    Args:
        path: file to read.
        arch: value of ``model.arch``; names of a stock timm network are converted to those of this architecture.

    Raises:
        UserError: the file does not exist, contains no weights, is damaged, or is unsafe.
    """
    return to_snapshot(load_file(path), arch, str(path))


def load_file(path: Path) -> Any:
    """Load the content of the file safely; see :func:`~esvit_core.weights.pickled.load_pickled`."""
    if path.suffix != ".safetensors":
        return load_pickled(path)
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: damaged, or not safetensors ({error}); copy it again") from None


def to_snapshot(payload: Any, arch: str, origin: str) -> Snapshot:
    """Convert the output of :func:`load_file` to a snapshot with the names of ``arch``."""
    if arch.startswith(_TIMM) and isinstance(payload, dict) and not _is_ours(payload):
        plain = from_payload(network_entry(payload), origin)  # checks and renames
        weights = {name.removeprefix("backbone."): value for name, value in plain.teacher.items()}
        kept = _below_backbone(from_timm(arch, weights))
        return Snapshot(origin, "weights of timm", kept, ignored=plain.ignored)
    snapshot = from_payload(payload, origin)
    if snapshot.student is not None or snapshot.has("head"):
        return snapshot
    return replace(snapshot, teacher=_below_backbone(from_timm(arch, part_of(snapshot.teacher, "backbone"))))


def from_timm_registry(name: str, arch: str) -> Snapshot:
    """Load the weights of a network from timm's registry or cache.

    Args:
        name: name for ``timm.create_model``, such as ``swin_tiny_patch4_window7_224.ms_in1k``.
        arch: value of ``model.arch``.

    Raises:
        UserError: timm has no such network or no weights for it, or they cannot be downloaded.
    """
    _require_network(name)
    try:
        weights = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # network, cache and timm errors have no common base class
        raise UserError(
            f"timm:{name}: its weights cannot be loaded ({str(error).splitlines()[0] if str(error) else error!r}); on a "
            f"machine with network access fetch {weights_address(name)}, copy the file here, and name it: timm:{name}:FILE"
        ) from None
    return Snapshot(f"timm:{name}", "weights of timm", _below_backbone(from_timm(arch, weights)))


def from_timm_source(source: str, arch: str) -> Snapshot:
    """Load ``timm:<name>`` from timm's registry or cache, or ``timm:<name>:<file>`` from a file.

    Args:
        source: the source of the weights.
        arch: value of ``model.arch``.

    Raises:
        UserError: timm has no such network, or the weights cannot be read.
    """
    name, file = split_timm(source)
    if file is None:
        return from_timm_registry(name, arch)
    _require_network(name)
    return to_snapshot(load_file(Path(file)), arch, source)


def timm_settings(name: str) -> dict[str, Any]:
    """Return the settings of a network of timm: its architecture, and the preprocessing that timm states for it.

    Raises:
        UserError: timm has no such network.
    """
    _require_network(name)
    stated = timm.get_pretrained_cfg(name)
    augment: dict[str, Any] = {}
    evaluation = {}
    if stated is not None:
        size = stated.test_input_size or stated.input_size
        share = stated.test_crop_pct or stated.crop_pct
        augment = {
            "global_crops": {"size": size[-1]},
            "mean": [float(value) for value in stated.mean],
            "std": [float(value) for value in stated.std],
        }
        evaluation = {"crop": size[-1], "resize": round(size[-1] / share)}
    return {
        "recipe": "imported",
        "model": {"arch": f"{_TIMM}{name}"},
        "augment": augment,
        "evaluation": evaluation,
    }


def weights_address(name: str) -> str:
    """Return the address of the file with the weights of a timm network, for a machine without network access."""
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.hf_hub_id:
        return f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
    url = config.url if config is not None else None
    return url if isinstance(url, str) and url else f"the weights of {name}"


def _require_network(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"timm:{name}: timm has no such network; `timm.list_models()` lists them")


def _below_backbone(weights: dict[str, Any]) -> dict[str, Any]:
    return {f"backbone.{name}": value for name, value in weights.items()}


def _is_ours(payload: dict[str, Any]) -> bool:
    """Return whether this is a checkpoint of a training, or a backbone of this project that wraps a timm network."""
    return "student" in payload or "teacher" in payload or any(str(name).startswith("model.") for name in payload)
