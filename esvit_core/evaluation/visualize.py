"""Visualize region correspondence and attention of the trained backbone next to the baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from esvit_core.config import Config
from esvit_core.data.loading.augment import MultiCrop
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.evaluation import plots
from esvit_core.evaluation.attention_maps import attention_maps, shows_attention
from esvit_core.evaluation.correspondence import (
    Pair,
    accuracy,
    chance_level,
    draw_pairs,
    match_pairs,
    regions_per_side,
)
from esvit_core.evaluation.features import eval_transform, load_model, split_datasets
from esvit_core.evaluation.imported_features import NO_NETWORK, has_network
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.runs.gpus import computing_device
from esvit_core.storage import ObjectStore, join_uri

INDEX = "visualization.json"
# Left to right in the figures: before and after training.
_COLUMNS = ("baseline", "trained")
_MIN_QUERIES = 0.4  # minimum fraction of a crop's regions that are queries for a pair to be shown first


@dataclass
class _Gallery:
    """Results that :func:`visualize` collects."""

    files: dict[str, bytes] = field(default_factory=dict)
    images: list[dict[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def add(self, file: str, png: bytes, title: str, caption: str) -> None:
        self.files[file] = png
        self.images.append({"file": file, "title": title, "caption": caption})

    def leave_out(self, what: str, reason: str) -> None:
        self.left_out.append({"what": what, "reason": reason})


def visualize(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    """Measure correspondence, draw it and the attention maps, and publish them in ``visualization/`` of the run.

    The images are held-out images, or training images if none are held out. If the output is already complete, it is
    returned unchanged.

    Returns:
        The content of ``visualization/visualization.json``: ``images`` (file, title, caption), ``figures`` (correspondence:
        trained, baseline and chance in percent, numbers of images and regions), ``left_out`` (what, reason).
    """
    prefix = join_uri(run_uri, "visualization")
    if store.read_manifest(prefix) is not None:
        return store.get_json(join_uri(prefix, INDEX))
    gallery = _Gallery()
    if has_network(store, run_uri):
        _draw(gallery, run_uri, store, config)
    else:
        gallery.leave_out("correspondence and attention", NO_NETWORK)
    index = {"images": gallery.images, "figures": gallery.figures, "left_out": gallery.left_out}
    gallery.files[INDEX] = (json.dumps(index, indent=1) + "\n").encode()
    store.publish(prefix, gallery.files, "visualization")
    return index


def _draw(gallery: _Gallery, run_uri: str, store: ObjectStore, config: Config) -> None:
    datasets = split_datasets(store, join_uri(run_uri, "data"))
    dataset = datasets.get("val") or datasets["train"]
    models = {model: _on_device(load_model(run_uri, model, store)) for model in _COLUMNS}
    chosen = spread(dataset.labels, config.evaluation.correspondence_images, config.seed)
    pairs = _pairs(gallery, dataset, chosen, models["trained"], config)
    shown = _informative_first(chosen, pairs)[: config.evaluation.visualization]
    _correspondence(gallery, pairs, [i for i in shown if i in pairs], models, config)
    _attention(gallery, dataset, shown, models, config)


def spread(labels: np.ndarray, count: int, seed: int) -> list[int]:
    """Choose images at random, cycling through the classes.

    Args:
        labels: (N,); -1 counts as a class, too.
        count: number of images.
        seed: seed of the choice.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    # The rank of an image within its class is the round in which it is chosen.
    rounds = np.zeros(len(labels), dtype=int)
    for value in np.unique(labels):
        members = order[labels[order] == value]
        rounds[members] = np.arange(len(members))
    return order[np.argsort(rounds[order], kind="stable")][:count].tolist()


def _pairs(
    gallery: _Gallery, dataset: ShardDataset, chosen: list[int], backbone: nn.Module, config: Config
) -> dict[int, Pair]:
    try:
        side = regions_per_side(backbone, config.augment.global_crops.size)
    except ValueError as error:
        gallery.leave_out("correspondence", str(error))
        return {}
    pairs = draw_pairs(dataset, chosen, MultiCrop(config.augment), config.seed, side)
    if not pairs:
        gallery.leave_out("correspondence", "no image has two crops that share a region that is not blank")
    return pairs


