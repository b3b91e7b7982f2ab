"""Long sequences in a temporary file, so that memory does not grow with their length."""

from __future__ import annotations

import heapq
import itertools
import marshal
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from esvit_core.storage.disk import explain_full_temporary_disk, read_at, write_at

Row = tuple[Any, ...]
BLOCK = 16  # rows that are read together
_IN_MEMORY = 2**18  # bytes; shorter sequences, and the end of longer ones, stay in memory
_AT_ONCE = 2**16  # bytes that are read at once when all rows are read in order
_RUN = 512 * BLOCK  # rows that are sorted in memory


class DiskRows:
    """Tuples of numbers, texts and the like, which are written once and read in any order and from several threads.

    The file has no name, so that nothing remains of it. It lies in the folder of ``TMPDIR``.

    Args:
        rows: the tuples, of what :mod:`marshal` can write.

    Raises:
        StoreFull: the disk is full.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._ends = array("Q", [0])  # of the blocks, in bytes
        self._count = 0
        self._written = 0  # bytes that are in the file
        self._tail = bytearray()
        self._file: int | None = None
        self.extend(rows)

    def extend(self, rows: Iterable[Row]) -> None:
        """Append rows. What was appended before must fill whole blocks, or nothing can follow it."""
        assert self._count % BLOCK == 0
        waiting = iter(rows)
        while block := list(itertools.islice(waiting, BLOCK)):
            self._tail += marshal.dumps(block)
            self._count += len(block)
            self._ends.append(self._written + len(self._tail))
            if len(self._tail) > _IN_MEMORY:
                self._flush()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < self._count:
            raise IndexError(number)
        block, place = divmod(number, BLOCK)
        return self._blocks(block, block + 1)[0][place]

    def __iter__(self) -> Iterator[Row]:
        return self.between(0, self._count)

    def between(self, start: int, stop: int, at_once: int = _AT_ONCE) -> Iterator[Row]:
        """Yield the rows of a range that begins with a block, reading about ``at_once`` bytes at a time."""
        assert start % BLOCK == 0
        block, last = start // BLOCK, -(-stop // BLOCK)
        left = stop - start
        while block < last:
            size = self._ends[block + 1] - self._ends[block]
            following = min(last, block + max(1, at_once // size))
            for rows in self._blocks(block, following):
                yield from rows if len(rows) <= left else rows[:left]
                left -= len(rows)
            block = following

    def _blocks(self, start: int, stop: int) -> list[list[Row]]:
        """Return the rows of some blocks."""
        ends = self._ends
        data = memoryview(self._read(ends[start], ends[stop]))
        return [marshal.loads(data[ends[i] - ends[start] : ends[i + 1] - ends[start]]) for i in range(start, stop)]

    def _read(self, start: int, stop: int) -> bytes:
        parts = []
        if start < self._written:
            assert self._file is not None
            parts.append(read_at(self._file, min(stop, self._written) - start, start))
        if stop > self._written:
            parts.append(bytes(self._tail[max(start - self._written, 0) : stop - self._written]))
        return b"".join(parts)

    def _flush(self) -> None:
        with explain_full_temporary_disk("a list of files"):
            if self._file is None:
                self._file = _unnamed_file()
                weakref.finalize(self, os.close, self._file)
            write_at(self._file, bytes(self._tail), self._written)
        self._written += len(self._tail)
        self._tail = bytearray()


def sort_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows in their order; all but a few of them are on disk meanwhile.

    Raises:
        StoreFull: the disk is full.
    """
    waiting = iter(rows)
    runs = DiskRows()
    while run := list(itertools.islice(waiting, _RUN)):
        run.sort()
        if not len(runs) and len(run) < _RUN:
            yield from run
            return
        runs.extend(run)
    parts = (runs.between(start, min(start + _RUN, len(runs)), at_once=0) for start in range(0, len(runs), _RUN))
    yield from heapq.merge(*parts)


def _unnamed_file() -> int:
    descriptor, path = tempfile.mkstemp(prefix="esvit-")
    os.unlink(path)  # noqa: PTH108
    return descriptor
