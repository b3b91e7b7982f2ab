"""Shards: tar files of samples in WebDataset's naming, and an index with the position of each image in them.

A sample consists of ``<key>.jpg`` or ``<key>.png``, ``<key>.cls`` (the label, if there is one) and ``<key>.json``
(``{"name": path in the source}``); the key consists of five digits for the part of the split and four for the sample's number
in the part. The bytes of a shard depend only on its samples and its part.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esvit_core.data.shards.manifest import (
    Manifest,
    NamedFile,
    Part,
    PartReference,
    Shard,
    StoredFile,
    content_addressed_name,
)
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
    """Writes the samples of one part, one shard at a time.

    Args:
        name: first part of the shards' names.
        directory: local folder for the shards.
        max_bytes: upper bound of a shard's size; a larger sample gets a shard of its own.
        on_shard: called with each finished shard and its file, which then belongs to the caller.
        key: first digits of the samples' keys.
    """

    def __init__(
        self, name: str, directory: Path, max_bytes: int, on_shard: Callable[[Shard, Path], None], key: str = "00000"
    ) -> None:
        self.shards: list[Shard] = []
        self._name, self._key = name, key
        self._directory, self._max_bytes, self._on_shard = directory, max_bytes, on_shard
        self._rows: list[tuple[int, ...]] = []
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample: Sample) -> int:
        """Append a sample and return its number."""
        number = len(self._rows)
        files = _files(f"{self._key}{number:04d}", sample)
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
        tar.getmembers().clear()  # which tarfile would keep, a kilobyte for each
        self._rows.append((len(self.shards), sample.label, *positions[sample.suffix], *positions["json"]))
        self._in_shard += 1
        return number

    @property
    def last_row(self) -> tuple[int, ...]:
        """Row of the index for the last added sample, without the number of its shard."""
        return self._rows[-1][1:]

    def restore(self, row: tuple[int, ...], completed_shard: Shard | None) -> None:
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
        if completed_shard is not None:
            self.shards.append(completed_shard)

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._finish_shard()

    def index(self) -> np.ndarray:
        """Return the index of the samples, (N,) of :data:`INDEX_DTYPE`."""
        return np.array(self._rows, dtype=INDEX_DTYPE)

    def _begin_shard(self) -> tarfile.TarFile:
        self._path = self._directory / f"{self._name}-{len(self.shards):03d}.tar"
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


def encode_array(array: np.ndarray) -> bytes:
    """Return the content of a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read_object(store: ObjectStore, folder: str, name: str, expected: StoredFile) -> bytes:
    """Read an object of prepared data.

    Args:
        folder: folder of the data.
        name: name of the object below it.
        expected: its size and digest.

    Raises:
        IntegrityError: the object differs from what is expected.
    """
    uri = join_uri(folder, name)
    data = store.get_bytes(uri)
    require_intact(uri, data, expected)
    return data


def require_intact(uri: str, data: bytes, expected: StoredFile) -> None:
    """Raise an error if the content of an object is not the expected one.

    Raises:
        IntegrityError: its digest differs.
    """
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise IntegrityError(f"{uri}: damaged, its SHA-256 differs from the manifest's; prepare the data again")


def read_part(store: ObjectStore, prefix: str, reference: PartReference) -> Part:
    """Read a part of the data at ``prefix``.

    Raises:
        IntegrityError: the object is damaged.
    """
    uri = reference.address(prefix)
    data = store.get_bytes(uri)
    require_intact(uri, data, reference)
    return Part.model_validate_json(data)


def stored_objects(store: ObjectStore, prefix: str, manifest: Manifest) -> dict[str, StoredFile]:
    """Return all objects below the folder of prepared data that its manifest and parts name, by name."""
    objects: dict[str, StoredFile] = dict(manifest.files)
    for reference in manifest.parts:
        if not reference.is_external:
            objects |= {**read_part(store, prefix, reference).objects(), reference.name: reference}
    return objects


def read_index(store: ObjectStore, folder: str, file: NamedFile) -> np.ndarray:
    """Read the index of a part, (N,) of :data:`INDEX_DTYPE`.

    Args:
        folder: folder of the data that the part belongs to.
        file: the index.

    Raises:
        IntegrityError: the object is damaged, or is not an index.
    """
    data = read_object(store, folder, file.name, file)
    index: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    if index.dtype != INDEX_DTYPE:
        raise IntegrityError(f"{join_uri(folder, file.name)}: not an index of shards; prepare the data again")
    return index


def _files(key: str, sample: Sample) -> list[tuple[str, bytes]]:
    files = [(f"{key}.{sample.suffix}", sample.data)]
    if sample.label >= 0:
        files.append((f"{key}.cls", str(sample.label).encode()))
    return [*files, (f"{key}.json", json.dumps({"name": sample.name}, ensure_ascii=False).encode())]


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block
