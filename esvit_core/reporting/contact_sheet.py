"""Small images for the report's section about the data: a contact sheet, and examples of duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from esvit_core.data.shards.reader import ShardDataset
from esvit_core.reporting.images import thumbnail
from esvit_core.storage import ObjectStore, join_uri

_IMAGES = 36  # on the contact sheet
_SIDE = 72  # pixels
_GROUPS = 3  # of duplicates; each image may be in another shard, which has to be read


@dataclass(frozen=True)
class Thumbnail:
    """A small image.

    Attributes:
        uri: the image as a data URI.
        name: name of the file in the source.
        split: split of the image.
    """

    uri: str
    name: str
    split: str


def draw_contact_sheet(store: ObjectStore, run_uri: str) -> list[Thumbnail]:
    """Draw evenly spaced training images of the first shard; they are stored in pseudo-random order."""
    dataset = ShardDataset(store, join_uri(run_uri, "data"), "train")
    count = dataset.shard_sizes[0]
    numbers = np.unique(np.linspace(0, count - 1, min(_IMAGES, count)).round().astype(int))
    return [_thumbnail(dataset, int(number)) for number in numbers]


def draw_duplicates(store: ObjectStore, run_uri: str, statistics: dict[str, Any]) -> list[list[Thumbnail]]:
    """Draw examples of duplicates: first of held-out images beside the training images that they equal or look like.

    Args:
        statistics: from :func:`esvit_core.data.ingest.statistics.image_statistics`.
    """
    kinds = ("overlap", "duplicates", "near_duplicates")
    groups = [group for kind in kinds for group in statistics[kind].get("examples", [])]
    shown: list[list[dict[str, Any]]] = []
    seen: set[str] = set()
    for group in groups:
        if len(shown) < _GROUPS and not seen & {each["name"] for each in group}:
            seen |= {each["name"] for each in group}
            shown.append(group)
    datasets = {
        split: ShardDataset(store, join_uri(run_uri, "data"), split)
        for split in {each["split"] for group in shown for each in group}
    }
    return [[_thumbnail(datasets[each["split"]], each["number"]) for each in group] for group in shown]


def _thumbnail(dataset: ShardDataset, number: int) -> Thumbnail:
    return Thumbnail(thumbnail(dataset.image(number), _SIDE), dataset.name(number), dataset.split)
