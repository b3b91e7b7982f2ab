"""The recipe, the training and the lineage of a run as rows of name and value."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config, CropConfig
from esvit_core.monitoring.progress_line import format_duration, format_figure
from esvit_core.reporting.facts import Facts
from esvit_core.runs.training_summary import TrainingSummary

_AUGMENTATION = {"dino": "colour jitter, grey, blur, solarisation", "deit": "RandAugment, random erasing"}
_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "lars": "LARS"}


@dataclass(frozen=True)
class Fact:
    """A row of a two-column table; ``published`` is what the ImageNet recipe of the paper has there."""

    name: str
    value: str
    published: str = ""


def recipe_rows(facts: Facts) -> list[Fact]:
    """The settings that make the result, beside the published ones."""
    ours, published = _recipe(facts.config), _recipe(Config())
    rows = [Fact(name, value, published[name]) for name, value in ours.items()]
    backbone = facts.backbone.value
    if backbone is not None:
        size = [
            Fact(
                "parameters of the backbone", f"{backbone['parameters']:,}" if "parameters" in backbone else "unknown"
            ),
            Fact(
                "size of the view feature", f"{backbone['num_features']:,}" if "num_features" in backbone else "unknown"
            ),
        ]
        rows[1:1] = size
    return rows


def training_rows(training: TrainingSummary, log: list[dict[str, Any]]) -> list[Fact]:
    """What the training took."""
    rows = [
        Fact("steps", f"{training.steps:,}"),
        Fact("epochs", f"{training.epochs:,}"),
        Fact("images seen", f"{training.images:,}"),
        Fact("time", format_duration(training.seconds)),
        Fact("speed", f"{format_figure(float(training.images_per_second))} images/s"),
        Fact("final loss", f"{training.final_loss:.3f}"),
        Fact("arithmetic", training.precision),
        Fact("processes", f"{training.processes}, {training.threads} {_plural(training.threads, 'thread')} each"),
    ]
    waits = [line["data_wait"] for line in log if isinstance(line.get("data_wait"), (int, float))]
    if waits:
        rows.append(Fact("time spent waiting for data", f"{100 * sum(waits) / len(waits):.1f} %"))
    rows.append(Fact("interruptions", _resumes(training.resumes)))
    return rows


def data_rows(facts: Facts) -> list[Fact]:
    """What the run was trained and measured on."""
    manifest = facts.manifest.value
    if manifest is None:
        return []
    splits = manifest.splits
    names = {"train": "images to train on", "val": "images held out", "test": "test images, not used"}
    rows = [Fact("source", str(manifest.source))]
    rows += [Fact(names.get(name, name), f"{split.samples:,}") for name, split in splits.items()]
    rows.append(Fact("classes", f"{len(manifest.classes):,}" if manifest.classes else "none: unlabelled"))
    shards = sum(len(split.shards) for split in splits.values())
    rows.append(Fact("stored", f"{size(manifest.bytes)} in {shards:,} {_plural(shards, 'shard')}"))
    counts = {
        "re-encoded (shrunk, turned, ...)": manifest.reencoded,
        "bad files": manifest.bad.count,
        "copies of another image, kept": manifest.copies,
        "ignored (.DS_Store and the like)": manifest.ignored,
        "replaced by a later entry of the same name": manifest.duplicates,
        "not chosen (data.max_images)": manifest.not_chosen,
    }
    return rows + [Fact(name, f"{count:,}") for name, count in counts.items() if count or name == "bad files"]


def lineage_rows(facts: Facts) -> list[Fact]:
    """Where the result comes from, to make it again or to doubt it."""
    manifest, backbone = facts.manifest.value, facts.backbone.value
    training = facts.training.value
    rows = [
        Fact("run", facts.run_uri),
        Fact("recipe", facts.config.recipe),
        Fact("configuration, SHA-256", facts.config.digest()),
        Fact("data fingerprint, SHA-256", manifest.fingerprint if manifest else f"unknown: {facts.manifest.reason}"),
        Fact("backbone, SHA-256", _weights(backbone) if backbone else f"unknown: {facts.backbone.reason}"),
        Fact("commit", facts.commit or "unknown: not run from a git checkout, and ESVIT_COMMIT is not set"),
        Fact("packages", ", ".join(f"{name} {version}" for name, version in facts.versions.items()) or "unknown"),
        Fact("hardware", _hardware(training.hardware) if training else f"unknown: {facts.training.reason}"),
        Fact("report written", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    return rows


def size(count: int) -> str:
    """Bytes as people read them."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "bytes" else f"{count:,} bytes"
        value /= 1000
    return f"{value:,.3g} TB"


