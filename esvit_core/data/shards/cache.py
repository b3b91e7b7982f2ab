"""Shards on this machine's disk: downloaded once, checked, shared by its processes, and bounded in size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esvit_core.data.shards.manifest import Shard
from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, ObjectStore, StoreFull
from esvit_core.storage.disk import free_bytes, read_at
from esvit_core.storage.private_folders import private_folder

CACHE_VARIABLE = "ESVIT_CACHE_DIR"
LIMIT_VARIABLE = "ESVIT_CACHE_GIB"
_SHARE_OF_DISK = 0.5  # of the room that the cache has and could have, where no limit is set
_OPEN_FILES = 64  # a data set may have thousands of shards, a process about a thousand files
_IN_USE = 8  # shards that training mixes at a time, see esvit_core.data.loading.sampler
DAY = 86_400.0
_KEPT_DAYS = 30.0  # that a shard stays in the cache after it was opened last


def default_cache(store: ObjectStore) -> Path:
    """Where shards are kept on this machine.

    ``ESVIT_CACHE_DIR`` if it is set; beside the data of the embedded store where that is in use; else a folder of
    this user's below the system's temporary one.

    Raises:
        UserError: that folder cannot be made, or is not this user's alone.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if store.address.directory is not None:
        return store.address.directory / "cache"
    return private_folder("cache", CACHE_VARIABLE)


def size_limit() -> int | None:
    """The limit that ``ESVIT_CACHE_GIB`` sets, bytes; None: it is not set.

    Raises:
        UserError: it is no positive number.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise UserError(f"{LIMIT_VARIABLE}={text}: expected a positive number of GiB, such as 20; or unset it")
    return int(limit * 2**30)


class ShardCache:
    """Shards on this machine, named by their content, so that whoever needs the same one finds it.

    Where a download would exceed the size limit, the shards that were opened the longest time ago go first. One that
    a process has open is locked and stays, so the limit can be exceeded by what is in use at once. May be used from
    several threads, forked, and pickled.

    Args:
        store: where the shards come from.
        directory: where they are kept; made if need be.

    Raises:
        UserError: the size limit is no number.
    """

    def __init__(self, store: ObjectStore, directory: Path) -> None:
        self._store, self._directory, self._limit = store, directory, size_limit()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_directory": self._directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_store"], state["_directory"])  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def read(self, uri: str, shard: Shard, offset: int, length: int) -> bytes:
        """``length`` bytes of the shard from ``offset`` on.

        Raises:
            IntegrityError: the stored shard is not the manifest's.
            StoreFull: the cache's disk is full of other things.
            UserError: the cache cannot be used.
        """
        with self._lock:
            descriptor = self._open.get(shard.sha256)
            if descriptor is None:
                descriptor = self._add(uri, shard)
            self._open.move_to_end(shard.sha256)
            # By position: neither a fork nor a thread can disturb it.
            data = read_at(descriptor, length, offset)
        if len(data) != length:
            raise IntegrityError(
                f"{self._directory / shard.sha256}.tar: became shorter while it was in use; leave the cache alone, or "
                f"set {CACHE_VARIABLE} to another directory"
            )
        return data

    def _add(self, uri: str, shard: Shard) -> int:
        path = self._directory / f"{shard.sha256}.tar"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _alone(path):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)  # the time of the last opening decides what goes first
                if not _is_right(path, shard):
                    self._download(uri, shard, path)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # it is in use as long as it is open
        except OSError as error:
            raise UserError(
                f"{self._directory}: shards cannot be kept there ({error.strerror or error}); "
                f"set {CACHE_VARIABLE} to a directory that can be written to"
            ) from None
        self._open[shard.sha256] = descriptor
        self._close_all_but(_OPEN_FILES)
        return descriptor

    def _download(self, uri: str, shard: Shard, path: Path) -> None:
        path.unlink(missing_ok=True)  # if it is there it is damaged
        self._make_room(shard.bytes)
        try:
            self._store.get_file(uri, path)  # appears whole or not at all
        except StoreFull:
            if not self._make_room(shard.bytes, everything=True):
                raise
            self._store.get_file(uri, path)
        if not _is_right(path, shard):
            path.unlink(missing_ok=True)
            raise IntegrityError(f"{uri}: damaged, its SHA-256 is not the manifest's; prepare the data again")

    def _make_room(self, needed: int, everything: bool = False) -> bool:
        """Remove shards that were not opened for long, and as many more as the limit asks for; whether any went.

        Args:
            needed: bytes of the one that is to come.
            everything: remove all that nobody has open.
        """
        kept = sorted(_kept(self._directory))
        held = sum(one.bytes for one in kept)
        limit = self._limit
        if limit is None:
            limit = int(_SHARE_OF_DISK * (held + free_bytes(self._directory)))
        over = 0 if everything else held + needed - limit
        if everything or over > 0:
            self._close_all_but(_IN_USE)
        oldest = time.time() - _KEPT_DAYS * DAY
        gone = _remove_unfinished(self._directory)
        for one in kept:
            if (everything or gone < over or one.opened < oldest) and _removed(one.path):
                gone += one.bytes
        return gone > 0

    def _close_all_but(self, count: int) -> None:
        while len(self._open) > count:
            os.close(self._open.popitem(last=False)[1])


@dataclass(frozen=True, order=True)
class _Kept:
    """A shard in the cache: when it was opened last (seconds since 1970), where it is, its size."""

    opened: float
    path: Path
    bytes: int


def _kept(directory: Path) -> Iterator[_Kept]:
    for path in directory.glob("*.tar"):
        with contextlib.suppress(OSError):  # another process may be quicker
            found = path.stat()
            yield _Kept(found.st_mtime, path, found.st_size)


def _remove_unfinished(directory: Path) -> int:
    """Remove what killed downloads have left, and say how many bytes that was."""
    freed = 0
    for path in directory.glob(".*.part"):
        with contextlib.suppress(OSError):
            found = path.stat()
            if found.st_mtime < time.time() - DAY:
                path.unlink()
                freed += found.st_size
    return freed


def _removed(path: Path) -> bool:
    """Remove a shard unless a process reads it, or is about to; whether it was removed."""
    # BlockingIOError of either lock: it is in use.
    with contextlib.suppress(OSError), _alone(path, wait=False), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


@contextlib.contextmanager
def _alone(path: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time looks at a shard, and downloads or removes it.

    Raises:
        BlockingIOError: another does, and this one is not to wait.
    """
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _is_right(path: Path, shard: Shard) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != shard.bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except FileNotFoundError:
        return False
