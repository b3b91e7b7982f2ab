"""Checkpoints of the published code (microsoft/esvit), files written by ``torch.save``.

    student      state of the network in DistributedDataParallel: every name begins with ``module.``
    teacher      the same without the prefix, except for networks with batch norms, whose teacher is wrapped, too
    optimizer    state of torch's optimizer; groups: regularized, not regularized
    epoch        completed epochs
    args         the command line, an ``argparse.Namespace``
    dino_loss    the centers, ``center`` and, with the region task, ``center_grid``
    fp16_scaler  state of torch's gradient scaler, if half precision was used

Related files are supported, too: the teacher alone, one network in ``model`` or ``state_dict``, and a plain state dict; of
timm's and DeiT's training scripts the moving average (``state_dict_ema``, ``model_ema``), checkpoints of Lightning, and the
names of transformers. Prefixes that wrappers add are removed, see :mod:`esvit_core.weights.wrappers`.
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
from esvit_core.weights.huggingface_names import from_huggingface, is_huggingface
from esvit_core.weights.pickled import load_pickled
from esvit_core.weights.published_names import from_published, to_published
from esvit_core.weights.snapshot import Snapshot, Weights
from esvit_core.weights.wrappers import unwrap

CENTERS = {"center": "center_view.value", "center_grid": "center_region.value"}
_NETWORKS = ("teacher", "state_dict_ema", "model_ema", "model", "state_dict")
_TRAINING_KEYS = ("student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler")
# What other tools store beside the network: timm's and DeiT's training scripts, and Lightning.
_OTHER_TRAINING_KEYS = (
    *("arch", "version", "metric", "amp_scaler", "scaler", "lr_scheduler", "lr_schedulers", "optimizer_states"),
    *("global_step", "pytorch-lightning_version", "loops", "callbacks", "hparams_name", "hparams_type"),
    *("hyper_parameters", "datamodule_hyper_parameters", "MixedPrecision"),
)
# Classifiers of supervised training and of the linear probe, which are ignored.
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
    """Read a checkpoint of the published code, or a related file.

    Raises:
        UserError: see :func:`~esvit_core.weights.pickled.load_pickled`; or the file contains no network.
    """
    return from_payload(load_pickled(path), str(path))


def from_payload(payload: Any, origin: str) -> Snapshot:
    """Convert the content of a checkpoint file.

    Raises:
        UserError: it contains no network.
    """
    if not isinstance(payload, Mapping):
        raise UserError(f"checkpoint {origin}: it contains a {type(payload).__name__}; expected states of networks")
    if not any(name in payload for name in ("student", *_NETWORKS)):
        teacher, ignored = _network(payload, origin, "the file")
        return Snapshot(origin, "state dict", teacher, ignored=ignored)
    student, ignored = _network(payload["student"], origin, "student") if "student" in payload else (None, ())
    key = next((name for name in _NETWORKS if name in payload), None)
    teacher, other = _network(payload[key], origin, key) if key else (student or {}, ())
    scaler, optimizer, epoch = payload.get("fp16_scaler"), payload.get("optimizer"), payload.get("epoch")
    return Snapshot(
        origin,
        "published checkpoint" if student else f"state dict ({key})",
        teacher,
        student,
        _centers(payload.get("dino_loss", {}), origin),
        dict(optimizer) if student and isinstance(optimizer, Mapping) else None,
        float(epoch) if isinstance(epoch, int | float) else None,
        _arguments(payload.get("args")),
        dict(scaler) if isinstance(scaler, Mapping) else None,
        (*ignored, *(name for name in other if name not in ignored), *_unknown(payload, key)),
    )


def network_entry(payload: Mapping[str, Any]) -> Any:
    """Return the entry of a checkpoint file that is a network, the moving average if there is one; else the whole."""
    return next((payload[name] for name in _NETWORKS if name in payload), payload)


def write_published_checkpoint(
    path: Path, states: Mapping[str, Any], config: Config, epoch: int, scaler: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint from which the published code can resume.

    Args:
        path: file to write.
        states: states of a checkpoint: ``student``, ``teacher``, ``objective`` and ``optimizer``.
        config: configuration of the run.
        epoch: completed epochs.
        scaler: state of a gradient scaler, if there is one.

    Raises:
        UserError: the file cannot be written.
    """
    student = to_published(states["student"])
    batch_norms = any(name.endswith("running_mean") for name in student)
    published_names = {ours: theirs for theirs, ours in CENTERS.items()}
    payload = {
        "student": {f"module.{name}": value for name, value in student.items()},
        "teacher": {
            f"module.{name}" if batch_norms else name: value for name, value in to_published(states["teacher"]).items()
        },
        "optimizer": states["optimizer"],
        "epoch": epoch,
        "args": argparse.Namespace(**published_arguments(config)),
        "dino_loss": {published_names[name]: value for name, value in states["objective"].items()},
    }
    if scaler is not None:
        payload["fp16_scaler"] = dict(scaler)
    try:
        torch.save(payload, path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path}: cannot be written ({error}); choose another path, or free disk space"
        ) from None


def _network(state: Any, origin: str, where: str) -> tuple[Weights, tuple[str, ...]]:
    """Return the entries of a network under this project's names, and the ignored names."""
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"checkpoint {origin}: {where} is not the state of a network; expected names and tensors")
    named, outside = unwrap(state)
    wrong = [name for name, value in named.items() if not _is_plain(value)]
    if wrong:
        raise UserError(
            f"checkpoint {origin}: {where} is not the state of a network: {', '.join(wrong[:3])} are not tensors; "
            "expected student, teacher, model, state_dict, or a plain state dict"
        )
    if is_huggingface(named):
        named, pooler = from_huggingface(named)
        outside = (*outside, *pooler)
    bare = {name: name.removeprefix("backbone.").removeprefix("backbone.") for name in named}
    ignored = tuple(name for name in named if bare[name].startswith(_CLASSIFIERS))
    kept = {name: value for name, value in named.items() if name not in ignored}
    if not kept:
        raise UserError(
            f"checkpoint {origin}: {where} contains only a classifier ({', '.join(ignored)}); "
            "expected the backbone it was trained on"
        )
    return from_published(kept), (*ignored, *outside)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _centers(state: Any, origin: str) -> Weights:
    if not isinstance(state, Mapping) or not all(name in CENTERS and _is_plain(v) for name, v in state.items()):
        raise UserError(f"checkpoint {origin}: dino_loss contains {state!r:.80}; expected {' and '.join(CENTERS)}")
    return {CENTERS[name]: value for name, value in state.items()}


def _arguments(namespace: Any) -> dict[str, Any]:
    return dict(vars(namespace)) if isinstance(namespace, argparse.Namespace) else {}


def _unknown(payload: Mapping[str, Any], key: str | None) -> list[str]:
    return [str(name) for name in payload if name not in (*_TRAINING_KEYS, *_OTHER_TRAINING_KEYS, key)]
