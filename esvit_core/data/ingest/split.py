"""Choose images and assign splits by hashes of their names, identically on every machine."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from esvit_core.data.ingest.number_arrays import CHUNK, count_each, iterate, numbers_where


def hash_fraction(purpose: str, key: str) -> float:
    """Map a name to a fixed, evenly distributed number in [0, 1), independently for each purpose."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_images(keys: Sequence[str], groups: Iterable[tuple[str, str]], count: int) -> np.ndarray:
    """Choose ``count`` images so that splits keep their proportions and the classes of a split are balanced.

    Args:
        keys: names of the images.
        groups: split and class of each image.
        count: number of images to choose.

    Returns:
        Indices into ``keys``, ascending, (n,) uint32; all of them if there are at most ``count``.
    """
    if len(keys) <= count:
        return np.arange(len(keys), dtype=np.uint32)
    known: dict[tuple[str, str], int] = {}
    group_of = np.fromiter((known.setdefault(group, len(known)) for group in groups), np.int32, len(keys))
    sizes = dict(zip(known, count_each(group_of, len(known)).tolist(), strict=True))
    splits: dict[str, dict[str, int]] = defaultdict(dict)
    for (split, label), size in sizes.items():
        splits[split][label] = size
    per_split = _proportional_quotas({split: sum(labels.values()) for split, labels in splits.items()}, count)
    quotas = {split: _equal_quotas(labels, per_split[split]) for split, labels in splits.items()}
    left = [quotas[split][label] for split, label in known]
    chosen = np.zeros(len(keys), dtype=bool)
    for index in iterate(order_by_hash("choose", keys)):
        group = group_of[index]
        if left[group]:
            left[group] -= 1
            chosen[index] = True
    return numbers_where(chosen)


def hold_out(keys: Iterable[str], labels: Iterable[str | None], fraction: float) -> set[int]:
    """Choose the images to hold out for evaluation, about the same share of each class.

    Each image is held out according to the hash of its name, so adding or removing other images does not affect it. If a
    class of two or more images would have none on one side, its closest image changes sides.

    Args:
        keys: names of the images.
        labels: class of each image; None if it has none.
        fraction: share to hold out.

    Returns:
        Indices into ``keys``.
    """
    return {*np.flatnonzero(held_out(keys, labels, fraction)).tolist()}


def held_out(keys: Iterable[str], labels: Iterable[str | None], fraction: float) -> np.ndarray:
    """Return which images :func:`hold_out` chooses, (N,) bool."""
    held = bytearray()
    classes: dict[str | None, _Sides] = defaultdict(_Sides)
    for index, (key, label) in enumerate(zip(keys, labels, strict=True)):
        number = hash_fraction("hold out", key) if fraction else 1.0
        classes[label].add((number, key, index), number < fraction)
        held.append(number < fraction)
    for each in classes.values() if fraction else ():
        if each.count > 1 and each.first is not None and not each.held:
            held[each.first[2]] = True
        elif each.last is not None and each.held == each.count:
            held[each.last[2]] = False
    return np.frombuffer(held, dtype=bool)


@dataclass
class _Sides:
    """How many images of a class are held out, and its images with the smallest and the largest hash."""

    count: int = 0
    held: int = 0
    first: tuple[float, str, int] | None = None
    last: tuple[float, str, int] | None = None

    def add(self, image: tuple[float, str, int], is_held: bool) -> None:
        self.count += 1
        self.held += is_held
        self.first = image if self.first is None else min(self.first, image)
        self.last = image if self.last is None else max(self.last, image)


def _proportional_quotas(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Divide ``count`` among groups in proportion to their sizes, by the largest-remainder method."""
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def _equal_quotas(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Divide ``count`` among classes as equally as their sizes allow; the rest goes in the order of size and name."""
    quotas: dict[str, int] = {}
    left = count
    waiting = sorted(sizes, key=lambda name: (sizes[name], name))
    for index, name in enumerate(waiting):
        quotas[name] = min(sizes[name], left // (len(waiting) - index))
        left -= quotas[name]
    return quotas


def storage_order(keys: Sequence[str], chosen: np.ndarray | None = None) -> np.ndarray:
    """Return the order of storage: pseudo-random, so that neighbors have nothing in common.

    Args:
        keys: names of all images.
        chosen: which of them are stored, (N,) bool; None: all.

    Returns:
        Indices into ``keys``, (n,) uint32.
    """
    return order_by_hash("order", keys, chosen)


def order_by_hash(purpose: str, keys: Sequence[str], chosen: np.ndarray | None = None) -> np.ndarray:
    """Return the indices of names in the order of their hashes and, if these are equal, of the names, (n,) uint32.

    A number of 64 bits holds the beginning of a hash and the index. Names whose hashes begin alike are compared one by one.

    Args:
        purpose: see :func:`hash_fraction`.
        keys: the names.
        chosen: which of them are ordered, (N,) bool; None: all.
    """
    low = max(1, (len(keys) - 1).bit_length())
    bits = 64 - low
    numbered: Iterable[tuple[int, str]] = enumerate(keys)
    if chosen is not None:
        numbered = itertools.compress(numbered, iterate(chosen))
    count = len(keys) if chosen is None else np.count_nonzero(chosen)
    beginnings = (min(int(hash_fraction(purpose, key) * 2**bits), 2**bits - 1) << low | i for i, key in numbered)
    packed = np.fromiter(beginnings, np.uint64, count)
    packed.sort()
    order = packed.view(np.uint32)[:count]  # the indices replace the numbers from which they are taken
    alike: list[int] = []  # places in the order whose hash begins as that of the place before
    before = np.empty(0, dtype=np.uint64)
    for start in range(0, count, CHUNK):
        some = np.concatenate([before, packed[start : start + CHUNK]])
        same = np.flatnonzero(some[1:] >> np.uint64(low) == some[:-1] >> np.uint64(low))
        alike += (same + start + 1 - len(before)).tolist()
        order[start : start + CHUNK] = (some & np.uint64(2**low - 1))[len(before) :]
        before = some[-1:].copy()
    del order
    packed.resize((count + 1) // 2, refcheck=False)
    order = packed.view(np.uint32)[:count]
    for _, run in itertools.groupby(enumerate(alike), key=lambda item: item[1] - item[0]):
        places = [place for _, place in run]
        tied = order[places[0] - 1 : places[-1] + 1]
        tied[:] = sorted(tied.tolist(), key=lambda i: (hash_fraction(purpose, keys[i]), keys[i], i))
    return order
