"""Statistics of prepared images: sizes, modes, colors, class balance, duplicates, and overlap of the splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from esvit_core.data.ingest.image_facts import can_compare_looks
from esvit_core.data.ingest.listing import File
from esvit_core.data.ingest.near_duplicates import group_alike

_EXAMPLES = 5  # groups of duplicates that are listed
_SHOWN = 4  # images of each
_WITHOUT_LOOKS = "the package imagehash is not installed (the extra esvit[duplicates])"


def image_statistics(files: Iterable[File], per_class: Sequence[int]) -> dict[str, Any]:
    """Return the statistics of the stored images, as JSON values.

    Args:
        files: all files with their status; those of a split in the order of their numbers.
        per_class: number of training images of each class.

    Returns:
        ``images``; ``width``, ``height`` and ``aspect`` (width / height), each with minimum, median and maximum; ``modes``, a
        count for each; ``color``, the mean red, green and blue; ``per_class`` with minimum, median and maximum;
        ``duplicates`` and ``near_duplicates`` with groups, images and examples; ``overlap``: how many held-out images equal or
        look like a training image, with examples.
    """
    stored = [file for file in files if file.split]
    numbers = _numbers(stored)
    described = [file for file in stored if file.width]
    exact = _groups_of(file.digest for file in stored)
    near = group_alike([file.look for file in stored])
    # Copies look alike, too: a group of copies only is no group of near duplicates.
    near = [group for group in near if len({stored[i].digest for i in group}) > 1]
    colors = np.array([[int(f.color[i : i + 2], 16) for i in (0, 2, 4)] for f in described] or [[0, 0, 0]])

    def examples(groups: list[list[int]]) -> list[list[dict[str, Any]]]:
        return [
            [{"name": stored[i].name, "split": stored[i].split, "number": numbers[i]} for i in group[:_SHOWN]]
            for group in groups[:_EXAMPLES]
        ]

    def summary(groups: list[list[int]]) -> dict[str, Any]:
        return {"groups": len(groups), "images": sum(map(len, groups)), "examples": examples(groups)}

    return {
        "images": len(stored),
        "width": _span([file.width for file in described]),
        "height": _span([file.height for file in described]),
        "aspect": _span([round(file.width / file.height, 3) for file in described]),
        "modes": dict(Counter(file.mode for file in described).most_common()),
        "color": colors.mean(0).round(1).tolist() if described else None,
        "per_class": _span([count for count in per_class if count]),
        "duplicates": summary(exact),
        "near_duplicates": summary(near) if can_compare_looks() else {"left_out": _WITHOUT_LOOKS},
        "overlap": _overlap(stored, exact, near, examples),
    }


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


def _overlap(stored: list[File], exact: list[list[int]], near: list[list[int]], examples: Any) -> dict[str, Any]:
    """Count the held-out images that are identical to a training image or look like one."""
    counted: set[int] = set()
    counts = {}
    pairs: list[list[int]] = []
    for word, groups in (("identical", exact), ("alike", near)):
        before = len(counted)
        for group in groups:
            train = [i for i in group if stored[i].split == "train"]
            held_out = [i for i in group if stored[i].split != "train" and i not in counted]
            if train and held_out:
                counted.update(held_out)
                pairs.append([held_out[0], train[0]])
        counts[word] = len(counted) - before
    return {**counts, "examples": examples(pairs)}


def _numbers(stored: list[File]) -> list[int]:
    """Return the number of each image in its split."""
    counts: Counter[str] = Counter()
    numbers = []
    for file in stored:
        numbers.append(counts[str(file.split)])
        counts[str(file.split)] += 1
    return numbers


def _groups_of(keys: Iterable[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        if key:
            groups[key].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _span(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}
