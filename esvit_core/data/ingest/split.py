"""Choose images and assign splits by hashes of their names, identically on every machine."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence


def hash_fraction(purpose: str, key: str) -> float:
    """Map a name to a fixed, evenly distributed number in [0, 1), independently for each purpose."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_images(keys: Sequence[str], groups: Sequence[tuple[str, str]], count: int) -> list[int]:
    """Choose ``count`` images so that splits keep their proportions and the classes of a split are balanced.

    Args:
        keys: names of the images.
        groups: split and class of each image.
        count: number of images to choose.

    Returns:
        Indices into ``keys``, ascending; all of them if there are at most ``count``.
    """
    if len(keys) <= count:
        return list(range(len(keys)))
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (split, label) in enumerate(groups):
        members[split][label].append(index)
    per_split = _proportional_quotas({s: sum(map(len, c.values())) for s, c in members.items()}, count)
    taken: list[int] = []
    for split, classes in members.items():
        quotas = _equal_quotas({label: len(indices) for label, indices in classes.items()}, per_split[split])
        for label, indices in classes.items():
            taken += sorted(indices, key=lambda i: (hash_fraction("choose", keys[i]), keys[i]))[: quotas[label]]
    return sorted(taken)


def hold_out(keys: Sequence[str], labels: Sequence[str | None], fraction: float) -> set[int]:
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
    if not fraction:
        return set()
    classes: dict[str | None, list[tuple[float, str, int]]] = defaultdict(list)
    for index, (key, label) in enumerate(zip(keys, labels, strict=True)):
        classes[label].append((hash_fraction("hold out", key), key, index))
    held: set[int] = set()
    for members in classes.values():
        members.sort()
        count = sum(number < fraction for number, _, _ in members)
        count = min(max(count, 1), len(members) - 1)
        held |= {index for _, _, index in members[:count]}
    return held


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


def storage_order(keys: Sequence[str], indices: Iterable[int]) -> list[int]:
    """Return the order of storage: pseudo-random, so that neighbors have nothing in common.

    Args:
        keys: names of all images.
        indices: indices into ``keys`` of the images to store.
    """
    return sorted(indices, key=lambda i: (hash_fraction("order", keys[i]), keys[i]))
