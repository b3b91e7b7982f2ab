"""Shards: tars of samples in WebDataset's naming, and the index that says where in them each image lies.

A sample is ``<key>.jpg`` or ``<key>.png``, ``<key>.cls`` (the label, only where there is one) and ``<key>.json``
(``{"name": where it came from}``); the key is the sample's number, nine digits. The bytes of a shard depend on its
samples alone.
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

from esvit_core.data.shards.manifest import Manifest, Shard, Split, named_by_content
from esvit_core.storage import IntegrityError, ObjectStore, join_uri

# One row a sample. Offsets are those of a file's content in its shard.
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
    """An image ready to be stored.

    Attributes:
        data: the encoded image.
        suffix: ``jpg`` or ``png``.
        label: its class, -1 for none.
        name: where it came from.
    """

    data: bytes
    suffix: str
    label: int
    name: str


class ShardWriter:
    """Writes the samples of one split, a shard at a time.

    Args:
        split: first part of the shards' names.
        directory: local; holds one shard at a time.
        max_bytes: upper bound of a shard; a sample larger than that gets a shard of its own.
        keep: called with each finished shard and its file, which is deleted afterwards.
        shards, rows: samples of earlier data, which go before those that are added.
    """

    def __init__(
        self,
        split: str,
        directory: Path,
        max_bytes: int,
        keep: Callable[[Shard, Path], None],
        shards: Sequence[Shard] = (),
        rows: Iterable[tuple[int, ...]] = (),
    ) -> None:
        self.split = split
        self.shards = list(shards)
        self._directory, self._max_bytes, self._keep = directory, max_bytes, keep
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
        places = {}
        for name, data in files:
            places[name.rpartition(".")[2]] = (tar.offset + _BLOCK, len(data))
            entry = tarfile.TarInfo(name)  # time, owner and group 0
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        self._rows.append((len(self.shards), sample.label, *places[sample.suffix], *places["json"]))
        self._in_shard += 1
        return number

    @property
    def last_row(self) -> tuple[int, ...]:
        """Of the index, for the sample that was added last; without the number of its shard."""
        return self._rows[-1][1:]

    def restore(self, row: tuple[int, ...], ends: Shard | None) -> None:
        """Append a sample whose shard was finished before.

        Args:
            row: its :attr:`last_row`.
            ends: the shard, where the sample is its last one.

        Raises:
            ValueError: samples were added before it whose shard is not finished.
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
        """The index as the content of a ``.npy`` file."""
        file = io.BytesIO()
        np.save(file, np.array(self._rows, dtype=INDEX_DTYPE))
        return file.getvalue()

    def describe(self, index: str, classes: int) -> Split:
        """The manifest's entry of the split.

        Args:
            index: name of the object that holds the index.
            classes: number of classes.
        """
        labels = np.array([row[1] for row in self._rows], dtype=np.int64)
        return Split(
            samples=len(labels),
            labelled=bool(len(labels)) and bool((labels >= 0).all()),
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
        name = named_by_content(f"shards/{self._path.name}", digest)
        shard = Shard(name=name, samples=self._in_shard, bytes=self._path.stat().st_size, sha256=digest)
        self.shards.append(shard)
        self._in_shard = 0
        self._keep(shard, self._path)
        self._path.unlink()


def read_index(store: ObjectStore, prefix: str, name: str, manifest: Manifest) -> np.ndarray:
    """The index ``name`` of the prepared data at ``prefix``, compared with the manifest.

    Raises:
        IntegrityError: it is not the manifest's, or no index.
    """
    uri = join_uri(prefix, name)
    data = store.get_bytes(uri)
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise IntegrityError(f"{uri}: damaged, its SHA-256 is not the manifest's; prepare the data again")
    index: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    if index.dtype != INDEX_DTYPE:
        raise IntegrityError(f"{uri}: not an index of shards; prepare the data again")
    return index


def _files(number: int, sample: Sample) -> list[tuple[str, bytes]]:
    key = f"{number:09d}"
    files = [(f"{key}.{sample.suffix}", sample.data)]
    if sample.label >= 0:
        files.append((f"{key}.cls", str(sample.label).encode()))
    return [*files, (f"{key}.json", json.dumps({"name": sample.name}, ensure_ascii=False).encode())]


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block
