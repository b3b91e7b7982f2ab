"""What a source held and what became of it, a line a file, beside the shards: so that the next look sees what is new."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from esvit_core.data.archives import Entry
from esvit_core.data.layout import SplitName, is_ignored
from esvit_core.data.sources import open_source
from esvit_core.storage import ObjectStore

LISTING = "pictures.jsonl.gz"
Fate = Literal["train", "val", "test", "bad", "unread", "passed over"]


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source.

    Attributes:
        name: path below the source.
        size: bytes.
        stamp: changes when the content does, as far as a listing tells.
        fate: the split it was stored in; ``bad``: no picture; ``unread``: it could not be read; ``passed over``: not
            chosen, or outside the folders that are used; None: not yet decided.
        digest: of its content, 32 hexadecimal digits; empty where it was not stored.
        reason: why it was not stored.
    """

    name: str
    size: int
    stamp: str
    fate: Fate | None = None
    digest: str = ""
    reason: str = ""

    @property
    def split(self) -> SplitName | None:
        """The split it was stored in; None where it was not."""
        return self.fate if self.fate in ("train", "val", "test") else None

    def is_same(self, entry: Entry | File) -> bool:
        """Whether a listing tells no difference."""
        return (self.size, self.stamp) == (entry.size, entry.stamp)


@dataclass(frozen=True)
class Difference:
    """What has happened to a source since it was looked at before; names.

    Attributes:
        new: were not there.
        changed: have another size or stamp; they count as new.
        gone: were stored, and are not there any more.
    """

    new: list[str]
    changed: list[str]
    gone: list[str]

    @property
    def to_read(self) -> int:
        """Files that have to be read."""
        return len(self.new) + len(self.changed)


def look(source: str, store: ObjectStore) -> list[File]:
    """The files of a source, in the order of their names, those left out that are no one's pictures.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    with open_source(source, store) as opened:
        entries = sorted(opened.entries, key=lambda entry: entry.name)
        return [File(e.name, e.size, e.stamp) for e in entries if not is_ignored(e.name)]


def compare(before: Iterable[File], now: Iterable[File]) -> Difference:
    """What is new, changed, and gone."""
    known = {file.name: file for file in before}
    there = {file.name: file for file in now}
    return Difference(
        new=[name for name in there if name not in known],
        changed=[name for name, file in there.items() if name in known and not known[name].is_same(file)],
        gone=[name for name, file in known.items() if file.split and name not in there],
    )


def fingerprint(files: Iterable[File]) -> str:
    """A digest of a listing: the same until something is added, removed or changed; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.stamp}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def encode(files: Iterable[File]) -> bytes:
    """The listing as an object's content; the same files give the same bytes."""
    lines = ("".join((json.dumps({k: v for k, v in asdict(f).items() if v not in (None, "")}), "\n")) for f in files)
    return gzip.compress("".join(lines).encode(), compresslevel=6, mtime=0)


def decode(data: bytes) -> Iterator[File]:
    """The files of an encoded listing."""
    for line in gzip.decompress(data).decode().splitlines():
        yield File(**{"stamp": "", **json.loads(line)})
