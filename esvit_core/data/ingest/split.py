"""Which images are taken and which are held out: by their names alone, the same on every machine and every day."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence


def fate(purpose: str, key: str) -> float:
    """A number from 0 to 1 that a name has for a purpose: evenly spread, and never another one."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose(keys: Sequence[str], groups: Sequence[tuple[str, str]], count: int) -> list[int]:
    """Take ``count`` images: splits keep their proportions, the classes of a split become as equal as they can.

    Args:
        keys: names of the images.
        groups: split and class of each.
        count: how many are wanted.

    Returns:
        Their places in ``keys``, ascending; all where there are not more than ``count``.
    """
    if len(keys) <= count:
        return list(range(len(keys)))
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, (split, label) in enumerate(groups):
        members[split][label].append(place)
    per_split = _in_proportion({s: sum(map(len, c.values())) for s, c in members.items()}, count)
    taken: list[int] = []
    for split, classes in members.items():
        quotas = _levelled({label: len(places) for label, places in classes.items()}, per_split[split])
        for label, places in classes.items():
            taken += sorted(places, key=lambda i: (fate("choose", keys[i]), keys[i]))[: quotas[label]]
    return sorted(taken)


def hold_out(keys: Sequence[str], labels: Sequence[str | None], fraction: float) -> set[int]:
    """Choose the images to measure on, of each class about the same share.

    An image is held out if its own number says so; that others are added or removed changes nothing. Only where that
    would leave a class of two or more without any, or with nothing but held-out images, its one that came closest
    changes sides.

    Args:
        keys: names of the images.
        labels: class of each, None where it has none.
        fraction: share to hold out.

    Returns:
        Their places in ``keys``.
    """
    if not fraction:
        return set()
    classes: dict[str | None, list[tuple[float, str, int]]] = defaultdict(list)
    for place, (key, label) in enumerate(zip(keys, labels, strict=True)):
        classes[label].append((fate("hold out", key), key, place))
    held: set[int] = set()
    for members in classes.values():
        members.sort()
        count = sum(number < fraction for number, _, _ in members)
        count = min(max(count, 1), len(members) - 1)
        held |= {place for _, _, place in members[:count]}
    return held


def _in_proportion(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Share ``count`` among groups by their sizes, largest remainders first."""
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def _levelled(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Share ``count`` among classes as equally as their sizes allow; what remains goes by the order of names."""
    quotas: dict[str, int] = {}
    left = count
    waiting = sorted(sizes, key=lambda name: (sizes[name], name))
    for place, name in enumerate(waiting):
        quotas[name] = min(sizes[name], left // (len(waiting) - place))
        left -= quotas[name]
    return quotas


def in_order(keys: Sequence[str], places: Iterable[int]) -> list[int]:
    """The order in which images are stored, one without meaning: neighbours have nothing in common.

    Args:
        keys: names of all images.
        places: of those that are stored, in ``keys``.
    """
    return sorted(places, key=lambda i: (fate("order", keys[i]), keys[i]))
