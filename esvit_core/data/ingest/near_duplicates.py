"""Find images that look alike: perceptual hashes that differ in few bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

#: Near duplicates differ in at most so many of the 64 bits of their hashes.
DISTANCE = 3
_CHUNKS = 4  # two hashes that differ in fewer bits than this are equal in at least one quarter
_BITS = 64 // _CHUNKS
# Different hashes with one quarter in common; a larger group is of one kind of image, such as scanned text.
_MOST = 4096


def group_alike(looks: np.ndarray) -> list[list[int]]:
    """Group the images that look alike; images that are alike through others are in one group.

    Args:
        looks: perceptual hash of each image, (N,) uint64; 0: there is none.

    Returns:
        The numbers of the images of each group of at least two, ascending.
    """
    hashed = np.flatnonzero(looks)
    values, value_of = np.unique(looks[hashed], return_inverse=True)
    parent = np.arange(len(values))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for one, other in _close_pairs(values):
        parent[max(root(one), root(other))] = min(root(one), root(other))
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    return [hashed[group].tolist() for group in equal_groups(parent[value_of])]


def equal_groups(keys: np.ndarray) -> list[list[int]]:
    """Return the positions of each value that occurs at least twice, ascending, in the order of their first ones."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    equals_next = ordered[1:] == ordered[:-1]
    changes = np.diff(equals_next.view(np.int8), prepend=0, append=0)
    bounds = zip(np.flatnonzero(changes == 1).tolist(), np.flatnonzero(changes == -1).tolist(), strict=True)
    return sorted(order[first : last + 1].tolist() for first, last in bounds)


def find_superfluous(digests: np.ndarray, looks: np.ndarray, splits: np.ndarray, drop: str, apart: bool) -> np.ndarray:
    """Decide which images are left out because of an earlier one.

    Args:
        digests: first 64 bits of the digest of each image's file, (N,) uint64.
        looks: perceptual hashes, (N,) uint64; 0: there is none.
        splits: number of the split of each image, (N,).
        drop: ``none``, ``exact`` or ``near``, see ``data.drop_duplicates``.
        apart: whether a copy of an image of another split is left out in any case.

    Returns:
        For each image the number of the one that it is a duplicate of, (N,) int64; -1: it is kept.
    """
    duplicate_of = np.full(len(digests), -1)
    for first, *others in equal_groups(digests):
        for other in others:
            if drop != "none" or (apart and splits[other] != splits[first]):
                duplicate_of[other] = first
    if drop == "near":
        kept = np.flatnonzero(duplicate_of < 0)
        for group in group_alike(looks[kept]):
            for one, other in _alike_earlier(kept[group], looks):
                duplicate_of[one] = other
    return duplicate_of


def _alike_earlier(group: np.ndarray, looks: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the images of a group that look like one that is kept, with the most similar one."""
    kept = [int(group[0])]
    for image in group[1:].tolist():
        distances = np.bitwise_count(looks[kept] ^ looks[image])
        if distances.min() <= DISTANCE:
            yield image, kept[int(distances.argmin())]
        else:
            kept.append(image)


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
