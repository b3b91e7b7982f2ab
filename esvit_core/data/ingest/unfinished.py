"""Records of an unfinished preparation, from which the next one resumes.

Beside each stored shard there is a record of its samples and of the files that were found bad before it. A preparation of
the same content with the same settings does not read those files again. Objects are named by their content, so any number
of preparations may write below one folder concurrently without overwriting each other's objects.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from esvit_core.config import DataConfig
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import File
from esvit_core.data.shards.manifest import Shard
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.parallel_transfer import PARALLEL

UNFINISHED = "unfinished"
_VERSION = 2
_DAMAGE = (ValueError, TypeError, LookupError, EOFError, OSError, zlib.error)


class StaleProgressError(Exception):
    """The records of an unfinished preparation do not match this one, which has to start over."""


@dataclass(frozen=True)
class FileResult:
    """The result of preparing a file.

    Attributes:
        file: the file with its status.
        number: number of the image in its split; -1 if it was not stored.
        stored: SHA-256 of the stored bytes.
        reencoded: whether the stored bytes differ from the file's.
        row: row of the index, without the number of the shard.
        completed_shard: the shard, if this file is its last one.
    """

    file: File
    number: int = -1
    stored: str = ""
    reencoded: bool = False
    row: tuple[int, ...] = ()
    completed_shard: Shard | None = None

    def with_stamp_of(self, entry: Entry) -> File:
        """Return the file with its current stamp."""
        return replace(self.file, stamp=entry.stamp)


@dataclass(frozen=True)
class ShardRecord:
    """Record of a stored shard.

    Attributes:
        split: split of the shard.
        shard: name, size and digest.
        samples: results of its files, in order.
        bad: files that were left out since the previous record.
    """

    split: SplitName
    shard: Shard
    samples: list[FileResult]
    bad: list[File]

    def encode(self) -> bytes:
        """Encode the record as an object's content."""
        samples = [[asdict(r.file), r.number, r.stored, r.reencoded, r.row] for r in self.samples]
        values = {
            "split": self.split,
            "shard": self.shard.model_dump(mode="json"),
            "samples": samples,
            "bad": [asdict(file) for file in self.bad],
        }
        return gzip.compress(json.dumps(values).encode(), compresslevel=6, mtime=0)

    @classmethod
    def decode(cls, data: bytes) -> ShardRecord:
        """Decode a record.

        Raises:
            ValueError: the record contradicts its shard.
        """
        values: dict[str, Any] = json.loads(gzip.decompress(data))
        shard = Shard.model_validate(values["shard"])
        samples = [
            FileResult(File(**file), int(number), str(stored), bool(reencoded), tuple(map(int, row)))
            for file, number, stored, reencoded, row in values["samples"]
        ]
        samples[-1] = replace(samples[-1], completed_shard=shard)
        if shard.samples != len(samples):
            raise ValueError("the record's number of samples differs from the shard's")
        return cls(values["split"], shard, samples, [File(**file) for file in values["bad"]])


class UnfinishedPreparation:
    """The records of all preparations of the same content with the same settings.

    Args:
        store: store of the data.
        destination: folder of the data.
        fingerprint: fingerprint of the source.
        config: the ``data`` section of the configuration.
        base: folder of the earlier data that the preparation builds on.
    """

    def __init__(
        self, store: ObjectStore, destination: str, fingerprint: str, config: DataConfig, base: str | None
    ) -> None:
        key = json.dumps([_VERSION, fingerprint, config.identity_values(), base], sort_keys=True)
        self._store = store
        self._uri = join_uri(destination, UNFINISHED, hashlib.sha256(key.encode()).hexdigest()[:16])
        self._folder = self._uri.removeprefix(destination.rstrip("/")).strip("/")

    def save(self, record: ShardRecord) -> str:
        """Store a record, after its shard; return its name below the destination."""
        name = f"{record.split}-{record.samples[0].number:09d}.json.gz"
        self._store.put_bytes(join_uri(self._uri, name), record.encode())
        return f"{self._folder}/{name}"

    def read(self, first_numbers: Mapping[str, int], existing: Mapping[str, int]) -> dict[str, FileResult]:
        """Return the recorded results of files, by name.

        Args:
            first_numbers: number of the first image of each split that is not reused from earlier data.
            existing: sizes of the objects below the destination, by name.
        """
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="records") as pool:
            records = list(pool.map(self._read, [stat.uri for stat in self._store.list(self._uri)]))
        known: dict[str, FileResult] = {}
        next_number = dict(first_numbers)
        for record in sorted(filter(None, records), key=lambda r: (r.split, r.samples[0].number)):
            known |= {file.name: FileResult(file) for file in record.bad}
            # If a record is missing, the samples after it would be stored under other numbers.
            is_next = record.samples[0].number == next_number.get(record.split, 0)
            if is_next and existing.get(record.shard.name) == record.shard.bytes:
                known |= {result.file.name: result for result in record.samples}
                next_number[record.split] = record.samples[-1].number + 1
        return known

    def _read(self, uri: str) -> ShardRecord | None:
        data = self._store.get_bytes(uri)
        try:
            return ShardRecord.decode(data)
        except _DAMAGE:
            return None


def count_shards(results: Iterable[FileResult]) -> int:
    """Return the number of shards that the files complete."""
    return sum(result.completed_shard is not None for result in results)
