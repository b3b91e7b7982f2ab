"""Checkpoints of the published code (microsoft/esvit): a file each, written by ``torch.save``.

    student      state of the network in DistributedDataParallel: every name begins with ``module.``
    teacher      the same without it, but for networks with batch norms, whose teacher is wrapped too
    optimizer    state of torch's optimizer; groups: regularized, not regularized
    epoch        epochs done
    args         the command line, an ``argparse.Namespace``
    dino_loss    the centers, ``center`` and, with the region task, ``center_grid``
    fp16_scaler  state of torch's gradient scaler, where half precision was used

Its relatives are read too: files with the teacher alone, with one network below ``model`` or ``state_dict``, and a
plain state dict.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.weights.arguments import published_arguments
from esvit_core.weights.pickled import load_pickled
from esvit_core.weights.published_names import from_published, to_published
from esvit_core.weights.snapshot import Snapshot, Weights

CENTRES = {"center": "center_view.value", "center_grid": "center_region.value"}
_NETWORKS = ("teacher", "model", "state_dict")
_OF_A_TRAINING = ("student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler")
# What else stands beside a network: classifiers, of supervised training and of the linear probe.
_CLASSIFIERS = (
    "head.weight",
    "head.bias",
    "head.fc.",
    "head_dist.",
    "fc.weight",
    "fc.bias",
    "linear.",
    "linear_classifier.",
)


def read_published_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint of the published code, or one of its relatives.

    Raises:
        UserError: see :func:`~esvit_core.weights.pickled.load_pickled`; or there is no network in it.
    """
    return from_payload(load_pickled(path), str(path))


def from_payload(payload: Any, origin: str) -> Snapshot:
    """What a file holds that has been read already.

    Raises:
        UserError: there is no network in it.
    """
    if not isinstance(payload, Mapping):
        raise UserError(f"checkpoint {origin}: it holds a {type(payload).__name__}, expected the states of networks")
    if not any(name in payload for name in ("student", *_NETWORKS)):
        teacher, passed_over = _network(payload, origin, "the file")
        return Snapshot(origin, "state dict", teacher, passed_over=passed_over)
    student, passed_over = _network(payload["student"], origin, "student") if "student" in payload else (None, ())
    found = next((name for name in _NETWORKS if name in payload), None)
    teacher, other = _network(payload[found], origin, found) if found else (student or {}, ())
    scaler, optimizer, epoch = payload.get("fp16_scaler"), payload.get("optimizer"), payload.get("epoch")
    return Snapshot(
        origin,
        "published checkpoint" if student else f"state dict ({found})",
        teacher,
        student,
        _centers(payload.get("dino_loss", {}), origin),
        dict(optimizer) if student and isinstance(optimizer, Mapping) else None,
        float(epoch) if isinstance(epoch, int | float) else None,
        _arguments(payload.get("args")),
        dict(scaler) if isinstance(scaler, Mapping) else None,
        (*passed_over, *(name for name in other if name not in passed_over), *_unknown(payload, found)),
    )


def write_published_checkpoint(
    path: Path, states: Mapping[str, Any], config: Config, epoch: int, scaler: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint that the published code goes on with.

    Args:
        path: the file.
        states: of a checkpoint of ours: ``student``, ``teacher``, ``objective`` and ``optimizer``.
        config: of the run.
        epoch: epochs done.
        scaler: state of a gradient scaler, where there is one.

    Raises:
        UserError: the file cannot be written.
    """
    student = to_published(states["student"])
    batch_norms = any(name.endswith("running_mean") for name in student)
    here = {ours: theirs for theirs, ours in CENTRES.items()}
    payload = {
        "student": {f"module.{name}": value for name, value in student.items()},
        "teacher": {
            f"module.{name}" if batch_norms else name: value for name, value in to_published(states["teacher"]).items()
        },
        "optimizer": states["optimizer"],
        "epoch": epoch,
        "args": argparse.Namespace(**published_arguments(config)),
        "dino_loss": {here[name]: value for name, value in states["objective"].items()},
    }
    if scaler is not None:
        payload["fp16_scaler"] = dict(scaler)
    try:
        torch.save(payload, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"checkpoint {path}: cannot be written ({error}); name another place, or make room") from None


def _network(state: Any, origin: str, where: str) -> tuple[Weights, tuple[str, ...]]:
    """A network's entries under our names, and what was passed over."""
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"checkpoint {origin}: {where} is no state of a network; expected names and tensors")
    named = {str(name).removeprefix("module."): value for name, value in state.items()}
    wrong = [name for name, value in named.items() if not _is_plain(value)]
    if wrong:
        raise UserError(
            f"checkpoint {origin}: {where} is no state of a network, {', '.join(wrong[:3])} are no tensors; "
            "expected student, teacher, model, state_dict, or a state dict by itself"
        )
    bare = {name: name.removeprefix("backbone.").removeprefix("backbone.") for name in named}
    passed_over = tuple(name for name in named if bare[name].startswith(_CLASSIFIERS))
    kept = {name: value for name, value in named.items() if name not in passed_over}
    if not kept:
        raise UserError(
            f"checkpoint {origin}: {where} holds a classifier only ({', '.join(passed_over)}); "
            "expected the backbone it was trained on"
        )
    return from_published(kept), passed_over


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _centers(state: Any, origin: str) -> Weights:
    if not isinstance(state, Mapping) or not all(name in CENTRES and _is_plain(v) for name, v in state.items()):
        raise UserError(f"checkpoint {origin}: dino_loss holds {state!r:.80}; expected {' and '.join(CENTRES)}")
    return {CENTRES[name]: value for name, value in state.items()}


def _arguments(namespace: Any) -> dict[str, Any]:
    return dict(vars(namespace)) if isinstance(namespace, argparse.Namespace) else {}


def _unknown(payload: Mapping[str, Any], found: str | None) -> list[str]:
    return [str(name) for name in payload if name not in (*_OF_A_TRAINING, found)]
