"""Local disks: room is asked for before writing, and every read and write is of all its bytes or an error."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esvit_core.storage.marker import MARKER
from esvit_core.storage.store_errors import LocalDiskError, PathError, StoreError, StoreFull

# Kept free beside what the embedded server stores: its index and log go on growing, and the parts that other
# processes have under way are not on the disk yet.
RESERVE_BYTES = 64 * 2**20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_WRONG_PATH = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EACCES, errno.EPERM, errno.EROFS),
    }
)


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user may still write in ``directory`` (or where it is going to be)."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_room(directory: Path, size: int = 0) -> None:
    """Make sure that the disk of the embedded store takes ``size`` more bytes.

    Raises:
        StoreFull: it does not; names the directory, what is needed and what is free.
    """
    free, needed = free_bytes(directory), size + RESERVE_BYTES
    if free < needed:
        raise StoreFull(
            f"{directory}: the disk of the object store is full: {format_mib(needed)} needed, {format_mib(free)} free; "
            "free some space there, or choose a directory on another disk"
        )


def require_folder(directory: Path) -> None:
    """Make sure that the folder of the embedded store is there.

    Its server has its files open and goes on for a while without them, as if nothing was lost.

    Raises:
        PathError: it is not.
    """
    if not (directory / MARKER).exists():
        raise PathError(
            f"{directory}: the folder of the object store was deleted while it was in use, and what it held is lost; "
            "start again"
        )


def disk_error_class(error: OSError) -> type[StoreError]:
    """Whether a failed operation on a file is a full disk, a wrong path, or a disk that fails."""
    if is_full(error):
        return StoreFull
    return PathError if error.errno in _WRONG_PATH else LocalDiskError


def is_full(error: OSError) -> bool:
    """Whether the system says that a disk or a quota is used up."""
    return error.errno in _NO_ROOM


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at a position of a file.

    ``os.pwrite`` may write less than it is given, which is how a disk that is nearly full begins to fail.

    Raises:
        OSError: not all of it could be written.
    """
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        left, offset = left[written:], offset + written


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read ``length`` bytes from a position of a file; fewer only where the file ends before.

    Raises:
        OSError: they cannot be read.
    """
    data = os.pread(descriptor, length, offset)
    while 0 < len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


@contextmanager
def explain_write_errors(
    path: Path, *kinds: type[Exception], otherwise: str = "set TMPDIR to another disk"
) -> Iterator[None]:
    """Report a failure to write a temporary file as one line about that file.

    Args:
        path: what is written.
        kinds: what the library that writes it raises besides ``OSError``.
        otherwise: what helps besides free space.

    Raises:
        StoreFull: its disk is full.
        LocalDiskError, PathError: it cannot be written for another reason.
    """
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except caught as error:
        if isinstance(error, OSError) and is_full(error):
            raise StoreFull(f"{path}: the disk is full; free some space there, or {otherwise}") from None
        reason = (isinstance(error, OSError) and error.strerror) or error
        family = disk_error_class(error) if isinstance(error, OSError) else LocalDiskError
        raise family(f"{path}: cannot be written ({reason}); free some space there, or {otherwise}") from None


@contextmanager
def explain_full_temporary_disk(thing: str) -> Iterator[None]:
    """Report a full disk below the system's temporary folder as one line.

    Args:
        thing: what is written there.

    Raises:
        StoreFull: it is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise StoreFull(
            f"{tempfile.gettempdir()}: the disk is full; {thing} needs room there: free some, or set TMPDIR"
        ) from None


def format_mib(size: int) -> str:
    """A size as people read it."""
    return f"{size / 2**20:,.0f} MiB"
