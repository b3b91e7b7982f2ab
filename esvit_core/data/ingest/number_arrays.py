"""Long arrays of one number per file: passes over them that need little memory beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")

CHUNK = 2**12  # elements that are processed at once


def iterate(numbers: np.ndarray) -> Iterator[int]:
    """Yield the elements of an array as Python's numbers, which is faster than iterating over it."""
    for start in range(0, len(numbers), CHUNK):
        yield from numbers[start : start + CHUNK].tolist()


def pick(numbered: Iterable[tuple[int, T]], numbers: np.ndarray) -> Iterator[tuple[int, T]]:
    """Yield the pairs with some numbers, and stop after the last of them.

    Args:
        numbered: numbers and elements, by ascending number.
        numbers: those to yield, ascending, (n,) of integers.
    """
    wanted = iterate(numbers)
    following = next(wanted, None)
    for number, element in numbered if following is not None else ():
        if number == following:
            yield number, element
            following = next(wanted, None)
            if following is None:
                return


def numbers_where(mask: np.ndarray) -> np.ndarray:
    """Return the indices of the true elements of an array (N,) bool, (n,) uint32."""
    found = np.empty(np.count_nonzero(mask), dtype=np.uint32)
    end = 0
    for start in range(0, len(mask), CHUNK):
        some = np.flatnonzero(mask[start : start + CHUNK]) + start
        found[end : end + len(some)] = some
        end += len(some)
    return found


def fit_numbers(numbers: np.ndarray, length: int) -> np.ndarray:
    """Return an array as uint16 if numbers below ``length`` fit, otherwise as int32."""
    return numbers.astype(np.uint16 if length <= 2**16 else np.int32, copy=False)


def count_each(numbers: np.ndarray, length: int, counted: np.ndarray | None = None) -> np.ndarray:
    """Return how often each number below ``length`` occurs in an array, (length,) int64.

    Args:
        numbers: (N,) of integers.
        length: largest number + 1.
        counted: which elements count, (N,) bool; None: all.
    """
    counts = np.zeros(length, dtype=np.int64)
    for start in range(0, len(numbers), CHUNK):
        some = numbers[start : start + CHUNK]
        counts += np.bincount(some if counted is None else some[counted[start : start + CHUNK]], minlength=length)
    return counts


def translate(numbers: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return ``table[numbers]``, (N,) of the type of the table, without an intermediate array of indices."""
    found = np.empty(len(numbers), dtype=table.dtype)
    for start in range(0, len(numbers), CHUNK):
        found[start : start + CHUNK] = table[numbers[start : start + CHUNK]]
    return found
