"""Room on a disk: asked for before writing, because a full disk is a poor place to find out."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from esvit_core.storage.errors import StoreFull

# Kept free beside what the embedded server stores: its index and log go on growing, and the parts that other
# processes have under way are not on the disk yet.
RESERVE_BYTES = 64 * 2**20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


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
            f"{directory}: the disk of the object store is full: {mebibytes(needed)} needed, {mebibytes(free)} free; "
            "free some space there, or choose a directory on another disk"
        )


def is_full(error: OSError) -> bool:
    """Whether the system says that a disk or a quota is used up."""
    return error.errno in _NO_ROOM


def mebibytes(size: int) -> str:
    """A size as people read it."""
    return f"{size / 2**20:,.0f} MiB"
