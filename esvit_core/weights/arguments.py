"""Mapping between command-line options of the published code and settings of this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esvit_core.config import AugmentConfig, Config

# Option -> setting, for options with the same values.
_SAME = {
    "out_dim": "head.out_dim",
    "norm_last_layer": "head.norm_last_layer",
    "use_bn_in_head": "head.batch_norm",
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
    "optimizer": "optimizer.name",
    "aa": "augment.deit.rand_augment",
    "reprob": "augment.deit.erase",
    "remode": "augment.deit.erase_mode",
    "recount": "augment.deit.erase_count",
    "train_interpolation": "augment.deit.interpolation",
    "use_mixup": "mixup.use",
    "num_mixup_views": "mixup.crops",
    "mixup": "mixup.mixup_alpha",
    "cutmix": "mixup.cutmix_alpha",
    "cutmix_minmax": "mixup.cutmix_minmax",
    "mixup_prob": "mixup.prob",
    "mixup_switch_prob": "mixup.switch_prob",
    "mixup_mode": "mixup.mode",
    "smoothing": "mixup.smoothing",
    "epochs": "training.epochs",
    "seed": "seed",
}


def published_arguments(config: Config) -> dict[str, Any]:
    """Return the published code's command line for the run, with the global batch on one device."""
    values = config.model_dump(mode="python")
    return {
        "arch": config.model.arch.rpartition("_w")[0] if config.model.arch.startswith("swin_") else config.model.arch,
        "cfg": _cfg(config.model.arch),
        "opts": [],
        "patch_size": config.model.patch_size or 16,
        **{option: _at(values, setting) for option, setting in _SAME.items()},
        **_crop_arguments(config.augment),
        "batch_size_per_gpu": config.training.batch_size,
        "world_size": 1,
        "rank": 0,
        "gpu": 0,
    }


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a published command line contains, as a nested mapping."""
    settings: dict[str, Any] = {}
    for option, setting in _SAME.items():
        if option in arguments:
            *sections, leaf = setting.split(".")
            target = settings
            for section in sections:
                target = target.setdefault(section, {})
            target[leaf] = arguments[option]
    if "aug_opt" in arguments:
        settings.setdefault("augment", {}).update(_crop_settings(arguments))
    batch, processes = arguments.get("batch_size_per_gpu"), arguments.get("world_size")
    if isinstance(batch, int) and isinstance(processes, int):
        settings.setdefault("training", {})["batch_size"] = batch * processes
    return settings


def _crop_arguments(augment: AugmentConfig) -> dict[str, Any]:
    """Return the crop options; the published code has one scale for all local crops, here that of the first kind."""
    kinds = augment.local_kinds
    return {
        "aug_opt": f"{augment.policy}_aug",
        "global_crops_scale": augment.global_crops.scale,
        "local_crops_number": tuple(kind.number for kind in kinds),
        "local_crops_size": tuple(kind.size for kind in kinds),
        "local_crops_scale": kinds[0].scale if kinds else (0.05, 0.4),
    }


def _crop_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    policy = str(arguments["aug_opt"]).removesuffix("_aug")
    kinds: list[dict[str, Any]] = [
        {"size": size, "number": number}
        for size, number in zip(
            arguments.get("local_crops_size", (96,)), arguments.get("local_crops_number", (8,)), strict=False
        )
    ]
    settings: dict[str, Any] = {"policy": policy, "global_crops": {}}
    if policy == "dino":  # the published `deit_aug` ignores the scales
        settings["global_crops"] = {"scale": tuple(arguments.get("global_crops_scale", (0.4, 1.0)))}
        for kind in kinds:
            kind["scale"] = tuple(arguments.get("local_crops_scale", (0.05, 0.4)))
    settings["local_crops"] = kinds[0] if len(kinds) == 1 else kinds
    return settings


def _cfg(arch: str) -> str:
    """Return the published configuration file of the network; empty for plain ViTs and ResNets."""
    name, _, window = arch.rpartition("_w")
    if name.startswith("swin"):
        return f"experiments/imagenet/swin/{name}_patch4_window{window}_224.yaml"
    files = {"cvt_tiny": "cvt_v4/s1.yaml", "vil_2262": "vil/vil_small/base.yaml"}
    return f"experiments/imagenet/{files[arch]}" if arch in files else ""


def _at(values: Mapping[str, Any], setting: str) -> Any:
    for key in setting.split("."):
        values = values[key]
    return values
