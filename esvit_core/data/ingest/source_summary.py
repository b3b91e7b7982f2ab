"""Say in a few lines how a source was understood: its splits, its classes with their sizes, and what looks odd."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esvit_core.data.ingest.assignments import Assignment
from esvit_core.data.ingest.listing import File

_SHOWN = 3  # classes that are named in a line


@dataclass(frozen=True)
class Counts:
    """Numbers of images.

    Attributes:
        images: of all images that have a place in the layout.
        splits: by the splits that the source has; empty if it has none.
        classes: by class, sorted by name.
    """

    images: int
    splits: dict[str, int]
    classes: dict[str, int]


def count_images(counts: Mapping[Assignment, int]) -> Counts:
    """Count images by the splits of the source and by class; those without a place in the layout are left out.

    Args:
        counts: how often each assignment occurs, see :meth:`esvit_core.data.ingest.assignments.Assignments.counts`.
    """
    placed = {each: count for each, count in counts.items() if each.problem is None}
    splits: Counter[str | None] = Counter()
    classes: Counter[str] = Counter()
    for each, count in placed.items():
        splits[each.source_split] += count
        classes[each.label or ""] += count
    classes.pop("", None)
    return Counts(
        sum(placed.values()),
        {name: splits[name] for name in ("train", "val", "test") if splits[name]},
        dict(sorted(classes.items())),
    )


def describe_counts(counts: Counts) -> list[str]:
    """Describe the numbers of images in lines: by split, and by class with three names."""
    if counts.splits:
        lines = [f"images: {counts.images:,} ({', '.join(f'{n} {count:,}' for n, count in counts.splits.items())})"]
    else:
        lines = [f"images: {counts.images:,}, without folders for splits"]
    if counts.classes:
        sizes = sorted(counts.classes.values())
        span = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
        noun = "class" if len(sizes) == 1 else "classes"
        lines.append(f"classes: {len(sizes):,} {noun} of {span} images: {_examples(counts)}")
    return lines


def find_oddities(assignments: Mapping[Assignment, int]) -> list[str]:
    """Describe in lines what looks odd about the splits and classes, as far as names show it.

    Args:
        assignments: as for :func:`count_images`.
    """
    counts = count_images(assignments)
    lines = []
    if counts.splits and "train" not in counts.splits:
        lines.append(f"there are no images to train on, only {' and '.join(counts.splits)}")
    labels: dict[str, set[str]] = defaultdict(set)
    for each in assignments:
        if each.problem is None and each.label and each.source_split:
            labels["train" if each.source_split == "train" else "held out"].add(each.label)
    if labels["train"] and (missing := sorted(labels["held out"] - labels["train"])):
        lines.append(f"{_number(missing, 'class')} of held-out images without training images ({_names(missing)})")
    folded: dict[str, list[str]] = defaultdict(list)
    for name in counts.classes:
        folded[name.casefold()].append(name)
    if same := [" and ".join(names) for names in folded.values() if len(names) > 1]:
        lines.append(f"classes whose names differ only in case ({_names(same)})")
    if single := [name for name, count in counts.classes.items() if count == 1]:
        lines.append(f"{_number(single, 'class')} with a single image ({_names(single)})")
    return [f"odd: {line}" for line in lines]


_ODD = {
    "frames": "have several pages or frames, of which the first is used",
    "bands": "have more bands than red, green and blue, which are not used; data.bands chooses",
    "reduced": "have more bits or bands than are read here; install the extra esvit[formats]",
    "dark": "are nearly black; if that is wrong, set data.intensity",
    "bright": "are nearly white; if that is wrong, set data.intensity",
}
_FEW = 0.01  # images that are nearly black or white are mentioned from this share on


class OddImages:
    """Counts what was lost or looks wrong in the stored images."""

    def __init__(self) -> None:
        self._images = 0
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = defaultdict(list)  # the first ones

    def add(self, file: File) -> None:
        """Add an image."""
        self._images += 1
        for word in file.odd.split():
            self._counts[word] += 1
            self._names[word] = heapq.nsmallest(_SHOWN, [*self._names[word], file.name])

    def lines(self) -> list[str]:
        """Describe them in lines, with examples."""
        return [
            f"odd: {count:,} of {self._images:,} images {text} ({', '.join(self._names[word])}{', ...' * (count > _SHOWN)})"
            for word, text in _ODD.items()
            if (count := self._counts[word]) and (word not in ("dark", "bright") or count >= _FEW * self._images)
        ]


def _examples(counts: Counts) -> str:
    most = sorted(counts.classes.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    return ", ".join(f"{name} ({count:,})" for name, count in most) + (", ..." if len(counts.classes) > _SHOWN else "")


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _number(items: Sequence[str], noun: str) -> str:
    return f"{len(items):,} {noun if len(items) == 1 else f'{noun}es'}"
