"""Sources of images: a folder, a tar, a zip, or a prefix in an object store.

The files are listed first, then read one at a time in any order. Archives are never unpacked to the paths they contain.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from esvit_core.data.ingest import archives
from esvit_core.data.ingest import fingerprint as fingerprints
from esvit_core.data.ingest.archives import Entry, FileReadError, Source, TarSource, ZipSource
from esvit_core.data.ingest.entry_names import name_of_text
from esvit_core.data.ingest.file_kinds import is_ignored, may_be_image
from esvit_core.errors import UserError
from esvit_core.storage import InvalidAddress, NotFound, ObjectStore, StoreRefused, join_uri, split_uri
from esvit_core.storage.disk import read_at
from esvit_core.storage.marker import is_marked

SCHEME = "s3://"
_EXPECTED = "expected a folder, a tar (.gz, .bz2, .xz), a zip, or s3://bucket/prefix"


class FolderSource:
    """The files below a folder; links are followed."""

    def __init__(self, path: Path) -> None:
        self.duplicates = 0
        self.notes: list[str] = []
        self.entries = list(_walk(path))

    def read(self, entry: Entry) -> bytes:
        try:
            return Path(str(entry.handle)).read_bytes()
        except OSError as error:
            raise FileReadError(f"cannot be read ({error.strerror})") from None

    def peek(self, entry: Entry, length: int) -> bytes:
        return self._read_piece(entry, 0, length)

    def fingerprint(self) -> str:
        return fingerprints.listing_fingerprint(self.entries, self._read_piece)

    @staticmethod
    def _read_piece(entry: Entry, offset: int, length: int) -> bytes:
        try:
            with Path(str(entry.handle)).open("rb") as file:
                return read_at(file.fileno(), length, offset)
        except OSError as error:
            raise FileReadError(f"cannot be read ({error.strerror})") from None


class PrefixSource:
    """The objects below a prefix."""

    def __init__(self, store: ObjectStore, uri: str) -> None:
        self.duplicates = 0
        self.notes: list[str] = []
        self._store = store
        start = len(join_uri(uri)) + 1
        self.entries = [
            Entry(found.uri[start:], found.size, found.etag, handle=found.uri)
            for found in store.list(uri)
            if not found.uri.endswith("/")  # folder markers that some tools create
        ]

    def read(self, entry: Entry) -> bytes:
        try:
            return self._store.get_bytes(str(entry.handle))
        except (NotFound, StoreRefused) as error:
            raise FileReadError("no longer exists" if isinstance(error, NotFound) else "access denied") from None
        except InvalidAddress:
            raise FileReadError("its key is not valid") from None

    def peek(self, entry: Entry, length: int) -> bytes:
        return self._read_piece(entry, 0, min(length, entry.size))

    def fingerprint(self) -> str:
        return fingerprints.listing_fingerprint(self.entries, self._read_piece)

    def _read_piece(self, entry: Entry, offset: int, length: int) -> bytes:
        try:
            return self._store.read_range(str(entry.handle), offset, length)
        except (NotFound, StoreRefused):
            raise FileReadError("cannot be read") from None


@contextlib.contextmanager
def open_source(source: str, store: ObjectStore | None = None) -> Iterator[Source]:
    """List a source and make its files readable.

    Args:
        source: folder, tar, zip, ``s3://bucket/prefix``, or ``s3://bucket/key`` of a tar or zip.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the source does not exist, cannot be read, is damaged, or is of another type.
    """
    if source.startswith(SCHEME):
        store = store or ObjectStore.from_env()
        if not _is_archive_object(store, source):
            yield PrefixSource(store, source)
            return
        with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
            path = Path(folder) / source.rpartition("/")[2]
            store.get_file(source, path)
            with _open_archive(source, path) as opened:
                yield opened
    elif _is_folder(source):
        yield FolderSource(Path(source))
    else:
        _require_file(source)
        with _open_archive(source, Path(source)) as opened:
            yield opened


def is_listed(source: str, store: ObjectStore | None = None) -> bool:
    """Return whether a source is a folder or a prefix, not an archive."""
    if source.startswith(SCHEME):
        return not _is_archive_object(store or ObjectStore.from_env(), source)
    return _is_folder(source)


def check_source(source: str) -> None:
    """Check a source for common mistakes without reading images.

    Raises:
        UserError: the source does not exist, cannot be read, is neither folder nor archive, or contains no images.
    """
    with _iterate_names(source) as names:
        for name in names:
            if not is_ignored(name) and may_be_image(name):
                return
    raise UserError(f"{source}: no images in it; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")


def source_fingerprint(source: str, store: ObjectStore | None = None, opened: Source | None = None) -> str:
    """Return a fingerprint of the content of a source, independent of its location.

    See :mod:`esvit_core.data.ingest.fingerprint` for what is read.

    Args:
        source: as for :func:`open_source`.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.
        opened: the source if it is already open, to avoid listing it again.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    if isinstance(opened, FolderSource | PrefixSource):
        return opened.fingerprint()
    if source.startswith(SCHEME):
        store = store or ObjectStore.from_env()
        if not _is_archive_object(store, source):
            return PrefixSource(store, source).fingerprint()
        return fingerprints.archive_fingerprint(store.stat(source).size, partial(store.read_range, source))
    if _is_folder(source):
        return FolderSource(Path(source)).fingerprint()
    _require_file(source)
    try:
        with Path(source).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return fingerprints.archive_fingerprint(size, lambda offset, length: read_at(file.fileno(), length, offset))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); {_EXPECTED} that is readable") from None


