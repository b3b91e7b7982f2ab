"""The list of files of a zip, read piece by piece: zipfile keeps about a kilobyte per file in memory."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from esvit_core.storage.disk import read_at

# The records at the end of a zip (APPNOTE.TXT, 4.3.14 to 4.3.16), and the fixed part of a file's record (4.3.12).
_END, _END_64, _LOCATOR_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_LENGTHS, _LENGTHS_AT, _RECORD = struct.Struct("<3H"), 28, 46
_PIECE = 2**18  # bytes; a record is shorter
_LARGEST_COMMENT = 2**16
_MAX_32 = 2**32 - 1


class ZipDirectory:
    """The list of files in a zip.

    Args:
        path: the zip.

    Raises:
        BadZipFile: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            self._start, self._size, self._offset = _find_directory(self._file.fileno())
        except (struct.error, ValueError):
            self._file.close()
            zipfile.ZipFile(path).close()  # says what is wrong
            raise zipfile.BadZipFile("its end is unusual") from None

    def __iter__(self) -> Iterator[tuple[zipfile.ZipInfo, tuple[int, int]]]:
        """Yield the files, and the place of the record of each: position and length.

        Raises:
            BadZipFile: the zip is damaged.
        """
        position, end = self._start, self._start + self._size
        while position < end:
            piece = read_at(self._file.fileno(), min(_PIECE, end - position), position)
            places, size = [], 0
            while size + _RECORD <= len(piece):
                length = _RECORD + sum(_LENGTHS.unpack_from(piece, size + _LENGTHS_AT))
                if size + length > len(piece):
                    break
                places.append((position + size, length))
                size += length
            if not places:
                raise zipfile.BadZipFile("Truncated central directory")
            with zipfile.ZipFile(io.BytesIO(piece[:size] + _end(len(places), size, 0))) as part:
                yield from zip(part.infolist(), places, strict=True)
            position += size

    def open(self, position: int, length: int) -> zipfile.ZipFile:
        """Return the zip as if it had only one file, of which the place of the record is given."""
        record = read_at(self._file.fileno(), length, position)
        tail = record + _end(1, length, self._offset)
        return zipfile.ZipFile(io.BufferedReader(_WithTail(self._file.fileno(), self._start, tail)))

    def close(self) -> None:
        self._file.close()


class _WithTail(io.RawIOBase):
    """The first bytes of a file, and others after them; it has its own position."""

    def __init__(self, descriptor: int, size: int, tail: bytes) -> None:
        self._descriptor, self._size, self._tail = descriptor, size, tail
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size + len(self._tail)}
        if starts[whence] + offset < 0:
            raise OSError("a position before the file")
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._position < self._size:
            data = read_at(self._descriptor, min(len(buffer), self._size - self._position), self._position)
        else:
            data = self._tail[self._position - self._size :][: len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _find_directory(descriptor: int) -> tuple[int, int, int]:
    """Return the position of the directory in a zip, its size, and its position as the zip states it.

    The latter is smaller if something precedes the zip, such as a program that unpacks it.

    Raises:
        ValueError, struct.error: there is none.
    """
    size = os.fstat(descriptor).st_size
    tail_at = max(0, size - _LARGEST_COMMENT - _END.size)
    tail = read_at(descriptor, size - tail_at, tail_at)
    end = len(tail) - _END.size
    if end < 0 or not (tail.startswith(b"PK\5\6", end) and tail.endswith(b"\0\0")):
        end = tail.rindex(b"PK\5\6")
    *_, length, offset, _ = _END.unpack_from(tail, end)
    stop = tail_at + end
    locator = read_at(descriptor, _LOCATOR_64.size, max(0, stop - _LOCATOR_64.size))
    if locator.startswith(b"PK\6\7"):
        stop -= _LOCATOR_64.size + _END_64.size
        kind, *_, length, offset = _END_64.unpack(read_at(descriptor, _END_64.size, stop))
        if kind != b"PK\6\6":
            raise ValueError("no record of the end")
    if stop < length or stop - length < offset:
        raise ValueError("the directory does not fit")
    return stop - length, length, offset


def _end(count: int, length: int, offset: int) -> bytes:
    """Return the records at the end of a zip with so many files, and the size and position of its directory."""
    if offset < _MAX_32:
        return _END.pack(b"PK\5\6", 0, 0, count, count, length, offset, 0)
    end = _END_64.pack(b"PK\6\6", _END_64.size - 12, 45, 45, 0, 0, count, count, length, offset)
    locator = _LOCATOR_64.pack(b"PK\6\7", 0, offset + length, 1)
    return end + locator + _END.pack(b"PK\5\6", 0, 0, count, count, length, _MAX_32, 0)
