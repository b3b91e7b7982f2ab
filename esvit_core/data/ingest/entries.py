"""The files of a source as entries, and lists of them that take no memory per file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from esvit_core.data.ingest.disk_rows import BLOCK, DiskRows, Row, sort_rows
from esvit_core.data.ingest.lazy_sequence import LazySequence
from esvit_core.data.ingest.number_arrays import numbers_where, pick
from esvit_core.data.ingest.split_folders import SplitName


@dataclass(frozen=True, slots=True)
class Given:
    """What a source itself says about an image, beside its name.

    Attributes:
        label: name of its class; None: it has none.
        split: None: the folders say it.
    """

    label: str | None = None
    split: SplitName | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source.

    Attributes:
        name: path below the source, with ``/``.
        size: in bytes.
        stamp: changes with the content, as far as a listing can show.
        handle: the source's own reference to the file: numbers and texts, or tuples of them.
        problem: why the file cannot be an image; None: it may be one.
        given: label and split that the source states, such as a table or a WebDataset; None: the folders say them.
        part: number of its source if the files are those of several, from 1; 0: there is only one.
    """

    name: str
    size: int
    stamp: str
    handle: Any
    problem: str | None = None
    given: Given | None = None
    part: int = 0


class Entries(LazySequence[Entry]):
    """A list of entries that is written once and lies in a temporary file, unless it is short.

    Args:
        entries: they are consumed one after the other.

    Raises:
        StoreFull: the disk is full.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.has_given = False  # whether the source states the label or the split of any file
        self._rows = DiskRows(map(self._row, entries))

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, number: int) -> Entry:
        return entry_of(self._rows[number])

    def __iter__(self) -> Iterator[Entry]:
        return map(entry_of, self._rows)

    def _row(self, entry: Entry) -> Row:
        given = entry.given and (entry.given.label, entry.given.split)
        self.has_given = self.has_given or given is not None
        return entry.name, entry.size, entry.stamp, entry.handle, entry.problem, given, entry.part

    def names(self) -> Iterator[str]:
        """Yield the names only, which is faster."""
        return (row[0] for row in self._rows)

    def rows_from(self, start: int, stop: int) -> Iterator[tuple[int, Row]]:
        """Yield the numbers and rows of a range of entries, and of some before it."""
        start -= start % BLOCK
        return enumerate(self._rows.between(start, stop), start)

    def by_name(self) -> Entries:
        """Return the entries in the order of their names."""
        if all(first <= second for first, second in itertools.pairwise(self.names())):
            return self
        numbered = ((row[0], number, row) for number, row in enumerate(self._rows))
        return Entries(entry_of(row) for _, _, row in sort_rows(numbered))


class Selection(LazySequence[Entry]):
    """Some of the entries of a list, in its order.

    Args:
        entries: the list.
        numbers: of the entries, ascending, (n,) uint32; None: all.
    """

    def __init__(self, entries: Entries, numbers: np.ndarray | None = None) -> None:
        self.entries = entries
        self.numbers = numbers if numbers is not None and len(numbers) < len(entries) else None

    @classmethod
    def where(cls, entries: Entries, mask: np.ndarray) -> Self:
        """Return the entries for which a mask (N,) bool is true."""
        return cls(entries, None if mask.all() else numbers_where(mask))

    def __len__(self) -> int:
        return len(self.entries) if self.numbers is None else len(self.numbers)

    def item(self, number: int) -> Entry:
        return self.entries[number if self.numbers is None else int(self.numbers[number])]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries) if self.numbers is None else map(entry_of, self._rows())

    @property
    def names(self) -> Names:
        """Names of the entries."""
        return Names(self)

    def iterate_names(self) -> Iterator[str]:
        """Yield the names only, which is faster."""
        return self.entries.names() if self.numbers is None else (row[0] for row in self._rows())

    def given(self) -> Iterator[Given | None]:
        """Yield what the source states about the files."""
        rows = self._rows() if self.numbers is not None else (row for _, row in self.entries.rows_from(0, len(self)))
        return (row[5] and Given(*row[5]) for row in rows)

    def some(self, mask: np.ndarray) -> Selection:
        """Return those of the entries for which a mask (n,) bool is true."""
        if self.numbers is None:
            return Selection.where(self.entries, mask)
        return self if mask.all() else Selection(self.entries, self.numbers[mask])

    def _rows(self) -> Iterator[Row]:
        assert self.numbers is not None
        if not len(self.numbers):
            return
        rows = self.entries.rows_from(int(self.numbers[0]), int(self.numbers[-1]) + 1)
        yield from (row for _, row in pick(rows, self.numbers))


class Names(LazySequence[str]):
    """The names of selected entries."""

    def __init__(self, selected: Selection) -> None:
        self._selected = selected

    def __len__(self) -> int:
        return len(self._selected)

    def item(self, number: int) -> str:
        return self._selected[number].name

    def __iter__(self) -> Iterator[str]:
        return self._selected.iterate_names()


def as_entries(entries: Iterable[Entry]) -> Entries:
    """Return entries as :class:`Entries`, unless they are that already."""
    return entries if isinstance(entries, Entries) else Entries(entries)


def keep_last(entries: Iterable[Entry]) -> tuple[Entries, int]:
    """Keep the last of several entries with the same name, as unpacking does; also return the number of the others.

    The last one takes the place of the first.
    """
    listed = as_entries(entries)
    # Hashes take 8 bytes per file. Different names with the same hash are told apart below.
    hashes = np.fromiter(map(hash, listed.names()), dtype=np.int64, count=len(listed))
    hashes.sort()
    repeated = {*hashes[1:][hashes[1:] == hashes[:-1]].tolist()}
    if not repeated:
        return listed, 0
    places: dict[str, tuple[int, int]] = {}  # of the first and the last
    for number, name in enumerate(listed.names()):
        if hash(name) in repeated:
            places[name] = places.get(name, (number, number))[0], number
    chosen = dict(places.values())

    def kept() -> Iterator[Entry]:
        for number, entry in enumerate(listed):
            if hash(entry.name) not in repeated:
                yield entry
            elif number in chosen:
                yield listed[chosen[number]]

    found = Entries(kept())
    return found, len(listed) - len(found)


def entry_of(row: Row) -> Entry:
    """Return the entry that a row holds."""
    name, size, stamp, handle, problem, given, part = row
    return Entry(name, size, stamp, handle, problem, given and Given(*given), part)