def _walk(root: Path) -> Iterator[Entry]:
    """Yield all files below ``root`` in the order of their names; an unreadable folder is yielded with a problem.

    Folders that this program created are left out.
    """
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror}); {_EXPECTED} that is readable") from None
    problems: list[OSError] = []
    visited: set[tuple[int, int]] = set()  # a link to a parent folder would loop forever
    for folder, folders, files in os.walk(root, followlinks=True, onerror=problems.append):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        if is_marked(Path(folder), files):  # a store or run folder of this program
            folders.clear()
            continue
        folders.sort()
        for file in sorted(files):
            path = os.path.join(folder, file)  # noqa: PTH118 (Path objects are slow for a million files)
            yield _file_entry(path, os.path.relpath(path, root))
    for problem in problems:
        path = str(problem.filename)
        name = name_of_text(os.path.relpath(path, root))
        yield Entry(name, 0, "", path, f"unreadable folder ({problem.strerror})")


def _file_entry(path: str, name: str) -> Entry:
    name = name_of_text(name)
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as error:
        reason = "broken link" if os.path.islink(path) else f"cannot be read ({error.strerror})"  # noqa: PTH114
        return Entry(name, 0, "", path, reason)
    if not stat.S_ISREG(found.st_mode):
        return Entry(name, 0, "", path, "not a regular file")
    return Entry(name, found.st_size, str(found.st_mtime_ns), path)


def _is_folder(source: str) -> bool:
    return os.path.isdir(source)  # noqa: PTH112 (Path.is_dir raises if a parent folder is not accessible)


def _require_file(source: str) -> None:
    path = Path(source)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block forever
            raise UserError(f"{source}: neither a folder nor a regular file; {_EXPECTED}")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{source}: does not exist; {_EXPECTED}") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); {_EXPECTED} that is readable") from None


@contextlib.contextmanager
def _open_archive(source: str, path: Path) -> Iterator[Source]:
    kind = archives.archive_type(path)
    if kind is None:
        raise UserError(f"{source}: neither a folder nor an archive; {_EXPECTED}")
    with contextlib.closing(TarSource(source, path) if kind == "tar" else ZipSource(source, path)) as opened:
        yield opened


@contextlib.contextmanager
def _iterate_names(source: str) -> Iterator[Iterator[str]]:
    """Iterate over the names in a source, reading no more of it than necessary."""
    path = Path(source)
    if source.startswith(SCHEME) or _is_folder(source):
        with open_source(source) if source.startswith(SCHEME) else contextlib.nullcontext() as opened:
            yield (entry.name for entry in (opened.entries if opened else _walk(path)))
        return
    _require_file(source)
    if archives.archive_type(path) == "tar":
        try:
            with tarfile.open(path, "r:*") as tar:  # unlike TarSource, this stops at the first image
                yield (member.name.removeprefix("./") for member in tar if not member.isdir())
        except archives.DAMAGE as error:
            raise archives.damaged_archive(source, error) from None
        return
    with _open_archive(source, path) as opened:
        yield iter([entry.name for entry in opened.entries])


def _is_archive_object(store: ObjectStore, uri: str) -> bool:
    key = split_uri(uri)[1]
    return key.lower().endswith(archives.SUFFIXES) and store.exists(uri)
