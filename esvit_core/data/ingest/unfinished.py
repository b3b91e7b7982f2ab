"""What an unfinished preparation has left in the store, and how the next one goes on with it.

Beside each shard that has arrived lies a record of what is in it and of the files that were found bad before it. A
preparation of the same content with the same settings does not read those files again. Objects are named by their
content, so that any number of preparations may write below one folder at once: none replaces what another has stored.
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
from esvit_core.data.ingest.archives import Entry
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import File
from esvit_core.data.shards.manifest import Shard
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.parallel_transfer import PARALLEL

UNFINISHED = "unfinished"
_VERSION = 1
_DAMAGE = (ValueError, TypeError, LookupError, EOFError, OSError, zlib.error)


class StaleProgressError(Exception):
    """What an unfinished preparation has left is not what this one would make: it has to begin anew."""


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        file: with its fate.
        number: its place in its split; -1 where it was not stored.
        stored: SHA-256 of the stored bytes.
        reencoded: whether these are other bytes than the file's.
        row: of the index, without the number of the shard.
        ends: the shard, where the file is its last one.
    """

    file: File
    number: int = -1
    stored: str = ""
    reencoded: bool = False
    row: tuple[int, ...] = ()
    ends: Shard | None = None

    def at(self, entry: Entry) -> File:
        """The file with the date that it has now."""
        return replace(self.file, stamp=entry.stamp)


@dataclass(frozen=True)
class Record:
    """A shard that has arrived.

    Attributes:
        split: that it belongs to.
        shard: name, size and digest.
        samples: in their order.
        bad: files that were left out since the record before.
    """

    split: SplitName
    shard: Shard
    samples: list[Outcome]
    bad: list[File]

    def encode(self) -> bytes:
        """The record as an object's content."""
        samples = [[asdict(o.file), o.number, o.stored, o.reencoded, o.row] for o in self.samples]
        values = {
            "split": self.split,
            "shard": self.shard.model_dump(mode="json"),
            "samples": samples,
            "bad": [asdict(file) for file in self.bad],
        }
        return gzip.compress(json.dumps(values).encode(), compresslevel=6, mtime=0)

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """The record of an object's content."""
        values: dict[str, Any] = json.loads(gzip.decompress(data))
        shard = Shard.model_validate(values["shard"])
        samples = [
            Outcome(File(**file), int(number), str(stored), bool(reencoded), tuple(map(int, row)))
            for file, number, stored, reencoded, row in values["samples"]
        ]
        samples[-1] = replace(samples[-1], ends=shard)
        if shard.samples != len(samples):
            raise ValueError("the samples of a record are not its shard's")
        return cls(values["split"], shard, samples, [File(**file) for file in values["bad"]])


class Unfinished:
    """The records of preparations of one content with one choice of settings.

    Args:
        store: where they are.
        destination: folder of the data.
        fingerprint: of the source.
        config: the data section of the configuration.
        base: folder of the earlier data that are built on.
    """

    def __init__(
        self, store: ObjectStore, destination: str, fingerprint: str, config: DataConfig, base: str | None
    ) -> None:
        made_of = json.dumps([_VERSION, fingerprint, config.identity_values(), base], sort_keys=True)
        self._store = store
        self._place = join_uri(destination, UNFINISHED, hashlib.sha256(made_of.encode()).hexdigest()[:16])
        self._folder = self._place.removeprefix(destination.rstrip("/")).strip("/")

    def keep(self, record: Record) -> str:
        """Store a record, after its shard; its name below the destination."""
        name = f"{record.split}-{record.samples[0].number:09d}.json.gz"
        self._store.put_bytes(join_uri(self._place, name), record.encode())
        return f"{self._folder}/{name}"

    def read(self, begins: Mapping[str, int], there: Mapping[str, int]) -> dict[str, Outcome]:
        """What is known of the files of the source, by name.

        Args:
            begins: the first number of each split that is not taken over from earlier data.
            there: sizes of the objects below the destination, by name.
        """
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="records") as pool:
            records = list(pool.map(self._read, [stat.uri for stat in self._store.list(self._place)]))
        known: dict[str, Outcome] = {}
        following = dict(begins)
        for record in sorted(filter(None, records), key=lambda r: (r.split, r.samples[0].number)):
            known |= {file.name: Outcome(file) for file in record.bad}
            # Where one is missing the samples after it would be stored under other numbers.
            is_next = record.samples[0].number == following.get(record.split, 0)
            if is_next and there.get(record.shard.name) == record.shard.bytes:
                known |= {outcome.file.name: outcome for outcome in record.samples}
                following[record.split] = record.samples[-1].number + 1
        return known

    def _read(self, uri: str) -> Record | None:
        data = self._store.get_bytes(uri)
        try:
            return Record.decode(data)
        except _DAMAGE:
            return None


def shards_in(outcomes: Iterable[Outcome]) -> int:
    """How many shards they fill."""
    return sum(outcome.ends is not None for outcome in outcomes)