def _recipe(config: Config) -> dict[str, str]:
    objective, optimizer, training, head = config.objective, config.optimizer, config.training, config.head
    peak = optimizer.lr * training.batch_size / 256
    warm = objective.warmup_teacher_temp_epochs
    return {
        "network": _network(config),
        "objective": "view + region" if objective.region else "view only",
        "prototypes K": f"{head.out_dim:,}",
        "projection head": f"{head.hidden_dim:,} - {head.hidden_dim:,} - {head.bottleneck_dim:,}"
        + (" with batch norm" if head.batch_norm else ""),
        "global crops": _crops([config.augment.global_crops]),
        "local crops": _crops(config.augment.local_kinds),
        "augmentation": _AUGMENTATION[config.augment.policy],
        "mixup and CutMix": f"of the first {config.mixup.crops} crops" if config.mixup.use else "none",
        "epochs": f"{training.epochs:,}",
        "batch": f"{training.batch_size:,} images",
        "optimizer": _OPTIMIZERS[optimizer.name],
        "learning rate": f"{_plain(peak)} at its peak, {_epochs(optimizer.warmup_epochs)} of warm-up, cosine to {_plain(optimizer.min_lr)}",
        "weight decay": f"{optimizer.weight_decay:g} to {optimizer.weight_decay_end:g}",
        "gradient clipped at norm": f"{optimizer.clip_grad:g}" if optimizer.clip_grad else "not clipped",
        "teacher momentum": f"{optimizer.teacher_momentum:g} to 1",
        "teacher temperature": f"{objective.warmup_teacher_temp:g} to {objective.teacher_temp:g} over {_epochs(warm)}",
        "student temperature": f"{objective.student_temp:g}",
        "stochastic depth": f"{config.model.drop_path:g}",
        "seed": f"{config.seed}",
        "weights at the start": start_of(config) or "drawn from the seed",
    }


def start_of(config: Config) -> str:
    """What the run started from, in words; empty where its weights were drawn."""
    init = config.init
    if init.source is None:
        return ""
    taken = {
        "backbone": "the backbone",
        "heads": "both networks with their heads",
        "all": "both networks, the optimizer and the position",
    }
    digest = f" (SHA-256 {init.sha256[:12]})" if init.sha256 else ""
    return f"{taken[init.take]} of {init.source}{digest}"


def _network(config: Config) -> str:
    model = config.model
    parts = [model.arch]
    if model.depths:
        parts.append("depths " + "-".join(map(str, model.depths)))
    if model.num_heads:
        parts.append("heads " + "-".join(map(str, model.num_heads)))
    named = (("width", model.embed_dim), ("patch", model.patch_size), ("window", model.window_size))
    parts += [f"{name} {value}" for name, value in named if value is not None]
    return ", ".join(parts)


def _crops(kinds: Sequence[CropConfig]) -> str:
    return (
        "; ".join(
            f"{kind.number} of {kind.size} px, {100 * kind.scale[0]:g} to {100 * kind.scale[1]:g} % of the image"
            for kind in kinds
            if kind.number
        )
        or "none"
    )


def _resumes(steps: list[int]) -> str:
    if not steps:
        return "none"
    shown = ", ".join(f"{step:,}" for step in steps[:12]) + (", …" if len(steps) > 12 else "")
    return f"{len(steps)}; went on from the checkpoint at step {shown}"


def _weights(backbone: Mapping[str, Any]) -> str:
    return str(backbone.get("weights", {}).get("sha256", "unknown"))


def _hardware(found: Mapping[str, Any]) -> str:
    units = {"cores": "{} cores", "memory_gib": "{} GiB of memory", "gpus": "{} GPUs"}
    return ", ".join(units.get(name, "{}").format(value) for name, value in found.items()) or "unknown"


def _plain(value: float) -> str:
    """Without an exponent, which a line may break in two."""
    return f"{value:.10f}".rstrip("0").rstrip(".")


def _epochs(count: int) -> str:
    return f"{count:,} {_plural(count, 'epoch')}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"
