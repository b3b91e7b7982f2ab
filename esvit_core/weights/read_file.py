"""Weights from a file, whoever wrote it, under the names of a network of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from safetensors import SafetensorError

from esvit_core.errors import UserError
from esvit_core.weights.esvit_checkpoint import from_payload
from esvit_core.weights.pickled import load_pickled
from esvit_core.weights.snapshot import Snapshot, part_of
from esvit_core.weights.timm_names import from_timm

_TIMM = "timm:"


def read_file(path: Path, arch: str) -> Snapshot:
    """Read a checkpoint of the published code, a state dict of ours or of timm, or a ``.safetensors`` file.

    Args:
        path: the file.
        arch: as in ``model.arch``; names of a stock timm network become those of this one.

    Raises:
        UserError: no such file, no weights in it, damaged, or refused.
    """
    return adapted(load_file(path), arch, str(path))


def load_file(path: Path) -> Any:
    """What is in the file, read safely; see :func:`~esvit_core.weights.pickled.load_pickled`."""
    if path.suffix != ".safetensors":
        return load_pickled(path)
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: damaged, or no safetensors ({error}); copy it again") from None


def adapted(payload: Any, arch: str, origin: str) -> Snapshot:
    """What :func:`load_file` read, as a snapshot with the names of ``arch``."""
    if arch.startswith(_TIMM) and isinstance(payload, dict) and not _is_ours(payload):
        plain = from_payload(payload.get("model", payload.get("state_dict", payload)), origin)  # checked, renamed
        weights = {name.removeprefix("backbone."): value for name, value in plain.teacher.items()}
        return Snapshot(origin, "weights of timm", _below_backbone(from_timm(arch, weights)))
    snapshot = from_payload(payload, origin)
    if snapshot.student is not None or snapshot.has("head"):
        return snapshot
    return replace(snapshot, teacher=_below_backbone(from_timm(arch, part_of(snapshot.teacher, "backbone"))))


def from_timm_registry(name: str, arch: str) -> Snapshot:
    """The weights that timm's registry has for a network, fetched or found in its cache.

    Args:
        name: as for ``timm.create_model``, such as ``swin_tiny_patch4_window7_224.ms_in1k``.
        arch: as in ``model.arch``.

    Raises:
        UserError: timm has no such network, no weights for it, or they cannot be fetched.
    """
    if not timm.is_model(name):
        raise UserError(f"timm:{name}: timm has no such network; `timm.list_models()` lists them")
    try:
        weights = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of the network, of the cache, of timm: no common one
        raise UserError(
            f"timm:{name}: its weights cannot be had ({str(error).splitlines()[0] if str(error) else error!r}); "
            "where there is no network give the file itself, a .pth or .safetensors"
        ) from None
    return Snapshot(f"timm:{name}", "weights of timm", _below_backbone(from_timm(arch, weights)))


def _below_backbone(weights: dict[str, Any]) -> dict[str, Any]:
    return {f"backbone.{name}": value for name, value in weights.items()}


def _is_ours(payload: dict[str, Any]) -> bool:
    """A training's checkpoint, or a backbone of ours around a timm network."""
    return "student" in payload or "teacher" in payload or any(str(name).startswith("model.") for name in payload)
