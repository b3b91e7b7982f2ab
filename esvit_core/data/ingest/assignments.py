"""The splits and classes of images as numbers of the few that differ, so that they take two bytes per image."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from esvit_core.data.ingest.lazy_sequence import LazySequence
from esvit_core.data.ingest.number_arrays import count_each, iterate
from esvit_core.data.ingest.split_folders import SplitName


@dataclass(frozen=True)
class Assignment:
    """The split and class of a file.

    Attributes:
        key: path without the folders that all files share; determines the split of the image.
        split: as it is used; None if the source has no folders for splits.
        source_split: as the source names it: its test images are used as ``val`` if there are no others to measure.
        label: name of its class; None if it has none.
        problem: why the file has no place in the layout; None: it has.
    """

    key: str
    split: SplitName | None = None
    label: str | None = None
    problem: str | None = None
    source_split: SplitName | None = None


@dataclass(frozen=True)
class Place:
    """What images of the same folder have in common.

    Attributes:
        assignment: of such an image; instead of its key, what the key begins with.
        cut: number of folders that the keys do not contain.
    """

    assignment: Assignment
    cut: int = 0

    def of(self, name: str) -> Assignment:
        """Return the assignment of a file."""
        return replace(self.assignment, key=self.key(name))

    def key(self, name: str) -> str:
        """Return the key of a file."""
        path = unicodedata.normalize("NFC", name)
        return self.assignment.key + (path.split("/", self.cut)[-1] if self.cut else path)

    def change(self, **values: str | None) -> Place:
        """Return a place with other values of the assignment."""
        return Place(replace(self.assignment, **values), self.cut)  # type: ignore[arg-type]


class Assignments(LazySequence[Assignment]):
    """The assignments of all files, made when they are asked for.

    Args:
        names: of the files.
        numbers: of the place of each file, (N,) of integers.
        places: of the files.
    """

    def __init__(self, names: Sequence[str], numbers: np.ndarray, places: Sequence[Place]) -> None:
        self.names, self.numbers, self.places = names, numbers, places

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, number: int) -> Assignment:
        return self.places[self.numbers[number]].of(self.names[number])

    def __iter__(self) -> Iterator[Assignment]:
        return (self.places[place].of(name) for name, place in zip(self.names, iterate(self.numbers), strict=True))

    @property
    def keys(self) -> Keys:
        """Keys of the files."""
        return Keys(self)

    def change(self, places: Callable[[Place], Place]) -> Assignments:
        """Return the assignments with other places."""
        return Assignments(self.names, self.numbers, [places(place) for place in self.places])

    def counts(self, counted: np.ndarray | None = None) -> Counter[Assignment]:
        """Return how often the assignments occur, without their keys.

        Args:
            counted: which files count, (N,) bool; None: all.
        """
        found: Counter[Assignment] = Counter()
        for place, count in zip(self.places, count_each(self.numbers, len(self.places), counted).tolist(), strict=True):
            if count:
                found[replace(place.assignment, key="")] += count
        return found


class Keys(LazySequence[str]):
    """The keys of files, made when they are asked for."""

    def __init__(self, assignments: Assignments) -> None:
        self._of = assignments

    def __len__(self) -> int:
        return len(self._of)

    def item(self, number: int) -> str:
        return self._of.places[self._of.numbers[number]].key(self._of.names[number])

    def __iter__(self) -> Iterator[str]:
        places = self._of.places
        return (places[place].key(name) for name, place in zip(self._of.names, iterate(self._of.numbers), strict=True))


def labels_in_use(assignments: Assignments) -> list[str]:
    """Return the sorted names of the classes that have images."""
    return sorted({each.label for each in assignments.counts() if each.label})


def measured_split(assignments: Assignments) -> tuple[Assignments, list[str]]:
    """Make ``val`` the split that is measured: the test images if there is no other.

    Held-out images without labels beside labelled training images cannot be measured. They stay apart, as ``test``.
    """
    held_out: tuple[SplitName, ...] = ("val", "test")
    sizes: Counter[SplitName | None] = Counter()
    labelled = set()
    for each, count in assignments.counts().items():
        sizes[each.split] += count
        labelled |= {each.split} if each.label else set()
    apart = [split for split in held_out if sizes[split] and "train" in labelled and split not in labelled]
    messages = [
        f"the {sizes[split]:,} {split} images have no labels: they are kept apart and not used" for split in apart
    ]
    moved: dict[SplitName | None, SplitName] = {split: "test" for split in held_out if split in apart}
    if sizes["test"] and "test" not in apart and (not sizes["val"] or "val" in apart):
        moved["test"] = "val"
        messages.append("there are no validation images: the test images are held out for evaluation")

    def change(place: Place) -> Place:
        split = place.assignment.split
        return place.change(split=moved.get(split, split), source_split=split)

    return assignments.change(change), messages
