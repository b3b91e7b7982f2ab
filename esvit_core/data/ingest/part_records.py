"""Records of an unfinished preparation, from which the next one resumes.

There is a record of each finished part, and beside each stored shard of an unfinished part a record of its samples and of
the files that were found bad before it. A preparation of the same content with the same settings does not read those files
again. Objects are named by their content, so any number of preparations may write below one folder concurrently without
overwriting each other's objects.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from esvit_core.config import DataConfig
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.ingest_plan import Candidate
from esvit_core.data.ingest.listing import File
from esvit_core.data.ingest.parts import PART_FILES, PlannedPart
from esvit_core.data.shards.manifest import Part, Shard
from esvit_core.storage import ObjectStore, StoreError, join_uri
from esvit_core.storage.parallel_transfer import PARALLEL
from esvit_core.storage.store_errors import NotFound

UNFINISHED = "unfinished"
_VERSION = 4
_DAMAGE = (ValueError, TypeError, LookupError, EOFError, OSError, StopIteration, zlib.error)


class StaleProgressError(Exception):
    """The records of an unfinished preparation do not match this one, which has to start over."""


@dataclass(frozen=True)
class FileResult:
    """The result of preparing a file.

    Attributes:
        file: the file with its status.
        number: number of the image in its part; -1 if it was not stored.
        row: row of the index, without the number of the shard.
        completed_shard: the shard, if this file is its last one.
    """

    file: File
    number: int = -1
    row: tuple[int, ...] = ()
    completed_shard: Shard | None = None

    def with_stamp_of(self, entry: Entry) -> File:
        """Return the file with its current stamp."""
        return replace(self.file, stamp=entry.stamp)


@dataclass(frozen=True)
class ShardRecord:
    """Record of a stored shard.

    Attributes:
        part: name of its part.
        shard: name, size and digest.
        samples: results of its files, in order.
        others: files that were left out since the previous record.
    """

    part: str
    shard: Shard
    samples: list[FileResult]
    others: list[File]

    @property
    def name(self) -> str:
        """Name of the record's object."""
        return f"{self.part}-{self.samples[0].number:04d}.json.gz"

    def encode(self) -> bytes:
        """Encode the record as an object's content: a line for the shard, and one for each file."""
        content = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=content, mtime=0) as compressed:
            compressed.write(self.shard.model_dump_json().encode() + b"\n")
            for result in (*self.samples, *map(FileResult, self.others)):
                line = json.dumps([asdict(result.file), result.number, result.row])
                compressed.write(line.encode() + b"\n")
        return content.getvalue()

    @classmethod
    def decode(cls, part: str, data: bytes) -> ShardRecord:
        """Decode a record.

        Raises:
            ValueError: the record contradicts its shard.
        """
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as lines:
            shard = Shard.model_validate_json(next(lines))
            rows: Iterator[Any] = map(json.loads, lines)
            results = [FileResult(File(**file), int(number), tuple(map(int, row))) for file, number, row in rows]
        samples = [result for result in results if result.number >= 0]
        samples[-1] = replace(samples[-1], completed_shard=shard)
        if shard.samples != len(samples):
            raise ValueError("the record's number of samples differs from the shard's")
        return cls(part, shard, samples, [result.file for result in results if result.number < 0])


class PartRecords:
    """The records of all preparations of the same content with the same settings.

    Args:
        store: store of the data.
        destination: folder of the data.
        fingerprint: fingerprint of the source.
        config: the ``data`` section of the configuration.
        base: folder of the earlier data that the preparation builds on.
        existing: sizes of the objects below the destination, by name.
    """

    def __init__(
        self,
        store: ObjectStore,
        destination: str,
        fingerprint: str,
        config: DataConfig,
        base: str | None,
        existing: Mapping[str, int],
    ) -> None:
        key = json.dumps([_VERSION, PART_FILES, fingerprint, config.identity_values(), base], sort_keys=True)
        self._store, self._destination = store, destination
        self._folder = f"{UNFINISHED}/{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._existing = existing
        self._names: dict[str, list[str]] = defaultdict(list)  # of the records, by part
        for name in existing:
            if name.startswith(f"{self._folder}/"):
                self._names["-".join(name.rpartition("/")[2].partition(".")[0].split("-")[:2])].append(name)

    def count_shards(self) -> int:
        """Return the number of stored shards that the records are of."""
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="records") as pool:
            finished = pool.map(lambda part: len(found.shards) if (found := self._read_part(part)) else 0, self._names)
            unfinished = sum(name.endswith(".gz") for names in self._names.values() for name in names)
            return sum(finished) + unfinished

    def save_shard(self, record: ShardRecord) -> str:
        """Store the record of a shard, after the shard; return its name below the destination."""
        return self._put(record.name, record.encode(), record.part)

    def save_part(self, part: PlannedPart, candidates: Sequence[Candidate], finished: Part) -> str:
        """Store the record of a part, after its objects; return its name. It replaces the records of its shards."""
        values = {"candidates": _digest(candidates), "part": finished.model_dump(mode="json")}
        before = [name for name in self._names[part.name] if name.endswith(".gz")]
        name = self._put(f"{part.name}.json", json.dumps(values).encode(), part.name)
        with contextlib.suppress(StoreError):  # whoever publishes the manifest removes them, too
            self._store.remove_all([join_uri(self._destination, each) for each in before])
        self._names[part.name] = [name]
        return name

    def read_part(self, part: PlannedPart, candidates: Sequence[Candidate]) -> Part | None:
        """Return a finished part; None: it is not finished, or not with these candidates."""
        return self._read_part(part.name, _digest(candidates)) if part.name in self._names else None

    def read_shards(self, part: PlannedPart) -> dict[str, FileResult]:
        """Return the recorded results of the files of an unfinished part, by name."""
        names = [name for name in self._names[part.name] if name.endswith(".gz")]
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="records") as pool:
            records = list(pool.map(lambda name: self._read_shard(part.name, name), names))
        known: dict[str, FileResult] = {}
        next_number = 0
        for record in sorted(filter(None, records), key=lambda record: record.samples[0].number):
            known |= {file.name: FileResult(file) for file in record.others}
            # If a record is missing, the samples after it would be stored under other numbers.
            if record.samples[0].number == next_number and self._existing.get(record.shard.name) == record.shard.bytes:
                known |= {result.file.name: result for result in record.samples}
                next_number = record.samples[-1].number + 1
        return known

    def _put(self, name: str, data: bytes, part: str) -> str:
        name = f"{self._folder}/{name}"
        self._store.put_bytes(join_uri(self._destination, name), data)
        self._names[part].append(name)
        return name

    def _read_part(self, part: str, candidates: str | None = None) -> Part | None:
        name = f"{self._folder}/{part}.json"
        if name not in self._names[part]:
            return None
        try:
            values = json.loads(self._store.get_bytes(join_uri(self._destination, name)))
            found = Part.model_validate(values["part"])
            return found if candidates in (None, values["candidates"]) else None
        except (NotFound, *_DAMAGE):
            return None

    def _read_shard(self, part: str, name: str) -> ShardRecord | None:
        try:
            return ShardRecord.decode(part, self._store.get_bytes(join_uri(self._destination, name)))
        except (NotFound, *_DAMAGE):
            return None


def _digest(candidates: Sequence[Candidate]) -> str:
    """Return a digest of the names and classes of files."""
    digest = hashlib.sha256()
    for candidate in candidates:
        digest.update(f"{candidate.label}\0{candidate.entry.name}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
