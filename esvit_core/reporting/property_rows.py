"""The recipe, data, training and lineage of a run as rows of name and value."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config, CropConfig
from esvit_core.monitoring.progress_line import format_duration, format_figure
from esvit_core.reporting.run_records import RunRecords
from esvit_core.runs.training_summary import TrainingSummary

_AUGMENTATION = {"dino": "colour jitter, greyscale, blur, solarisation", "deit": "RandAugment, random erasing"}
_MODES = 6  # formats that are named
_NAMES = 6  # parameters that are named
_HIGH_WAIT = 0.05
_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "lars": "LARS"}


@dataclass(frozen=True)
class Property:
    """A row of name and value; ``published`` is the value of the paper's ImageNet recipe."""

    name: str
    value: str
    published: str = ""


def recipe_rows(records: RunRecords) -> list[Property]:
    """Build the rows of the recipe, with the published values; a file of features has none."""
    if records.of_features:
        return []
    ours, published = _recipe(records.config), _recipe(Config())
    rows = [Property(name, value, published[name]) for name, value in ours.items()]
    backbone = records.backbone.value
    if backbone is not None:
        size = [
            Property(
                "parameters of the backbone", f"{backbone['parameters']:,}" if "parameters" in backbone else "unknown"
            ),
            Property(
                "size of the view feature", f"{backbone['num_features']:,}" if "num_features" in backbone else "unknown"
            ),
        ]
        rows[1:1] = size
    rows += _initial_rows(records.initial) if records.initial else []
    chosen = "; ".join(" ".join(line.split()) for line in records.choice[1:])
    return [*rows, Property("chosen by the recipe auto", chosen)] if chosen else rows


def _initial_rows(record: Mapping[str, Any]) -> list[Property]:
    """Build the rows of what was taken from ``init.source``, and what was not."""
    taken = ", ".join(record["loaded"])
    if "entries" in record:
        taken = taken.replace("the backbone", f"the backbone ({record['entries']:,} entries)", 1)
    values = {
        "initial weights, taken": taken,
        "initial weights, resized": _listed(record.get("resized") or []),
        "initial weights, drawn from the seed": ", ".join(record["initialized"]),
        "initial weights, ignored in the source": _listed(record["ignored"]),
    }
    return [Property(name, value or "none") for name, value in values.items()]


def training_rows(training: TrainingSummary, log: list[dict[str, Any]]) -> list[Property]:
    """Build the rows of the training."""
    rows = [
        Property("steps", f"{training.steps:,}"),
        Property("epochs", f"{training.epochs:,}"),
        Property("images processed", f"{training.images:,}"),
        Property("time", format_duration(training.seconds)),
        Property("speed", f"{format_figure(float(training.images_per_second))} images/s"),
        Property("final loss", f"{training.final_loss:.3f}"),
        Property("arithmetic", training.precision),
        Property("processes", f"{training.processes}, {training.threads} {_plural(training.threads, 'thread')} each"),
    ]
    waits = [line["data_wait"] for line in log if isinstance(line.get("data_wait"), (int, float))]
    if waits:
        share = sum(waits) / len(waits)
        advice = "; raise training.workers" if share > _HIGH_WAIT else ""
        rows.append(Property("time spent waiting for data", f"{100 * share:.1f} %{advice}"))
    rows.append(Property("interruptions", _resumes(training.resumes)))
    return rows


def data_rows(records: RunRecords) -> list[Property]:
    """Build the rows of the data."""
    manifest = records.manifest.value
    if manifest is None:
        return []
    splits = manifest.splits
    names = {"train": "training images", "val": "held-out images", "test": "test images (not used)"}
    rows = [Property("source", str(manifest.source))]
    rows += [Property(names.get(name, name), f"{split.samples:,}") for name, split in splits.items()]
    rows.append(Property("classes", f"{len(manifest.classes):,}" if manifest.classes else "none (unlabelled)"))
    shards = manifest.shard_count
    rows.append(Property("stored", f"{size(manifest.bytes)} in {shards:,} {_plural(shards, 'shard')}"))
    rows += _statistics_rows(records.statistics) if records.statistics else []
    counts = {
        "duplicates, dropped (data.drop_duplicates)": manifest.dropped,
        "re-encoded (shrunk, rotated, ...)": manifest.reencoded,
        "bad files": manifest.bad.count,
        "duplicates of another image, kept": manifest.copies,
        "other files, ignored": manifest.ignored,
        "replaced by a later entry with the same name": manifest.duplicates,
        "not selected (data.max_images)": manifest.not_chosen,
    }
    return rows + [Property(name, f"{count:,}") for name, count in counts.items() if count or name == "bad files"]


