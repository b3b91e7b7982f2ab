"""The listing: one line per file of a source with its status, stored beside the shards to detect changes later."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import heapq
import io
import itertools
import json
import operator
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO, Literal

from esvit_core.data.ingest.archives import FileReadError, Source
from esvit_core.data.ingest.disk_rows import DiskRows, Row, sort_rows
from esvit_core.data.ingest.disk_table import DiskTable
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.file_kinds import is_ignored, is_sidecar
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.prefetch import prefetch, reading_threads
from esvit_core.data.ingest.sources import open_source, source_fingerprint
from esvit_core.storage import ObjectStore
from esvit_core.storage.disk import explain_full_temporary_disk

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


values_of = operator.attrgetter(*(each.name for each in fields(File)))  # of a file, as a tuple


class FileTable:
    """Files by name, on disk.

    Args:
        files: of two with the same name the last one stays.
    """

    def __init__(self, files: Iterable[File] = ()) -> None:
        self._table = DiskTable()
        self.update(files)

    def update(self, files: Iterable[File]) -> None:
        """Add files; one with a name that is there replaces it."""
        self._table.update((file.name, values_of(file)) for file in files)

    def get(self, name: str) -> File | None:
        """Return the file with this name; None if there is none."""
        row = self._table.get(name)
        return None if row is None else File(*row)

    def __getitem__(self, name: str) -> File:
        return File(*self._table[name])

    def __iter__(self) -> Iterator[File]:
        """Yield the files in the order of their names."""
        return (File(*row) for _, row in self._table.items())

    def __len__(self) -> int:
        return len(self._table)


Change = Literal["new", "changed", "removed"]


@dataclass(frozen=True)
class Difference:
    """Changes of a source since an earlier listing; numbers of files.

    Attributes:
        new: not in the earlier listing.
        changed: different size or stamp; they count as new.
        removed: stored earlier, no longer in the source.
    """

    new: int
    changed: int
    removed: int

    @property
    def to_read(self) -> int:
        """Number of files that have to be read."""
        return self.new + self.changed


@dataclass(frozen=True)
class Scan:
    """The files of a source at the time it was scanned.

    Attributes:
        files: without ignored ones and files that lie beside images.
        fingerprint: see :func:`esvit_core.data.ingest.sources.source_fingerprint`.
    """

    files: FileTable
    fingerprint: str


def scan_source(source: str, store: ObjectStore) -> Scan:
    """List the files of a source.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    with open_source(source, store) as opened:
        entries = (e for e in opened.entries.by_name() if not (is_ignored(e.name) or is_sidecar(e.name)))
        files = FileTable(File(entry.name, entry.size, entry.stamp) for entry in entries)
        return Scan(files, source_fingerprint(source, store, opened))


def hash_touched_files(before: FileTable, now: Iterable[File], read: Callable[[File], bytes]) -> FileTable:
    """Return the files of ``now`` that differ from ``before`` only in their stamp, with digests.

    These files are read, because a copied file has a different date and an edited file may have the same size. If nearly
    all dates differ, the source is probably a copy: a sample is read, and if it is unchanged the other files are taken as
    unchanged. A file that cannot be read has no digest.

    Args:
        before: files of the earlier listing, with digests.
        now: files as listed now.
        read: returns a file's content; raises FileReadError.
    """
    redated = DiskRows(
        sort_rows(
            (zlib.crc32(f.name.encode("utf-8", "surrogatepass")), values_of(f)) for f in now if _is_redated(f, before)
        )
    )
    if not len(redated):
        return FileTable()
    hashed = FileTable()
    waiting = (File(*row) for _, row in redated)
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="hash") as pool:

        def read_all(files: Iterable[File]) -> None:
            found = prefetch(pool, lambda file: _digest(file, read), files, 4 * reading_threads())
            hashed.update(replace(file, digest=result.result()) for file, result in found)

        read_all(itertools.islice(waiting, _COPY_SAMPLE))
        is_copy = len(redated) > _COPY_SHARE * sum(bool(file.digest) for file in before)
        if is_copy and all(before[file.name].digest == file.digest for file in hashed):
            hashed.update(replace(file, digest=before[file.name].digest) for file in waiting)
        else:
            read_all(waiting)
    return hashed


def _is_redated(file: File, before: FileTable) -> bool:
    earlier = None if file.digest else before.get(file.name)
    if earlier is None or not earlier.digest:
        return False
    return earlier.size == file.size and earlier.stamp != file.stamp


def hash_touched_files_in(source: str, store: ObjectStore, before: FileTable, now: FileTable) -> FileTable:
    """Like :func:`hash_touched_files`, for a source that is not open."""
    if not any(_is_redated(file, before) for file in now):
        return FileTable()
    with open_source(source, store) as opened:
        return hash_touched_files(before, now, content_reader(opened))


def content_reader(opened: Source) -> Callable[[File], bytes]:
    """Return a function that returns the content of a file of an open source."""
    lock, made = threading.Lock(), list[DiskTable]()

    def number_of(name: str) -> Row | None:
        with lock:  # the first of several threads makes the table
            if not made:
                made.append(DiskTable((name, (number,)) for number, name in enumerate(opened.entries.names())))
        return made[0].get(name)

    def read(file: File) -> bytes:
        if (found := number_of(file.name)) is None:
            raise FileReadError("no longer exists")
        return opened.read(opened.entries[found[0]])

    return read


def content_digest(data: bytes) -> str:
    """Return the digest of a file's content, 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def _digest(file: File, read: Callable[[File], bytes]) -> str:
    try:
        return content_digest(read(file))
    except FileReadError:
        return ""


def compare(before: FileTable, now: FileTable) -> Difference:
    """Compare two listings of a source."""
    counts = Counter(change for change, _ in changes(before, now))
    return Difference(counts["new"], counts["changed"], counts["removed"])


def changes(before: FileTable, now: FileTable) -> Iterator[tuple[Change, str]]:
    """Yield what changed between two listings of a source, in the order of the names."""
    both = heapq.merge(((f.name, 0, f) for f in before), ((f.name, 1, f) for f in now), key=lambda each: each[:2])
    for name, group in itertools.groupby(both, key=lambda each: each[0]):
        files = {number: file for _, number, file in group}
        if 0 not in files:
            yield "new", name
        elif 1 in files and not files[0].is_same(files[1]):
            yield "changed", name
        elif 1 not in files and files[0].split:
            yield "removed", name


@contextlib.contextmanager
def listing_file(files: Iterable[File]) -> Iterator[Path]:
    """Write a listing to a temporary file, without holding it in memory."""
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = Path(folder) / LISTING
        with explain_full_temporary_disk("a list of files"), path.open("wb") as output:
            write_listing(files, output)
        yield path


def get_listing(store: ObjectStore, uri: str) -> FileTable:
    """Read a listing from the store without holding it in memory.

    Raises:
        NotFound: there is none.
    """
    with explain_full_temporary_disk("a list of files"), tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = Path(folder) / LISTING
        store.get_file(uri, path)
        with path.open("rb") as content:
            return FileTable(read_listing_file(content))


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
    return read_listing_file(io.BytesIO(data))


def read_listing_file(content: BinaryIO) -> Iterator[File]:
    """Yield the files of a listing from an open file."""
    with gzip.GzipFile(fileobj=content) as lines:
        for line in lines:
            yield File(**{"stamp": "", **json.loads(line)})