def _correspondence(
    gallery: _Gallery, by_image: Mapping[int, Pair], shown: list[int], models: Mapping[str, nn.Module], config: Config
) -> None:
    pairs = list(by_image.values())
    if not pairs:
        return
    with ProgressLine(len(pairs) * len(models), unit="pairs of crops", label="correspondence") as progress:
        matches = {m: match_pairs(b, pairs, config.evaluation.batch_size, progress) for m, b in models.items()}
    accuracies = {model: accuracy(pairs, of_model) for model, of_model in matches.items()}
    queries = [int(pair.queries.sum()) for pair in pairs]
    by_chance = 100 * float(np.average([chance_level(pair) for pair in pairs], weights=queries))
    gallery.figures["correspondence"] = {model: round(value, 4) for model, value in accuracies.items()} | {
        "chance": round(by_chance, 4),
        "images": len(pairs),
        "regions": sum(queries),
        "unit": "%",
    }
    if not shown:
        gallery.leave_out("correspondence image", "evaluation.visualization is 0")
        return
    rows = [list(by_image).index(i) for i in shown]
    png = plots.correspondence_figure(
        [pairs[row] for row in rows],
        {model: [of_model[row] for row in rows] for model, of_model in matches.items()},
        accuracies,
    )
    gallery.add(
        "correspondence.png",
        png,
        "Correspondence",
        "Two crops of one image; each line joins a region of the left crop to its most similar region in the right "
        "crop by the backbone's features. Green: at most one region away from the true position. Red, dashed: wrong. "
        f"Over {sum(queries):,} regions of {len(pairs):,} images {accuracies['trained']:.1f} % are correct, baseline "
        f"{accuracies['baseline']:.1f} %, chance {by_chance:.1f} %. Blank regions are not counted.",
    )


def _attention(
    gallery: _Gallery, dataset: ShardDataset, chosen: list[int], models: Mapping[str, nn.Module], config: Config
) -> None:
    if not chosen:
        gallery.leave_out("attention", "evaluation.visualization is 0")
        return
    transform = eval_transform(config)
    inputs = torch.stack([transform(dataset.image(i)) for i in chosen])  # (B, 3, S, S)
    try:
        maps = {model: attention_maps(backbone, inputs) for model, backbone in models.items()}
    except ValueError as error:
        gallery.leave_out("attention", f"{config.model.arch}: {error}")
        return
    png = plots.attention_figure(_shown(inputs, config), list(maps["trained"]), list(maps["baseline"]))
    if not shows_attention(models["trained"], inputs):
        gallery.add(
            "attention.png",
            png,
            "Region norms",
            "Norm of the feature at each position of the image (brighter is larger), baseline and trained "
            f"({config.model.arch} has no attention to show). Each map has its own scale.",
        )
        return
    heads = maps["trained"].shape[1]
    of_heads = f"{plots.heads_shown(heads)} of the {heads} heads" if plots.heads_shown(heads) < heads else "each head"
    gallery.add(
        "attention.png",
        png,
        "Attention",
        "Attention that each position of the image receives in the last block (brighter is more): the mean over the "
        f"heads, baseline and trained, and {of_heads} of the trained backbone. Each map has its own scale.",
    )


def _informative_first(chosen: list[int], pairs: Mapping[int, Pair]) -> list[int]:
    """Sort images with few or no queries to the end; the order is otherwise kept."""

    def has_few_queries(index: int) -> bool:
        return index not in pairs or pairs[index].queries.mean() < _MIN_QUERIES

    return sorted(chosen, key=has_few_queries)


def _shown(inputs: torch.Tensor, config: Config) -> list[np.ndarray]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.augment.mean, config.augment.std))
    pixels = ((inputs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).numpy())


def _on_device(backbone: nn.Module) -> nn.Module:
    return backbone.to(computing_device())
