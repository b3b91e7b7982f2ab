"""Options of the published code's command line and settings here: the only place that knows both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esvit_core.config import Config

# Option -> setting, where the values are the same.
_SAME = {
    "out_dim": "head.out_dim",
    "norm_last_layer": "head.norm_last_layer",
    "use_dense_prediction": "objective.region",
    "warmup_teacher_temp": "objective.warmup_teacher_temp",
    "teacher_temp": "objective.teacher_temp",
    "warmup_teacher_temp_epochs": "objective.warmup_teacher_temp_epochs",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "warmup_epochs": "optimizer.warmup_epochs",
    "weight_decay": "optimizer.weight_decay",
    "weight_decay_end": "optimizer.weight_decay_end",
    "clip_grad": "optimizer.clip_grad",
    "freeze_last_layer": "optimizer.freeze_last_layer_epochs",
    "momentum_teacher": "optimizer.teacher_momentum",
    "epochs": "training.epochs",
    "seed": "seed",
}


def published_arguments(config: Config) -> dict[str, Any]:
    """The command line with which the published code would do the run; the global batch on one device."""
    values = config.model_dump(mode="python")
    return {
        "arch": config.model.arch.rpartition("_w")[0] if config.model.arch.startswith("swin_") else config.model.arch,
        "cfg": _cfg(config.model.arch),
        "opts": [],
        "patch_size": config.model.patch_size or 16,
        **{option: _at(values, setting) for option, setting in _SAME.items()},
        "batch_size_per_gpu": config.training.batch_size,
        "world_size": 1,
        "rank": 0,
        "gpu": 0,
    }


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a published command line names, as a nested mapping; what it does not name is left out."""
    settings: dict[str, Any] = {}
    for option, setting in _SAME.items():
        if option in arguments:
            *sections, leaf = setting.split(".")
            place = settings
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = arguments[option]
    batch, processes = arguments.get("batch_size_per_gpu"), arguments.get("world_size")
    if isinstance(batch, int) and isinstance(processes, int):
        settings.setdefault("training", {})["batch_size"] = batch * processes
    return settings


def _cfg(arch: str) -> str:
    """The published code's file with the sizes of the network; none for plain ViTs and ResNets."""
    name, _, window = arch.rpartition("_w")
    if name.startswith("swin"):
        return f"experiments/imagenet/swin/{name}_patch4_window{window}_224.yaml"
    files = {"cvt_tiny": "cvt_v4/s1.yaml", "vil_2262": "vil/vil_small/base.yaml"}
    return f"experiments/imagenet/{files[arch]}" if arch in files else ""


def _at(values: Mapping[str, Any], setting: str) -> Any:
    for key in setting.split("."):
        values = values[key]
    return values
