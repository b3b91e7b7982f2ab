"""Shards: tar files of samples in WebDataset's naming, and an index with the position of each image in them.

A sample consists of ``<key>.jpg`` or ``<key>.png``, ``<key>.cls`` (the label, if there is one) and ``<key>.json``
(``{"name": path in the source}``); the key is the sample's number with nine digits. The bytes of a shard depend only on
its samples.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esvit_core.data.shards.manifest import Manifest, Shard, Split, content_addressed_name
from esvit_core.storage import IntegrityError, ObjectStore, join_uri

# One row per sample. Offsets are those of a file's content in its shard.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<i4"),
        ("label", "<i4"),
        ("offset", "<i8"),
        ("bytes", "<i8"),
        ("info_offset", "<i8"),
        ("info_bytes", "<i8"),
    ]
)
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclass(frozen=True)
class Sample:
    """An image to store.

    Attributes:
        data: the encoded image.
        suffix: ``jpg`` or ``png``.
        label: its class; -1 for none.
        name: path in the source.
    """

    data: bytes
    suffix: str
    label: int
    name: str


class ShardWriter:
    """Writes the samples of one split, one shard at a time.

    Args:
        split: first part of the shards' names.
        directory: local folder for the shards.
        max_bytes: upper bound of a shard's size; a larger sample gets a shard of its own.
        on_shard: called with each finished shard and its file, which then belongs to the caller.
        shards, rows: samples of earlier data, which precede the added ones.
    """

    def __init__(
        self,
        split: str,
        directory: Path,
        max_bytes: int,
        on_shard: Callable[[Shard, Path], None],
        shards: Sequence[Shard] = (),
        rows: Iterable[tuple[int, ...]] = (),
    ) -> None:
        self.split = split
        self.shards = list(shards)
        self._directory, self._max_bytes, self._on_shard = directory, max_bytes, on_shard
        self._rows = list(rows)
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample: Sample) -> int:
        """Append a sample and return its number."""
        number = len(self._rows)
        files = _files(number, sample)
        needed = sum(_BLOCK + _padded(len(data), _BLOCK) for _, data in files)
        if self._tar is not None and _padded(self._tar.offset + needed + 2 * _BLOCK, _RECORD) > self._max_bytes:
            self._finish_shard()
        tar = self._tar or self._begin_shard()
        positions = {}
        for name, data in files:
            positions[name.rpartition(".")[2]] = (tar.offset + _BLOCK, len(data))
            entry = tarfile.TarInfo(name)  # time, owner and group are 0
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        self._rows.append((len(self.shards), sample.label, *positions[sample.suffix], *positions["json"]))
        self._in_shard += 1
        return number

    @property
    def last_row(self) -> tuple[int, ...]:
        """Row of the index for the last added sample, without the number of its shard."""
        return self._rows[-1][1:]

    def restore(self, row: tuple[int, ...], ends: Shard | None) -> None:
        """Append a sample of a shard that was finished earlier.

        Args:
            row: the sample's :attr:`last_row`.
            completed_shard: the shard, if this sample is its last one.

        Raises:
            ValueError: samples of an unfinished shard were added before.
        """
        if self._tar is not None:
            raise ValueError("a finished shard cannot follow one that is being written")
        self._rows.append((len(self.shards), *row))
        if ends is not None:
            self.shards.append(ends)

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._finish_shard()

    def index(self) -> bytes:
        """Return the index as the content of a ``.npy`` file."""
        file = io.BytesIO()
        np.save(file, np.array(self._rows, dtype=INDEX_DTYPE))
        return file.getvalue()

    def describe(self, index: str, classes: int) -> Split:
        """Return the manifest's entry for the split.

        Args:
            index: name of the object that contains the index.
            classes: number of classes.
        """
        labels = np.array([row[1] for row in self._rows], dtype=np.int64)
        return Split(
            samples=len(labels),
            labeled=bool(len(labels)) and bool((labels >= 0).all()),
            shards=self.shards,
            index=index,
            per_class=np.bincount(labels[labels >= 0], minlength=classes).tolist(),
        )

    def _begin_shard(self) -> tarfile.TarFile:
        self._path = self._directory / f"{self.split}-{len(self.shards):06d}.tar"
        self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        return self._tar

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        with self._path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = content_addressed_name(f"shards/{self._path.name}", digest)
        shard = Shard(name=name, samples=self._in_shard, bytes=self._path.stat().st_size, sha256=digest)
        self.shards.append(shard)
        self._in_shard = 0
        self._on_shard(shard, self._path)


def read_array(store: ObjectStore, prefix: str, name: str, manifest: Manifest) -> np.ndarray:
    """Read the array ``name`` of the prepared data at ``prefix`` and check it against the manifest.

    Raises:
        IntegrityError: the object differs from the manifest.
    """
    uri = join_uri(prefix, name)
    data = store.get_bytes(uri)
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise IntegrityError(f"{uri}: damaged, its SHA-256 differs from the manifest's; prepare the data again")
    found: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return found


def read_index(store: ObjectStore, prefix: str, name: str, manifest: Manifest) -> np.ndarray:
    """Read the index ``name`` of the prepared data at ``prefix`` and check it against the manifest.

    Raises:
        IntegrityError: the object differs from the manifest, or is not an index.
    """
    index = read_array(store, prefix, name, manifest)
    if index.dtype != INDEX_DTYPE:
        raise IntegrityError(f"{join_uri(prefix, name)}: not an index of shards; prepare the data again")
    return index


def _files(number: int, sample: Sample) -> list[tuple[str, bytes]]:
    key = f"{number:09d}"
    files = [(f"{key}.{sample.suffix}", sample.data)]
    if sample.label >= 0:
        files.append((f"{key}.cls", str(sample.label).encode()))
    return [*files, (f"{key}.json", json.dumps({"name": sample.name}, ensure_ascii=False).encode())]


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block
