"""Sources whose files are listed one by one: the files of a folder, and the objects below a prefix."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from esvit_core.data.ingest import fingerprint as fingerprints
from esvit_core.data.ingest.archives import FileReadError, Source
from esvit_core.data.ingest.disk_rows import DiskRows, sort_rows
from esvit_core.data.ingest.entries import Entries, Entry, as_entries
from esvit_core.data.ingest.entry_names import name_of_text
from esvit_core.errors import UserError
from esvit_core.storage import InvalidAddress, NotFound, ObjectStore, StoreRefused, join_uri
from esvit_core.storage.disk import read_at
from esvit_core.storage.marker import is_marked

EXPECTED = "expected a folder, a tar (.gz, .bz2, .xz), a zip, a table (.csv), or s3://bucket/prefix"


@runtime_checkable
class ListedSource(Source, Protocol):
    """A source whose listing is cheap, so that its fingerprint is taken from the open source."""

    def fingerprint(self) -> str:
        """Return the fingerprint of its content."""
        ...


class FolderSource:
    """The files below a folder; links are followed.

    Args:
        path: the folder.
        entries: files that are listed already; None: all files below ``path``.
    """

    def __init__(self, path: Path, entries: Iterable[Entry] | None = None) -> None:
        self.duplicates = 0
        self.notes: list[str] = []
        self.entries = as_entries(walk(path) if entries is None else entries)

    def read(self, entry: Entry) -> bytes:
        try:
            return Path(str(entry.handle)).read_bytes()
        except OSError as error:
            raise FileReadError(f"cannot be read ({error.strerror})") from None

    def peek(self, entry: Entry, length: int) -> bytes:
        return self.read_piece(entry, 0, length)

    def fingerprint(self) -> str:
        return fingerprints.listing_fingerprint(self.entries, self.read_piece)

    @staticmethod
    def read_piece(entry: Entry, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a file from ``offset``; raises FileReadError."""
        try:
            with Path(str(entry.handle)).open("rb") as file:
                return read_at(file.fileno(), length, offset)
        except OSError as error:
            raise FileReadError(f"cannot be read ({error.strerror})") from None


class PrefixSource:
    """The objects below a prefix.

    Args:
        store: their store.
        uri: the prefix, ``s3://bucket/prefix``.
        wanted: says by its address whether an object is part of the source; None: all are.
        entries: objects that are listed already, with their addresses as handles; None: all below the prefix.
    """

    def __init__(
        self,
        store: ObjectStore,
        uri: str,
        wanted: Callable[[str], bool] | None = None,
        entries: Iterable[Entry] | None = None,
    ) -> None:
        self.duplicates = 0
        self.notes: list[str] = []
        self._store = store
        self.entries = _objects(store, uri, wanted) if entries is None else as_entries(entries)

    def read(self, entry: Entry) -> bytes:
        try:
            return self._store.get_bytes(str(entry.handle))
        except (NotFound, StoreRefused) as error:
            raise FileReadError("no longer exists" if isinstance(error, NotFound) else "access denied") from None
        except InvalidAddress:
            raise FileReadError("its key is not valid") from None

    def peek(self, entry: Entry, length: int) -> bytes:
        return self.read_piece(entry, 0, min(length, entry.size))

    def fingerprint(self) -> str:
        return fingerprints.listing_fingerprint(self.entries, self.read_piece)

    def download(self, entry: Entry, path: Path) -> None:
        """Copy an object to a local file."""
        self._store.get_file(str(entry.handle), path)

    def read_piece(self, entry: Entry, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of an object from ``offset``; raises FileReadError."""
        try:
            return self._store.read_range(str(entry.handle), offset, length)
        except (NotFound, StoreRefused):
            raise FileReadError("cannot be read") from None


def _objects(store: ObjectStore, uri: str, wanted: Callable[[str], bool] | None) -> Entries:
    start = len(join_uri(uri)) + 1

    found = Entries(
        Entry(each.uri[start:], each.size, each.etag, handle=each.uri)
        for each in store.list_unordered(uri)
        # Some tools create markers of folders.
        if not each.uri.endswith("/") and (wanted is None or wanted(each.uri))
    )
    return found.by_name()


def walk(root: Path) -> Iterator[Entry]:
    """Yield all files below ``root`` in the order of their names; an unreadable folder is yielded with a problem.

    Folders that this program created are left out.
    """
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror}); {EXPECTED} that is readable") from None
    problems: list[OSError] = []
    visited: set[tuple[int, int]] = set()  # a link to a parent folder would loop forever
    waiting = [(str(root), "")]
    while waiting:
        folder, name = waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116
            children = DiskRows(_children(folder))
        except OSError as error:
            problems.append(error)
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        folders = sorted(child for child, is_folder in children if is_folder)
        files = (child for child, is_folder in children if not is_folder)
        if is_marked(Path(folder), files):  # a store or run folder of this program
            continue
        for (file,) in sort_rows((child,) for child, is_folder in children if not is_folder):
            yield file_entry(os.path.join(folder, file), name + file)  # noqa: PTH118 (Path objects are slow)
        waiting += ((os.path.join(folder, child), f"{name}{child}/") for child in reversed(folders))  # noqa: PTH118
    for problem in problems:
        path = str(problem.filename)
        name = name_of_text(os.path.relpath(path, root))
        yield Entry(name, 0, "", path, f"unreadable folder ({problem.strerror})")


def _children(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the names in a folder, and whether each is a folder."""
    with os.scandir(folder) as children:
        for child in children:
            try:
                yield child.name, child.is_dir()
            except OSError:  # such as a circular link
                yield child.name, False


def file_entry(path: str, name: str) -> Entry:
    name = name_of_text(name)
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as error:
        reason = "broken link" if os.path.islink(path) else f"cannot be read ({error.strerror})"  # noqa: PTH114
        return Entry(name, 0, "", path, reason)
    if not stat.S_ISREG(found.st_mode):
        return Entry(name, 0, "", path, "not a regular file")
    return Entry(name, found.st_size, str(found.st_mtime_ns), path)
