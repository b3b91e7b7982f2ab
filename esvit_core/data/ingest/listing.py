"""What a source held and what became of it, a line a file, beside the shards: so that the next look sees what is new."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Literal

from esvit_core.data.ingest.archives import Entry, ReadProblem, Source
from esvit_core.data.ingest.layout import SplitName, is_ignored
from esvit_core.data.ingest.prefetch import ahead, reading_threads
from esvit_core.data.ingest.sources import open_source, source_fingerprint
from esvit_core.storage import ObjectStore

LISTING = "images.jsonl.gz"
# Where nearly all files have other dates the source is a copy: then so many of them are read to make sure.
_COPY_SAMPLE, _COPY_SHARE = 1000, 0.9
Fate = Literal["train", "val", "test", "bad", "unread", "passed over"]


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source.

    Attributes:
        name: path below the source.
        size: bytes.
        stamp: changes when the content does, as far as a listing tells.
        fate: the split it was stored in; ``bad``: no image; ``unread``: it could not be read; ``passed over``: not
            chosen, or outside the folders that are used; None: not yet decided.
        digest: of its content, 32 hexadecimal digits; empty where it was not read.
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
        """Whether its content is still what it was: by its size and stamp, or by its digest where the stamp differs.

        A file that was passed over was so for its name: its dates say nothing.
        """
        if self.size != entry.size:
            return False
        if self.stamp == entry.stamp or self.fate == "passed over":
            return True
        return isinstance(entry, File) and bool(self.digest) and self.digest == entry.digest


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


@dataclass(frozen=True)
class Look:
    """A source as it was looked at.

    Attributes:
        files: in the order of their names, without those that no one means as images.
        fingerprint: see :func:`esvit_core.data.ingest.sources.source_fingerprint`.
    """

    files: list[File]
    fingerprint: str


def look(source: str, store: ObjectStore) -> Look:
    """List a source.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    with open_source(source, store) as opened:
        entries = sorted(opened.entries, key=lambda entry: entry.name)
        files = [File(e.name, e.size, e.stamp) for e in entries if not is_ignored(e.name)]
        return Look(files, source_fingerprint(source, store, opened))


def recognise(before: Iterable[File], now: list[File], read: Callable[[File], bytes]) -> list[File]:
    """``now`` with the digests of those files that differ from before in nothing but their stamp.

    They are read, for a copied file has another date and an edited one may have the same size. Of a source that was
    copied as a whole, so that nearly all dates differ, a sample is read; if that is unchanged, so are the others.

    Args:
        before: the files as they were, with their digests.
        now: the files as they are listed.
        read: gives a file's content; raises ReadProblem.
    """
    known = {file.name: file for file in before if file.digest}
    redated = [f for f in now if not f.digest and (b := known.get(f.name)) and b.size == f.size and b.stamp != f.stamp]
    if not redated:
        return now
    redated.sort(key=lambda file: (zlib.crc32(file.name.encode("utf-8", "surrogatepass")), file.name))
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="recognise") as pool:

        def read_all(files: list[File]) -> None:
            for file, result in ahead(pool, lambda file: _digest(file, read), files, 4 * reading_threads()):
                digests[file.name] = result.result()

        read_all(redated[:_COPY_SAMPLE])
        is_copy = len(redated) > _COPY_SHARE * len(known) and all(known[n].digest == d for n, d in digests.items())
        if is_copy:
            digests |= {file.name: known[file.name].digest for file in redated[_COPY_SAMPLE:]}
        else:
            read_all(redated[_COPY_SAMPLE:])
    return [replace(file, digest=digests[file.name]) if file.name in digests else file for file in now]


def recognise_in(source: str, store: ObjectStore, before: Iterable[File], now: list[File]) -> list[File]:
    """:func:`recognise` for a source that is not open."""
    known = {file.name: (file.size, file.stamp) for file in before}
    if all(known.get(file.name, (-1, ""))[0] != file.size or known[file.name][1] == file.stamp for file in now):
        return now
    with open_source(source, store) as opened:
        return recognise(before, now, reader(opened))


def reader(opened: Source) -> Callable[[File], bytes]:
    """A function that gives the content of the files of an open source."""
    entries = {entry.name: entry for entry in opened.entries}

    def read(file: File) -> bytes:
        if file.name not in entries:
            raise ReadProblem("vanished")
        return opened.read(entries[file.name])

    return read


def digest_of(data: bytes) -> str:
    """The digest of a file's content, 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def _digest(file: File, read: Callable[[File], bytes]) -> str:
    try:
        return digest_of(read(file))
    except ReadProblem:
        return ""


def compare(before: Iterable[File], now: Iterable[File]) -> Difference:
    """What is new, changed, and gone."""
    known = {file.name: file for file in before}
    there = {file.name: file for file in now}
    return Difference(
        new=[name for name in there if name not in known],
        changed=[name for name, file in there.items() if name in known and not known[name].is_same(file)],
        gone=[name for name, file in known.items() if file.split and name not in there],
    )


def encode(files: Iterable[File]) -> bytes:
    """The listing as an object's content; the same files give the same bytes."""
    lines = ("".join((json.dumps({k: v for k, v in asdict(f).items() if v not in (None, "")}), "\n")) for f in files)
    return gzip.compress("".join(lines).encode(), compresslevel=6, mtime=0)


def decode(data: bytes) -> Iterator[File]:
    """The files of an encoded listing."""
    for line in gzip.decompress(data).decode().splitlines():
        yield File(**{"stamp": "", **json.loads(line)})
