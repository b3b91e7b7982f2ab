"""Held-out images with their nearest training images, and the worst classes with images, for the report.

A report reads few shards: the neighbors are searched among the training images of the first shards, which are in
pseudo-random order, and the held-out images are those of the first shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.evaluation.features import Features
from esvit_core.evaluation.knn import nearest
from esvit_core.evaluation.outcomes import unpack_correct
from esvit_core.evaluation.results import Result
from esvit_core.evaluation.stored_features import load_features, stored_models
from esvit_core.reporting.images import thumbnail
from esvit_core.storage import ObjectStore, join_uri

_SIDE = 64  # pixels of a thumbnail
_NEIGHBORS, _OF_EACH_KIND = 5, 3  # shown: neighbors of a query, queries whose neighbor is right, and wrong
_BANK_SHARDS, _BANK_IMAGES, _QUERIES = 4, 20_000, 500  # searched
MOST_BYTES = 1e9  # of a file of features, which the pod of the report has to hold
_WORST_CLASSES, _MISTAKES = 3, 6


@dataclass(frozen=True)
class Shown:
    """A small image.

    Attributes:
        uri: the image as a data URI.
        name: name of the file in the source.
        label: its class; empty if it has none.
        right: whether the class is that of the query; None: one of the two has none.
    """

    uri: str
    name: str
    label: str
    right: bool | None = None


@dataclass(frozen=True)
class Query:
    """A held-out image and its nearest training images, nearest first, by model."""

    image: Shown
    neighbors: dict[str, list[Shown]]


@dataclass(frozen=True)
class WorstClass:
    """A class that the linear probe recognizes least, and held-out images of it that it takes for another class."""

    name: str
    correct: float
    images: int
    mistakes: list[Shown]


@dataclass(frozen=True)
class Neighbors:
    """The queries of the section, and how many training images were searched."""

    queries: list[Query]
    searched: int


def draw_neighbors(store: ObjectStore, run_uri: str) -> Neighbors | str:
    """Draw held-out images beside their nearest training images by the view features of both backbones.

    With labels, half of the images are such whose nearest neighbor has their class, and half are not, as far as there are.

    Returns:
        The images, or the reason why there are none.

    Raises:
        UserError: the features have not been extracted, or are too large.
    """
    data = join_uri(run_uri, "data")
    manifest = Manifest.read(store, data)
    if not all(split in manifest.splits and manifest.splits[split].samples for split in ("train", "val")):
        return "no images are held out"
    bank, held_out = ShardDataset(store, data, "train"), ShardDataset(store, data, "val")
    size = min(_BANK_IMAGES, sum(bank.shard_sizes[:_BANK_SHARDS]))
    count = min(_QUERIES, held_out.shard_sizes[0])
    found = {}
    for model in stored_models(store, run_uri):
        train, val = (load_features(store, run_uri, model, split, most_bytes=MOST_BYTES) for split in ("train", "val"))
        found[model] = _nearest_images(val, train, count, size)
    labels = (held_out.labels[:count], bank.labels[:size])
    queries = [
        Query(
            _shown(held_out, query, manifest.classes),
            {
                model: [_shown(bank, int(i), manifest.classes, int(labels[0][query])) for i in rows[query]]
                for model, rows in found.items()
            },
        )
        for query in choose_queries(labels[0], labels[1][found["trained"][:, 0]])
    ]
    return Neighbors(queries, size)


def choose_queries(labels: np.ndarray, nearest_labels: np.ndarray) -> list[int]:
    """Choose images of different classes: first such whose nearest neighbor is of their class, then such where it is not.

    Args:
        labels: class of each image, -1 for none, (N,).
        nearest_labels: class of the nearest neighbor of each, (N,).
    """
    right = (labels == nearest_labels) & (labels >= 0)
    chosen: list[int] = []
    for kind in (right, ~right):
        members = np.flatnonzero(kind)
        _, firsts = np.unique(labels[members], return_index=True)
        spread = [*members[np.sort(firsts)], *np.delete(members, firsts)]
        chosen += [int(i) for i in spread[: _OF_EACH_KIND if (labels >= 0).any() else 2 * _OF_EACH_KIND]]
    return chosen


def draw_worst_classes(
    store: ObjectStore, run_uri: str, manifest: Manifest, results: Sequence[Result]
) -> list[WorstClass]:
    """Draw held-out images that the linear probe of the trained backbone takes for another class, of the worst classes.

    Only images of the first shard are shown. Without the outcomes of single images there are none.
    """
    linear: Mapping[str, object] = next((r for r in results if r.get("name") == "linear"), {})
    outcomes = linear.get("outcomes")
    if not isinstance(outcomes, dict) or "val" not in manifest.splits:
        return []
    correct = unpack_correct(outcomes, "trained", "linear")
    dataset = ShardDataset(store, join_uri(run_uri, "data"), "val")
    labels = dataset.labels
    if correct is None or len(correct) != len(labels):  # of a class that no training image has, none is measured
        return []
    shares = {int(each): float(correct[labels == each].mean()) for each in np.unique(labels) if each >= 0}
    worst = []
    for each in sorted((each for each in shares if shares[each] < 1), key=lambda e: (shares[e], e))[:_WORST_CLASSES]:
        wrong = np.flatnonzero((labels == each) & ~correct)
        mistakes = [int(i) for i in wrong[wrong < dataset.shard_sizes[0]][:_MISTAKES]]
        if mistakes:
            shown = [_shown(dataset, number, manifest.classes) for number in mistakes]
            worst.append(WorstClass(manifest.classes[each], 100 * shares[each], int((labels == each).sum()), shown))
    return worst


def _nearest_images(queries: Features, bank: Features, count: int, size: int) -> np.ndarray:
    """Positions of the nearest of the first ``size`` features of the bank to each of the first ``count`` queries."""
    if len(queries) < count or len(bank) < size:
        raise UserError("the features are not those of the prepared images")
    first, second = (
        F.normalize(torch.as_tensor(f.view[:n]).float(), dim=1) for f, n in ((queries, count), (bank, size))
    )
    return nearest(first, second, min(_NEIGHBORS, size))[1].numpy()


def _shown(dataset: ShardDataset, number: int, classes: Sequence[str], of: int | None = None) -> Shown:
    label = int(dataset.label(number))
    known = 0 <= label < len(classes)
    return Shown(
        thumbnail(dataset.image(number), _SIDE),
        dataset.name(number),
        classes[label] if known else "",
        label == of if known and of is not None and of >= 0 else None,
    )
