"""The listing: one line per file of a source with its status, stored beside the shards to detect changes later."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO, Literal

from esvit_core.data.ingest.archives import FileReadError, Source
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.file_kinds import is_ignored, is_sidecar
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.prefetch import prefetch, reading_threads
from esvit_core.data.ingest.sources import open_source, source_fingerprint
from esvit_core.storage import ObjectStore

LISTING = "images.jsonl.gz"
# If the dates of nearly all files differ, the source is a copy; reading this many of them is enough to make sure.
_COPY_SAMPLE, _COPY_SHARE = 1000, 0.9
_UNKNOWN = (("width", 0), ("height", 0))
FileStatus = Literal["train", "val", "test", "bad", "unreadable", "skipped", "ignored", "duplicate"]


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source and its status in the prepared data.

    Attributes:
        name: path below the source.
        size: in bytes.
        stamp: changes with the content, as far as a listing can show.
        status: the split in which the image is stored; ``bad``: not an image; ``unreadable``: could not be read;
            ``skipped``: not chosen, or outside the folders that are used; ``ignored``: by its content another kind of
            file; ``duplicate``: left out because of another image; None: not decided yet.
        digest: of the content, 32 hexadecimal digits; empty if the file was not read.
        stored: digest of the image as it is stored; empty: its content is that of the file.
        reason: why it was not stored.
        odd: what a user should know about the image, see :class:`~esvit_core.data.ingest.decode.StoredImage`, in words.
        width, height, mode, color, look: of a stored image, see :class:`~esvit_core.data.ingest.image_facts.ImageFacts`.
    """

    name: str
    size: int
    stamp: str
    status: FileStatus | None = None
    digest: str = ""
    stored: str = ""
    reason: str = ""
    odd: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    color: str = ""
    look: str = ""

    @property
    def split(self) -> SplitName | None:
        """The split in which the image is stored; None if it is not stored."""
        return self.status if self.status in ("train", "val", "test") else None

    def is_same(self, entry: Entry | File) -> bool:
        """Return whether the content is unchanged, by size and stamp, or by digest where the stamp differs.

        A file that was skipped was skipped because of its name, so its stamp is irrelevant.
        """
        if self.size != entry.size:
            return False
        if self.stamp == entry.stamp or self.status == "skipped":
            return True
        return isinstance(entry, File) and bool(self.digest) and self.digest == entry.digest


@dataclass(frozen=True)
class Difference:
    """Changes of a source since an earlier listing; names of files.

    Attributes:
        new: not in the earlier listing.
        changed: different size or stamp; they count as new.
        removed: stored earlier, no longer in the source.
    """

    new: list[str]
    changed: list[str]
    removed: list[str]

    @property
    def to_read(self) -> int:
        """Number of files that have to be read."""
        return len(self.new) + len(self.changed)


@dataclass(frozen=True)
class Scan:
    """The files of a source at the time it was scanned.

    Attributes:
        files: in the order of their names, without ignored ones and files that lie beside images.
        fingerprint: see :func:`esvit_core.data.ingest.sources.source_fingerprint`.
    """

    files: list[File]
    fingerprint: str


def scan_source(source: str, store: ObjectStore) -> Scan:
    """List the files of a source.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    with open_source(source, store) as opened:
        entries = (e for e in opened.entries.by_name() if not (is_ignored(e.name) or is_sidecar(e.name)))
        files = [File(entry.name, entry.size, entry.stamp) for entry in entries]
        return Scan(files, source_fingerprint(source, store, opened))


def hash_touched_files(before: Iterable[File], now: list[File], read: Callable[[File], bytes]) -> list[File]:
    """Return ``now`` with digests added to the files that differ from ``before`` only in their stamp.

    These files are read, because a copied file has a different date and an edited file may have the same size. If nearly
    all dates differ, the source is probably a copy: a sample is read, and if it is unchanged the other files are taken as
    unchanged.

    Args:
        before: files of the earlier listing, with digests.
        now: files as listed now.
        read: returns a file's content; raises FileReadError.
    """
    known = {file.name: file for file in before if file.digest}
    redated = [f for f in now if not f.digest and (b := known.get(f.name)) and b.size == f.size and b.stamp != f.stamp]
    if not redated:
        return now
    redated.sort(key=lambda file: (zlib.crc32(file.name.encode("utf-8", "surrogatepass")), file.name))
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="hash") as pool:

        def read_all(files: list[File]) -> None:
            for file, result in prefetch(pool, lambda file: _digest(file, read), files, 4 * reading_threads()):
                digests[file.name] = result.result()

        read_all(redated[:_COPY_SAMPLE])
        is_copy = len(redated) > _COPY_SHARE * len(known) and all(known[n].digest == d for n, d in digests.items())
        if is_copy:
            digests |= {file.name: known[file.name].digest for file in redated[_COPY_SAMPLE:]}
        else:
            read_all(redated[_COPY_SAMPLE:])
    return [replace(file, digest=digests[file.name]) if file.name in digests else file for file in now]


def hash_touched_files_in(source: str, store: ObjectStore, before: Iterable[File], now: list[File]) -> list[File]:
    """Like :func:`hash_touched_files`, for a source that is not open."""
    known = {file.name: (file.size, file.stamp) for file in before}
    if all(known.get(file.name, (-1, ""))[0] != file.size or known[file.name][1] == file.stamp for file in now):
        return now
    with open_source(source, store) as opened:
        return hash_touched_files(before, now, content_reader(opened))


def content_reader(opened: Source) -> Callable[[File], bytes]:
    """Return a function that returns the content of a file of an open source."""
    entries = {entry.name: entry for entry in opened.entries}

    def read(file: File) -> bytes:
        if file.name not in entries:
            raise FileReadError("no longer exists")
        return opened.read(entries[file.name])

    return read


def content_digest(data: bytes) -> str:
    """Return the digest of a file's content, 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def _digest(file: File, read: Callable[[File], bytes]) -> str:
    try:
        return content_digest(read(file))
    except FileReadError:
        return ""


def compare(before: Iterable[File], now: Iterable[File]) -> Difference:
    """Compare two listings of a source."""
    known = {file.name: file for file in before}
    there = {file.name: file for file in now}
    return Difference(
        new=[name for name in there if name not in known],
        changed=[name for name, file in there.items() if name in known and not known[name].is_same(file)],
        removed=[name for name, file in known.items() if file.split and name not in there],
    )


def encode_listing(files: Iterable[File]) -> bytes:
    """Encode a listing as an object's content; the same files give the same bytes."""
    content = io.BytesIO()
    write_listing(files, content)
    return content.getvalue()


def write_listing(files: Iterable[File], output: BinaryIO) -> None:
    """Write what :func:`encode_listing` returns, without holding it in memory."""
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=output, mtime=0) as compressed:
        for file in files:
            values = {k: v for k, v in asdict(file).items() if v not in (None, "") and (k, v) not in _UNKNOWN}
            compressed.write(json.dumps(values).encode() + b"\n")


def decode_listing(data: bytes) -> Iterator[File]:
    """Decode the files of a listing."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as lines:
        for line in lines:
            yield File(**{"stamp": "", **json.loads(line)})
