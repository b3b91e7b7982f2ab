"""Find images that look alike: perceptual hashes that differ in few bits."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

#: Near duplicates differ in at most so many of the 64 bits of their hashes.
DISTANCE = 3
_CHUNKS = 4  # two hashes that differ in fewer bits than this are equal in at least one quarter
_BITS = 64 // _CHUNKS
_MOST = (
    4096  # different hashes with one quarter in common; a larger group is of one kind of image, such as scanned text
)


class SeenImages:
    """The images that a preparation has stored, to recognize duplicates among the next ones.

    Args:
        near: whether images that look alike count as duplicates.
    """

    def __init__(self, near: bool) -> None:
        self._near = near
        self._names: dict[str, str] = {}
        self._looks: list[dict[int, list[tuple[int, str]]]] = [defaultdict(list) for _ in range(_CHUNKS)]

    def find(self, digest: str, look: str) -> str | None:
        """Return the name of an earlier image of which this one is a duplicate; None if there is none.

        Args:
            digest: of the file's content.
            look: perceptual hash; empty if there is none.
        """
        if digest in self._names:
            return self._names[digest]
        if not (self._near and look):
            return None
        value = int(look, 16)
        found = [
            (name, (other ^ value).bit_count())
            for table, quarter in zip(self._looks, _quarters(value), strict=True)
            for other, name in table.get(quarter, ())
            if (other ^ value).bit_count() <= DISTANCE
        ]
        return min(found, key=lambda each: (each[1], each[0]))[0] if found else None

    def add(self, name: str, digest: str, look: str) -> None:
        """Remember an image that was stored."""
        self._names.setdefault(digest, name)
        if self._near and look:
            value = int(look, 16)
            for table, quarter in zip(self._looks, _quarters(value), strict=True):
                table[quarter].append((value, name))


def group_alike(looks: Sequence[str]) -> list[list[int]]:
    """Group the images that look alike; images that are alike through others are in one group.

    Args:
        looks: perceptual hash of each image; empty if there is none.

    Returns:
        The numbers of the images of each group of at least two, ascending.
    """
    by_look: dict[int, list[int]] = defaultdict(list)
    for number, look in enumerate(looks):
        if look:
            by_look[int(look, 16)].append(number)
    values = np.array(sorted(by_look), dtype=np.uint64)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for one, other in _close_pairs(values):
        parent[max(root(one), root(other))] = min(root(one), root(other))
    groups: dict[int, list[int]] = defaultdict(list)
    for i, value in enumerate(values.tolist()):
        groups[root(i)] += by_look[value]
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _close_pairs(values: np.ndarray) -> Iterable[tuple[int, int]]:
    """Yield the pairs of values, (N,) uint64, that differ in at most DISTANCE bits; a pair may occur several times."""
    for chunk in range(_CHUNKS):
        keys = (values >> np.uint64(_BITS * chunk)) & np.uint64(2**_BITS - 1)
        order = np.argsort(keys, kind="stable")
        ends = [*(np.flatnonzero(np.diff(keys[order])) + 1).tolist(), len(order)]
        for start, end in itertools.pairwise([0, *ends]):
            if 1 < end - start <= _MOST:
                members = order[start:end]
                distances = np.bitwise_count(values[members][:, None] ^ values[members][None, :])
                for i, j in np.argwhere(np.triu(distances <= DISTANCE, 1)).tolist():
                    yield int(members[i]), int(members[j])


def _quarters(value: int) -> list[int]:
    return [(value >> (_BITS * chunk)) & (2**_BITS - 1) for chunk in range(_CHUNKS)]
