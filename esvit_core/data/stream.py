"""Samples out of shards, through a cache on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from esvit_core.data.manifest import Manifest, Shard, Split
from esvit_core.data.shards import read_index
from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, ObjectStore
from esvit_core.storage.disk import read_at

CACHE_VARIABLE = "ESVIT_CACHE_DIR"
_OPEN_FILES = 64  # a data set may have thousands of shards, a process about a thousand files
_KEPT_DAYS = 30.0  # that a shard stays in the cache after it was opened last


class ShardDataset:
    """The pictures of one split, by number.

    A shard is downloaded when one of its samples is asked for first, checked against the manifest's SHA-256, and kept
    in a cache that all processes of a machine share. May be used from several threads, forked, and pickled.

    Args:
        store: where the data are.
        prefix: folder of the data's manifest.
        split: ``train``, ``val`` or ``test``.
        cache: local directory for shards; None: see :func:`default_cache`.

    Raises:
        NotFound: no data were prepared there.
        UserError: there is no such split.
    """

    def __init__(self, store: ObjectStore, prefix: str, split: str, cache: Path | None = None) -> None:
        manifest = Manifest.read(store, prefix)
        splits: dict[str, Split] = dict(manifest.splits.items())
        if split not in splits:
            raise UserError(f"{prefix}: no split {split!r}; the data has {', '.join(splits) or 'none'}")
        self.prefix, self.split = prefix, split
        self.classes = manifest.classes
        self.shards = splits[split].shards
        index = read_index(store, prefix, splits[split].index, manifest)
        if len(index) != splits[split].samples:
            raise IntegrityError(f"{prefix}: the index of {split} is not the manifest's; prepare the data again")
        self.labels: np.ndarray = index["label"].astype(np.int64)
        self._index = index
        self._files = ShardCache(store, cache or default_cache(store))

    def __len__(self) -> int:
        return len(self._index)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard."""
        return [shard.samples for shard in self.shards]

    def encoded(self, index: int) -> bytes:
        """The stored JPEG or PNG."""
        row = self._row(index)
        return self._read(row["shard"], row["offset"], row["bytes"])

    def image(self, index: int) -> np.ndarray:
        """The picture, (H, W, 3) uint8."""
        data = self.encoded(index)
        try:
            return decode_picture(data)
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{self.prefix}: picture {index} of {self.split} ({self.name(index)}) cannot be decoded ({error}); "
                "prepare the data again"
            ) from None

    def label(self, index: int) -> int:
        """Its class, -1 where it has none."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Where it came from: its path in the source."""
        row = self._row(index)
        return str(json.loads(self._read(row["shard"], row["info_offset"], row["info_bytes"]))["name"])

    def _row(self, index: int) -> Any:
        if not 0 <= index < len(self._index):
            raise IndexError(f"picture {index} of {len(self._index)}")
        return self._index[index]

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        entry = self.shards[shard]
        return self._files.read(entry.address(self.prefix), entry, int(offset), int(length))


def decode_picture(data: bytes) -> np.ndarray:
    """Decode a stored picture, (H, W, 3) uint8.

    Raises:
        OSError, ValueError: it is not a picture.
    """
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        return np.array(picture.convert("RGB"))


def default_cache(store: ObjectStore) -> Path:
    """Where shards are kept on this machine.

    ``ESVIT_CACHE_DIR`` if it is set; beside the data of the embedded store where that is in use; else a directory of
    the user's below the system's temporary one.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if store.address.directory is not None:
        return store.address.directory / "cache"
    return Path(tempfile.gettempdir()) / f"esvit-cache-{os.getuid()}"


class ShardCache:
    """Shards on this machine, named by their content, so that whoever needs the same one finds it."""

    def __init__(self, store: ObjectStore, directory: Path) -> None:
        self._store, self._directory = store, directory
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
            with self._alone(path):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)  # not to be forgotten now
                if not _is_right(path, shard):
                    self._download(uri, shard, path)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(
                f"{self._directory}: shards cannot be kept there ({error.strerror or error}); "
                f"set {CACHE_VARIABLE} to a directory that can be written to"
            ) from None
        self._open[shard.sha256] = descriptor
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _download(self, uri: str, shard: Shard, path: Path) -> None:
        self._forget_old()
        self._store.get_file(uri, path)  # appears whole or not at all
        if not _is_right(path, shard):
            path.unlink(missing_ok=True)
            raise IntegrityError(f"{uri}: damaged, its SHA-256 is not the manifest's; prepare the data again")

    def _forget_old(self) -> None:
        """Delete what no one has opened for long; who has it open reads on."""
        limit = time.time() - _KEPT_DAYS * 24 * 3600
        for path in self._directory.glob("*.tar"):
            with contextlib.suppress(OSError):  # another process may be quicker
                if path.stat().st_mtime < limit:
                    path.unlink()

    @contextlib.contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """One process at a time looks at, and if need be downloads, a shard."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_right(path: Path, shard: Shard) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != shard.bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except FileNotFoundError:
        return False
