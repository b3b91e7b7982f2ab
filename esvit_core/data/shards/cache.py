"""Cache of shards on this machine's disk: downloaded once, verified, shared by processes, and limited in size."""

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
from typing import Any, TextIO

from esvit_core.data.shards.manifest import StoredFile
from esvit_core.errors import UserError
from esvit_core.private_folders import private_folder
from esvit_core.storage import IntegrityError, ObjectStore, StoreFull
from esvit_core.storage.disk import free_bytes, read_at
from esvit_core.storage.store_errors import PathError

CACHE_VARIABLE = "ESVIT_CACHE_DIR"
LIMIT_VARIABLE = "ESVIT_CACHE_GIB"
_SHARE_OF_DISK = 0.5  # of the space that is free or used by the cache, if no limit is set
_OPEN_FILES = 64  # a dataset may have thousands of shards, but a process only about a thousand open files
_IN_USE = 8  # shards that training mixes at a time, see esvit_core.data.loading.sampler
DAY = 86_400.0
_KEPT_DAYS = 30.0  # after which an unused shard is removed


def default_cache(store: ObjectStore) -> Path:
    """Return the folder of the cache on this machine.

    It is ``ESVIT_CACHE_DIR`` if that is set, beside the data of the embedded store where that is in use, and otherwise a
    folder of this user below the system's temporary directory.

    Raises:
        UserError: the folder cannot be created, or other users have access to it.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if store.address.directory is not None:
        return store.address.directory / "cache"
    return private_folder("cache", CACHE_VARIABLE)


def size_limit() -> int | None:
    """Return the limit that ``ESVIT_CACHE_GIB`` sets, in bytes; None if it is not set.

    Raises:
        UserError: its value is not a positive number.
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
    """Cache of shards, named by their content, so that all users of a shard share one file.

    A shard is verified after its download; that it is verified is recorded with the size and the time of the file, so that
    it is verified again only if the file has changed. If a download would exceed the size limit, the least recently opened shards are removed first. A shard that a process has
    open is locked and stays, so shards in use can exceed the limit. A cache may be used from several threads, forked, and
    pickled.

    Args:
        store: source of the shards.
        directory: folder of the cache; created if necessary.

    Raises:
        UserError: the size limit is not a number.
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

    def read(self, uri: str, shard: StoredFile, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the shard, starting at ``offset``.

        Raises:
            IntegrityError: the stored shard differs from the manifest.
            StoreFull: the cache's disk is full of other files.
            UserError: the cache cannot be used.
        """
        with self._lock:
            descriptor = self._open.get(shard.sha256)
            if descriptor is None:
                descriptor = self._add(uri, shard)
            self._open.move_to_end(shard.sha256)
            # Reading at a position is not affected by forks and threads, which share the file offset.
            data = read_at(descriptor, length, offset)
        if len(data) != length:
            raise IntegrityError(
                f"{self._directory / shard.sha256}.tar: was truncated while in use; do not modify the cache, or set "
                f"{CACHE_VARIABLE} to another directory"
            )
        return data

    def fetch(self, uri: str, shard: StoredFile) -> None:
        """Download a shard that will be needed, if it is not there; for a thread beside the one that reads.

        Raises:
            IntegrityError, StoreFull, UserError: as for :meth:`read`.
        """
        with self._verified(uri, shard):
            pass

    def _add(self, uri: str, shard: StoredFile) -> int:
        with self._verified(uri, shard) as path:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # marks the shard as in use while it is open
        self._open[shard.sha256] = descriptor
        self._close_all_but(_OPEN_FILES)
        return descriptor

    @contextlib.contextmanager
    def _verified(self, uri: str, shard: StoredFile) -> Iterator[Path]:
        """Hold the lock of a shard whose file is there, verified, and the most recently used one."""
        path = self._directory / f"{shard.sha256}.tar"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(path) as lock:
                if not _is_recorded(lock, path, shard) and not _is_valid(path, shard):
                    self._download(uri, shard, path)
                # The least recently used shard is removed first. The system's own timestamps advance in steps of some
                # milliseconds, in which several shards can be opened.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
                _record(lock, path)
                yield path
        except (FileNotFoundError, PathError) as error:
            if isinstance(error, PathError) and self._directory.exists():
                raise  # the shard cannot be written for another reason
            raise UserError(
                f"{self._directory}: the folder of the shard cache was deleted while in use; start again"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self._directory}: cannot store shards ({error.strerror or error}); "
                f"set {CACHE_VARIABLE} to a writable directory"
            ) from None

    def _download(self, uri: str, shard: StoredFile, path: Path) -> None:
        path.unlink(missing_ok=True)  # an existing file is damaged
        self._make_room(shard.bytes)
        try:
            self._store.get_file(uri, path)  # atomic
        except StoreFull:
            if not self._make_room(shard.bytes, everything=True):
                raise
            self._store.get_file(uri, path)
        if not _is_valid(path, shard):
            path.unlink(missing_ok=True)
            raise IntegrityError(f"{uri}: damaged, its SHA-256 differs from the manifest's; prepare the data again")

    def _make_room(self, needed: int, everything: bool = False) -> bool:
        """Remove unused shards, and as many others as the limit requires; return whether anything was removed.

        Args:
            needed: size of the shard to download, bytes.
            everything: remove all shards that are not open.
        """
        cached = sorted(_cached_shards(self._directory))
        used = sum(shard.bytes for shard in cached)
        limit = self._limit
        if limit is None:
            limit = int(_SHARE_OF_DISK * (used + free_bytes(self._directory)))
        over = 0 if everything else used + needed - limit
        if everything or over > 0:
            self._close_all_but(_IN_USE)
        oldest = time.time_ns() - int(_KEPT_DAYS * DAY * 1e9)
        freed = _remove_unfinished(self._directory)
        for shard in cached:
            if (everything or freed < over or shard.opened < oldest) and _try_remove(shard.path):
                freed += shard.bytes
        return freed > 0

    def _close_all_but(self, count: int) -> None:
        while len(self._open) > count:
            os.close(self._open.popitem(last=False)[1])


