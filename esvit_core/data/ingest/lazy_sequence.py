"""Sequences whose elements are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

import numpy as np

from esvit_core.data.ingest.number_arrays import pick

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence of which a subclass defines the length, one element, and how to go through all elements."""

    @abstractmethod
    def item(self, number: int) -> T:
        """Return an element; ``number`` is at least 0 and below the length."""

    @abstractmethod
    def __iter__(self) -> Iterator[T]: ...

    @overload
    def __getitem__(self, number: int) -> T: ...

    @overload
    def __getitem__(self, number: slice) -> list[T]: ...

    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self.item(i) for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self.item(number % len(self))


class Picked(LazySequence[T]):
    """Some elements of a sequence, in its order.

    Args:
        sequence: the sequence.
        numbers: of the elements, ascending, (n,) of integers.
    """

    def __init__(self, sequence: Sequence[T], numbers: np.ndarray) -> None:
        self._sequence, self._numbers = sequence, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, number: int) -> T:
        return self._sequence[int(self._numbers[number])]

    def __iter__(self) -> Iterator[T]:
        return (element for _, element in pick(enumerate(self._sequence), self._numbers))
