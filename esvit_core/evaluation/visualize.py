"""Images of what the backbone sees: correspondence of regions and attention, trained beside untrained."""

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
from esvit_core.evaluation.correspondence import Pair, chance, draw_pairs, match_pairs, regions_per_side, share_right
from esvit_core.evaluation.features import eval_transform, load_model, split_datasets
from esvit_core.monitoring.progress_line import Progress
from esvit_core.storage import ObjectStore, join_uri

INDEX = "visualization.json"
# Left to right in the figures: before, after.
_COLUMNS = ("untrained", "trained")
_TELLING = 0.4  # share of a crop's regions asked from which on a pair makes an image


@dataclass
class _Drawn:
    """What :func:`visualize` collects."""

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
    """Measure correspondence, draw it and the attention maps, and publish all below ``visualization/`` of the run.

    The images are held-out ones, or training ones where none are held out. Returns what is there when it is
    complete already.

    Returns:
        The content of ``visualization/visualization.json``: ``images`` (file, title, caption), ``figures`` (correspondence:
        trained, untrained and chance in percent, images and regions counted), ``left_out`` (what, reason).
    """
    prefix = join_uri(run_uri, "visualization")
    if store.read_manifest(prefix) is not None:
        return store.get_json(join_uri(prefix, INDEX))
    drawn = _Drawn()
    datasets = split_datasets(store, join_uri(run_uri, "data"))
    dataset = datasets.get("val") or datasets["train"]
    models = {model: _on_device(load_model(run_uri, model, store)) for model in _COLUMNS}
    chosen = spread(dataset.labels, config.evaluation.correspondence_images, config.seed)
    pairs = _pairs(drawn, dataset, chosen, models["trained"], config)
    shown = _telling(chosen, pairs)[: config.evaluation.visualization]
    _correspondence(drawn, pairs, [i for i in shown if i in pairs], models, config)
    _attention(drawn, dataset, shown, models, config)
    index = {"images": drawn.images, "figures": drawn.figures, "left_out": drawn.left_out}
    drawn.files[INDEX] = (json.dumps(index, indent=1) + "\n").encode()
    store.publish(prefix, drawn.files, "visualization")
    return index


def spread(labels: np.ndarray, count: int, seed: int) -> list[int]:
    """A seeded choice of images that takes the classes in turn.

    Args:
        labels: (N,); -1 counts as a class too.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    # The rank of an image within its class says in which round it is taken.
    rounds = np.zeros(len(labels), dtype=int)
    for value in np.unique(labels):
        members = order[labels[order] == value]
        rounds[members] = np.arange(len(members))
    return order[np.argsort(rounds[order], kind="stable")][:count].tolist()


def _pairs(
    drawn: _Drawn, dataset: ShardDataset, chosen: list[int], backbone: nn.Module, config: Config
) -> dict[int, Pair]:
    try:
        side = regions_per_side(backbone, config.augment.global_crops.size)
    except ValueError as error:
        drawn.leave_out("correspondence", str(error))
        return {}
    pairs = draw_pairs(dataset, chosen, MultiCrop(config.augment), config.seed, side)
    if not pairs:
        drawn.leave_out("correspondence", "no image gave two crops that share a region that is not blank")
    return pairs


def _correspondence(
    drawn: _Drawn, by_image: Mapping[int, Pair], shown: list[int], models: Mapping[str, nn.Module], config: Config
) -> None:
    pairs = list(by_image.values())
    if not pairs:
        return
    with Progress(len(pairs) * len(models), unit="pairs of crops", label="correspondence") as progress:
        matches = {m: match_pairs(b, pairs, config.evaluation.batch_size, progress) for m, b in models.items()}
    shares = {model: share_right(pairs, found) for model, found in matches.items()}
    asked = [int(pair.asked.sum()) for pair in pairs]
    by_chance = 100 * float(np.average([chance(pair) for pair in pairs], weights=asked))
    drawn.figures["correspondence"] = {model: round(share, 4) for model, share in shares.items()} | {
        "chance": round(by_chance, 4),
        "images": len(pairs),
        "regions": sum(asked),
        "unit": "%",
    }
    if not shown:
        drawn.leave_out("correspondence image", "evaluation.visualization is 0")
        return
    rows = [list(by_image).index(i) for i in shown]
    png = plots.correspondence_figure(
        [pairs[row] for row in rows], {model: [found[row] for row in rows] for model, found in matches.items()}, shares
    )
    drawn.add(
        "correspondence.png",
        png,
        "Correspondence",
        "Two crops of one image; each line joins a region of the left crop to its most similar region of the right "
        "one by the backbone's features. Green: at most one region away from the true place. Red, dashed: wrong. "
        f"Over {sum(asked):,} regions of {len(pairs):,} images {shares['trained']:.1f} % are right, untrained "
        f"{shares['untrained']:.1f} %, by chance {by_chance:.1f} %. Blank regions are not counted.",
    )


def _attention(
    drawn: _Drawn, dataset: ShardDataset, chosen: list[int], models: Mapping[str, nn.Module], config: Config
) -> None:
    if not chosen:
        drawn.leave_out("attention", "evaluation.visualization is 0")
        return
    transform = eval_transform(config)
    inputs = torch.stack([transform(dataset.image(i)) for i in chosen])  # (B, 3, S, S)
    try:
        maps = {model: attention_maps(backbone, inputs) for model, backbone in models.items()}
    except ValueError as error:
        drawn.leave_out("attention", f"{config.model.arch}: {error}")
        return
    png = plots.attention_figure(_shown(inputs, config), list(maps["trained"]), list(maps["untrained"]))
    if not shows_attention(models["trained"], inputs):
        drawn.add(
            "attention.png",
            png,
            "Strength of the regions",
            "How long the feature of each place of the image is, the brighter the longer, untrained and trained "
            f"({config.model.arch} shows no attention). Each map has its own scale.",
        )
        return
    heads = maps["trained"].shape[1]
    of_heads = f"{plots.heads_shown(heads)} of the {heads} heads" if plots.heads_shown(heads) < heads else "each head"
    drawn.add(
        "attention.png",
        png,
        "Attention",
        "How much attention each place of the image receives in the last block, the brighter the more: the mean over "
        f"the heads, untrained and trained, and {of_heads} of the trained backbone. Each map has its own scale.",
    )


def _telling(chosen: list[int], pairs: Mapping[int, Pair]) -> list[int]:
    """The images in their order, but those last of which the crops show little: few regions asked, or none."""

    def little(index: int) -> bool:
        return index not in pairs or pairs[index].asked.mean() < _TELLING

    return sorted(chosen, key=little)


def _shown(inputs: torch.Tensor, config: Config) -> list[np.ndarray]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.augment.mean, config.augment.std))
    pixels = ((inputs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).numpy())


def _on_device(backbone: nn.Module) -> nn.Module:
    return backbone.to("cuda" if torch.cuda.is_available() else "cpu")
