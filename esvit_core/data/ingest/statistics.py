"""Statistics of prepared images: sizes, modes, colors, class balance, duplicates, and overlap of the splits."""

from __future__ import annotations

import itertools
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from esvit_core.data.ingest.image_facts import can_compare_looks
from esvit_core.data.ingest.listing import File
from esvit_core.data.ingest.near_duplicates import equal_groups, group_alike

_EXAMPLES = 5  # groups of duplicates that are listed
_SHOWN = 4  # images of each
_WITHOUT_LOOKS = "the package imagehash is not installed (the extra esvit[duplicates])"


class ImageStatistics:
    """Collects the statistics of the stored images; of single images it holds only what duplicates are found from.

    Args:
        digests: first 64 bits of the digest of each image's file, (N,) uint64.
        looks: perceptual hashes, (N,) uint64; 0: there is none.
        held_out: whether each image is held out, (N,) bool.
    """

    def __init__(self, digests: np.ndarray, looks: np.ndarray, held_out: np.ndarray) -> None:
        self._exact = equal_groups(digests)
        # Copies look alike, too: a group of copies only is no group of near duplicates.
        self._near = [group for group in group_alike(looks) if len(np.unique(digests[group])) > 1]
        self._overlap, self._pairs = _overlap(held_out, self._exact, self._near)
        shown = (*self._exact[:_EXAMPLES], *self._near[:_EXAMPLES], *self._pairs[:_EXAMPLES])
        self._examples: dict[int, dict[str, Any]] = {i: {} for group in shown for i in group[:_SHOWN]}
        self._images = 0
        self._widths, self._heights, self._aspects, self._modes = (
            Counter[int](),
            Counter[int](),
            Counter[float](),
            Counter[str](),
        )
        self._numbers, self._color = Counter[str](), np.zeros(3, np.int64)

    @property
    def copies(self) -> int:
        """Number of images that equal an earlier one."""
        return sum(len(group) - 1 for group in self._exact)

    def add(self, file: File) -> None:
        """Add the next image."""
        if self._images in self._examples:
            number = self._numbers[str(file.split)]
            self._examples[self._images] = {"name": file.name, "split": file.split, "number": number}
        self._images += 1
        self._numbers[str(file.split)] += 1
        if file.width:
            self._widths[file.width] += 1
            self._heights[file.height] += 1
            self._aspects[round(file.width / file.height, 3)] += 1
            self._modes[file.mode] += 1
            self._color += [int(file.color[i : i + 2], 16) for i in (0, 2, 4)]

    def result(self, per_class: Sequence[int]) -> dict[str, Any]:
        """Return the statistics as JSON values.

        Args:
            per_class: number of training images of each class.

        Returns:
            ``images``; ``width``, ``height`` and ``aspect`` (width / height), each with minimum, median and maximum;
            ``modes``, a count for each; ``color``, the mean red, green and blue; ``per_class`` with minimum, median and
            maximum; ``duplicates`` and ``near_duplicates`` with groups, images and examples; ``overlap``: how many held-out
            images equal or look like a training image, with examples.
        """
        described = self._modes.total()
        return {
            "images": self._images,
            "width": _span(self._widths),
            "height": _span(self._heights),
            "aspect": _span(self._aspects),
            "modes": dict(self._modes.most_common()),
            "color": (self._color / described).round(1).tolist() if described else None,
            "per_class": _span(Counter(count for count in per_class if count)),
            "duplicates": self._summary(self._exact),
            "near_duplicates": self._summary(self._near) if can_compare_looks() else {"left_out": _WITHOUT_LOOKS},
            "overlap": {**self._overlap, "examples": self._shown(self._pairs)},
        }

    def _summary(self, groups: list[list[int]]) -> dict[str, Any]:
        return {"groups": len(groups), "images": sum(map(len, groups)), "examples": self._shown(groups)}

    def _shown(self, groups: list[list[int]]) -> list[list[dict[str, Any]]]:
        return [[self._examples[i] for i in group[:_SHOWN]] for group in groups[:_EXAMPLES]]


def describe_statistics(found: dict[str, Any]) -> list[str]:
    """Describe duplicates and overlap in lines, if there are any."""
    lines = []
    for key, word in (("duplicates", "identical"), ("near_duplicates", "alike")):
        if found[key].get("groups"):
            names = [each["name"] for each in found[key]["examples"][0][:2]]
            groups = found[key]["groups"]
            lines.append(
                f"odd: {found[key]['images']:,} images in {groups:,} {'group' if groups == 1 else 'groups'} are {word} "
                f"({' and '.join(names)}, ...); data.drop_duplicates keeps one of each"
            )
    overlap = found["overlap"]
    if count := overlap["identical"] + overlap["alike"]:
        names = [each["name"] for each in overlap["examples"][0][:2]]
        lines.append(
            f"odd: {count:,} held-out images equal a training image or look like one ({' and '.join(names)}): their "
            "measurement is too optimistic"
        )
    return lines


def _overlap(
    held_out: np.ndarray, exact: list[list[int]], near: list[list[int]]
) -> tuple[dict[str, int], list[list[int]]]:
    """Count the held-out images that are identical to a training image or look like one; also return pairs of them."""
    counted: set[int] = set()
    counts = {}
    pairs: list[list[int]] = []
    for word, groups in (("identical", exact), ("alike", near)):
        before = len(counted)
        for group in groups:
            train = [i for i in group if not held_out[i]]
            apart = [i for i in group if held_out[i] and i not in counted]
            if train and apart:
                counted.update(apart)
                pairs.append([apart[0], train[0]])
        counts[word] = len(counted) - before
    return counts, pairs


def _span(values: Counter[Any]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    middle = bisect(list(itertools.accumulate(values[value] for value in ordered)), values.total() // 2)
    return {"min": ordered[0], "median": ordered[middle], "max": ordered[-1]}
