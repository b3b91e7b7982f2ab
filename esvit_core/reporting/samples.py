"""Sample images of a run with their training crops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from esvit_core.config import Config
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.reporting.images import thumbnail
from esvit_core.storage import ObjectStore, join_uri

_IMAGES = 6


@dataclass(frozen=True)
class Sample:
    """An image and its crops, as data URIs.

    Attributes:
        name: name of the file in the source.
        label: class; empty if it has none.
        image: the stored image.
        size: width and height of the stored image, pixels.
        global_crops, local_crops: crops of the first epoch.
    """

    name: str
    label: str
    image: str
    size: tuple[int, int]
    global_crops: list[str]
    local_crops: list[str]


def draw_samples(store: ObjectStore, run_uri: str, config: Config, classes: list[str]) -> list[Sample]:
    """Draw the crops of a few training images from different classes, augmented as in the first epoch."""
    multicrop = MultiCrop(config.augment)
    dataset = ShardDataset(store, join_uri(run_uri, "data"), "train")
    labels = dataset.labels[: dataset.shard_sizes[0]]  # read one shard only
    return [_sample(dataset, i, multicrop, config, classes) for i in _spread(labels, _IMAGES)]


def _sample(dataset: ShardDataset, index: int, multicrop: MultiCrop, config: Config, classes: list[str]) -> Sample:
    image = dataset.image(index)
    crops = multicrop(image, sample_rng(config.seed, 0, index))
    shown = [thumbnail(_pixels(crop, config)) for crop in crops]
    first = config.augment.global_crops.number
    label = int(dataset.label(index))
    return Sample(
        name=dataset.name(index),
        label=classes[label] if 0 <= label < len(classes) else "",
        image=thumbnail(image),
        size=(image.shape[1], image.shape[0]),
        global_crops=shown[:first],
        local_crops=shown[first:],
    )


def _spread(labels: np.ndarray, count: int) -> list[int]:
    """Choose the first image of evenly spaced classes, then evenly spaced other images."""
    _, firsts = np.unique(labels, return_index=True)
    chosen = [
        int(firsts[i]) for i in np.unique(np.linspace(0, len(firsts) - 1, min(count, len(firsts))).round().astype(int))
    ]
    others = [int(i) for i in np.linspace(0, len(labels) - 1, 2 * count).round() if int(i) not in chosen]
    return (chosen + list(dict.fromkeys(others)))[: min(count, len(labels))]


def _pixels(crop: torch.Tensor, config: Config) -> np.ndarray:
    """The network's input (3, S, S) as an image (S, S, 3) uint8."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.augment.mean, config.augment.std))
    return ((crop * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