def _statistics_rows(found: dict[str, Any]) -> list[Property]:
    """Build the rows of the statistics of the images."""
    rows = []
    if found["width"]:
        sides = [
            f"{name} {s['min']:,} to {s['max']:,}, median {s['median']:,}"
            for name in ("width", "height")
            if (s := found[name])
        ]
        rows.append(Property("sizes, pixels", "; ".join(sides)))
        aspect = found["aspect"]
        rows.append(
            Property("width / height", f"{aspect['min']:.2f} to {aspect['max']:.2f}, median {aspect['median']:.2f}")
        )
        modes = [f"{mode} ({count:,})" for mode, count in found["modes"].items()]
        rows.append(Property("formats", ", ".join(modes[:_MODES]) + (", ..." if len(modes) > _MODES else "")))
        rows.append(Property("mean color", "RGB {:.0f}, {:.0f}, {:.0f} of 255".format(*found["color"])))
    if classes := found["per_class"]:
        rows.append(
            Property(
                "training images per class", f"{classes['min']:,} to {classes['max']:,}, median {classes['median']:,}"
            )
        )
    for key, name in (("duplicates", "identical images"), ("near_duplicates", "images that look alike")):
        if "left_out" in found[key]:
            rows.append(Property(name, f"not counted: {found[key]['left_out']}"))
        else:
            groups = found[key]["groups"]
            text = f"{found[key]['images']:,} in {groups:,} {_plural(groups, 'group')}" if groups else "none"
            rows.append(Property(name, text))
    overlap = found["overlap"]
    rows.append(
        Property(
            "overlap with training images",
            f"{overlap['identical']:,} identical, {overlap['alike']:,} that look alike",
        )
    )
    return rows


def lineage_rows(records: RunRecords) -> list[Property]:
    """Build the rows of the lineage: all that is needed to reproduce the result."""
    manifest, backbone = records.manifest.value, records.backbone.value
    training = records.training.value
    rows = [
        Property("run", records.run_uri),
        Property("recipe", records.config.recipe),
        Property("configuration, SHA-256", records.config.digest()),
        Property(
            "data fingerprint, SHA-256", manifest.fingerprint if manifest else f"unknown: {records.manifest.reason}"
        ),
        Property("backbone, SHA-256", _weights(backbone) if backbone else f"unknown: {records.backbone.reason}"),
        Property("commit", records.commit or "unknown: not run from a git checkout, and ESVIT_COMMIT is not set"),
        Property("packages", ", ".join(f"{name} {version}" for name, version in records.versions.items()) or "unknown"),
        Property("hardware", _hardware(training.hardware) if training else f"unknown: {records.training.reason}"),
        Property("report written", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    return rows


def size(count: int) -> str:
    """Format bytes with a unit."""
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
        "mixup and CutMix": f"first {config.mixup.crops} crops" if config.mixup.use else "none",
        "epochs": f"{training.epochs:,}",
        "batch": f"{training.batch_size:,} images",
        "optimizer": _OPTIMIZERS[optimizer.name],
        "learning rate": f"{_plain(peak)} peak, {_epochs(optimizer.warmup_epochs)} of warm-up, cosine to {_plain(optimizer.min_lr)}",
        "weight decay": f"{optimizer.weight_decay:g} to {optimizer.weight_decay_end:g}",
        "gradient clipping norm": f"{optimizer.clip_grad:g}" if optimizer.clip_grad else "none",
        "teacher momentum": f"{optimizer.teacher_momentum:g} to 1",
        "teacher temperature": f"{objective.warmup_teacher_temp:g} to {objective.teacher_temp:g} over {_epochs(warm)}",
        "student temperature": f"{objective.student_temp:g}",
        "stochastic depth": f"{config.model.drop_path:g}",
        "seed": f"{config.seed}",
        "initial weights": start_of(config) or "drawn from the seed",
    }


def start_of(config: Config) -> str:
    """Describe the source of the initial weights; empty if they were drawn from the seed."""
    init = config.init
    if init.source is None:
        return ""
    taken = {
        "backbone": "the backbone",
        "heads": "both networks with their heads",
        "all": "both networks, the optimizer and the progress",
    }
    digest = f" (SHA-256 {init.sha256[:12]})" if init.sha256 else ""
    return f"{taken[init.load]} of {init.source}{digest}"


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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


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
    return f"{len(steps)}; resumed from the checkpoint at step {shown}"


def _weights(backbone: Mapping[str, Any]) -> str:
    return str(backbone.get("weights", {}).get("sha256", "unknown"))


def _hardware(found: Mapping[str, Any]) -> str:
    units = {"cores": "{} cores", "memory_gib": "{} GiB of memory", "gpus": "{} GPUs"}
    return ", ".join(units.get(name, "{}").format(value) for name, value in found.items()) or "unknown"


def _plain(value: float) -> str:
    """Format without an exponent, which could be broken across lines."""
    return f"{value:.10f}".rstrip("0").rstrip(".")


def _epochs(count: int) -> str:
    return f"{count:,} {_plural(count, 'epoch')}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"
