"""Local disks: check free space before writing, and read and write completely or raise an error."""

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

# Kept free on the disk of the embedded server: its index and log keep growing, and parts that other processes are
# uploading are not on the disk yet.
RESERVE_BYTES = 64 * 2**20
# Bytes that are written by one call. From 2 MiB on, a call gets huge pages for the file, which a virtual machine may have to
# get from its host first: 2.4 ms a MiB instead of 0.25 (Linux 6.18, ext4).
_PIECE = 2**20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_WRONG_PATH = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EACCES, errno.EPERM, errno.EROFS),
    }
)


def free_bytes(directory: Path) -> int:
    """Return the bytes that an ordinary user may still write in ``directory``, which need not exist yet."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_room(directory: Path, size: int = 0) -> None:
    """Check that the disk of the embedded store has space for ``size`` more bytes.

    Raises:
        StoreFull: it has not; the message names the directory and the needed and free space.
    """
    free, needed = free_bytes(directory), size + RESERVE_BYTES
    if free < needed:
        raise StoreFull(
            f"{directory}: the disk of the object store is full: {format_mib(needed)} needed, {format_mib(free)} free; "
            "free some space there, or choose a directory on another disk"
        )


def require_folder(directory: Path) -> None:
    """Check that the folder of the embedded store exists.

    If it is deleted, its server continues for a while with its open files, as if nothing were lost.

    Raises:
        PathError: the folder does not exist.
    """
    if not (directory / MARKER).exists():
        raise deleted_folder(directory)


def deleted_folder(directory: Path) -> PathError:
    """Return the error for a folder of the embedded store that is deleted while the store is in use."""
    return PathError(
        f"{directory}: the folder of the object store was deleted while in use, and its content is lost; start again"
    )


def disk_error_class(error: OSError) -> type[StoreError]:
    """Return the error class for a failed file operation: full disk, wrong path, or failing disk."""
    if is_full(error):
        return StoreFull
    return PathError if error.errno in _WRONG_PATH else LocalDiskError


def is_full(error: OSError) -> bool:
    """Return whether the error means that a disk or a quota is full."""
    return error.errno in _NO_ROOM


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at a position of a file.

    ``os.pwrite`` may write only a part, for example when a disk is nearly full.

    Raises:
        OSError: not all of the data could be written.
    """
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left[:_PIECE], offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        left, offset = left[written:], offset + written


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read ``length`` bytes from a position of a file, or fewer if the file ends before.

    Raises:
        OSError: the file cannot be read.
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
    """Convert failures to write a temporary file to one-line errors about that file.

    Args:
        path: the file.
        kinds: exceptions of the writing library other than ``OSError``.
        otherwise: alternative to freeing space, for the message.

    Raises:
        StoreFull: the disk is full.
        LocalDiskError, PathError: the file cannot be written for another reason.
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
    """Convert the error of a full temporary disk to a one-line error.

    Args:
        thing: what is written there.

    Raises:
        StoreFull: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise StoreFull(
            f"{tempfile.gettempdir()}: the disk is full; {thing} needs space there: free some, or set TMPDIR"
        ) from None


def format_mib(size: int) -> str:
    """Format a size in MiB."""
    return f"{size / 2**20:,.0f} MiB"