@dataclass(frozen=True, order=True)
class _CachedShard:
    """A shard in the cache: time of its last opening (nanoseconds since 1970), path, size in bytes."""

    opened: int
    path: Path
    bytes: int


def _cached_shards(directory: Path) -> Iterator[_CachedShard]:
    for path in directory.glob("*.tar"):
        with contextlib.suppress(OSError):  # another process may remove it first
            found = path.stat()
            yield _CachedShard(found.st_atime_ns, path, found.st_size)


def _remove_unfinished(directory: Path) -> int:
    """Remove the files of killed downloads; return their size in bytes."""
    freed = 0
    for path in directory.glob(".*.part"):
        with contextlib.suppress(OSError):
            found = path.stat()
            if found.st_mtime < time.time() - DAY:
                path.unlink()
                freed += found.st_size
    return freed


def _try_remove(path: Path) -> bool:
    """Remove a shard unless a process uses it or is about to; return whether it was removed."""
    # A BlockingIOError from either lock means that the shard is in use.
    with contextlib.suppress(OSError), _locked(path, wait=False), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[TextIO]:
    """Hold the lock of a shard, which one process at a time checks, downloads or removes; yield the lock's file.

    Raises:
        BlockingIOError: another process holds the lock and ``wait`` is false.
    """
    with path.with_suffix(".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield lock
        finally:
            lock.flush()
            # Closing the file would not suffice: a process that was forked meanwhile has it open, too.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _stamp(path: Path) -> str:
    """Return what changes when a file is replaced or written to."""
    found = path.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _record(lock: TextIO, path: Path) -> None:
    """Record in the file of its lock that a shard is verified."""
    lock.seek(0)
    lock.truncate()
    lock.write(_stamp(path))


def _is_recorded(lock: TextIO, path: Path, shard: StoredFile) -> bool:
    """Return whether the shard was verified and its file is the same since."""
    lock.seek(0)
    try:
        return lock.read() == _stamp(path) and path.stat().st_size == shard.bytes
    except FileNotFoundError:
        return False


def _is_valid(path: Path, shard: StoredFile) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != shard.bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except FileNotFoundError:
        return False
