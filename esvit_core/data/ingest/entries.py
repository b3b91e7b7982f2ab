"""The files of a source as entries, and lists of them that take no memory per file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from esvit_core.data.ingest.disk_rows import DiskRows, Row, sort_rows
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


class Entries(Sequence[Entry]):
    """A list of entries that is written once and lies in a temporary file, unless it is short.

    Args:
        entries: they are consumed one after the other.

    Raises:
        StoreFull: the disk is full.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._rows = DiskRows(map(_row_of, entries))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> Entry: ...

    @overload
    def __getitem__(self, number: slice) -> list[Entry]: ...

    def __getitem__(self, number: int | slice) -> Entry | list[Entry]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return _entry_of(self._rows[number if number >= 0 else number + len(self)])

    def __iter__(self) -> Iterator[Entry]:
        return map(_entry_of, self._rows)

    def names(self) -> Iterator[str]:
        """Yield the names only, which is faster."""
        return (row[0] for row in self._rows)

    def by_name(self) -> Entries:
        """Return the entries in the order of their names."""
        if all(first <= second for first, second in itertools.pairwise(self.names())):
            return self
        numbered = ((row[0], number, row) for number, row in enumerate(self._rows))
        return Entries(_entry_of(row) for _, _, row in sort_rows(numbered))


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


def _row_of(entry: Entry) -> Row:
    given = entry.given and (entry.given.label, entry.given.split)
    return entry.name, entry.size, entry.stamp, entry.handle, entry.problem, given, entry.part


def _entry_of(row: Row) -> Entry:
    name, size, stamp, handle, problem, given, part = row
    return Entry(name, size, stamp, handle, problem, given and Given(*given), part)
