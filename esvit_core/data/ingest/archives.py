"""Tar and zip archives as sources of images."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import posixpath
import re
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO, Literal, Protocol, cast

from esvit_core.data.ingest.disk_rows import DiskRows, Row
from esvit_core.data.ingest.entries import Entries, Entry, keep_last
from esvit_core.data.ingest.entry_names import (
    NameInZip,
    encoding_in_zip,
    has_unicode_path,
    is_folder_in_zip,
    name_of_text,
)
from esvit_core.data.ingest.zip_directory import ZipDirectory
from esvit_core.errors import EsvitError, InfrastructureError, UserError
from esvit_core.storage.disk import read_at

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError)
_COMPRESSIONS: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": cast(Callable[[Path], BinaryIO], gzip.GzipFile),
    b"BZh": cast(Callable[[Path], BinaryIO], bz2.BZ2File),
    b"\xfd7zXZ\x00": cast(Callable[[Path], BinaryIO], lzma.LZMAFile),
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FileReadError(Exception):
    """One file of a source cannot be read; the message gives the reason in a few words."""


def sampling_key(entry: Entry) -> tuple[int, str]:
    """Return a key whose order is that of no folder and always the same: the first files make a sample."""
    return zlib.crc32(entry.name.encode("utf-8", "replace")), entry.name


class Source(Protocol):
    """Files that can be listed, and read in any order and from several threads.

    Attributes:
        entries: the files.
        duplicates: number of entries that were replaced by a later one with the same name.
        notes: what had to be guessed to list the files, in lines.
    """

    entries: Entries
    duplicates: int
    notes: list[str]

    def read(self, entry: Entry) -> bytes:
        """Return the content of a file.

        Raises:
            FileReadError: this file cannot be read; others may be readable.
            UserError: the source cannot be read any more.
        """
        ...

    def peek(self, entry: Entry, length: int) -> bytes:
        """Return the first bytes of a file, fewer if it is shorter; raises as :meth:`read`."""
        ...


class TarSource:
    """The files of a tar. A compressed tar is first decompressed to a temporary file, for random access.

    The handle of a regular file is its place in the tar, that of another member its number among the members that are kept.
    """

    def __init__(self, source: str, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = _plain_tar(source, path)
        self.is_compressed = self._file.name not in (path, str(path))
        try:
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115
            self._kept: list[tarfile.TarInfo] = []
            self.entries, self.duplicates = keep_last(self._list())
            self._require_end(source)
            _set_members(self._tar, _members_for_links(self._file, self._kept))
        except DAMAGE as error:
            self._file.close()
            raise damaged_archive(source, error) from None
        except EsvitError:
            self._file.close()
            raise
        self.notes: list[str] = []

    def read(self, entry: Entry) -> bytes:
        return self._read(entry, -1)

    def peek(self, entry: Entry, length: int) -> bytes:
        return self._read(entry, length)

    def _list(self) -> Iterator[Entry]:
        while (member := self._tar.next()) is not None:
            _set_members(self._tar, [])
            if member.isdir():
                continue
            handle: object = (member.offset_data, member.size)
            if not member.isreg() or member.issparse():
                handle = len(self._kept)
                self._kept.append(member)
            yield _tar_entry(member, handle)

    def _read(self, entry: Entry, length: int) -> bytes:
        if isinstance(entry.handle, tuple):
            offset, size = entry.handle
            wanted = size if length < 0 else min(length, size)
            try:
                data = read_at(self._file.fileno(), wanted, offset)
            except OSError as error:
                raise FileReadError(f"damaged archive entry ({error})") from None
            if len(data) < wanted:
                raise FileReadError("damaged archive entry (unexpected end of data)")
            return data
        return self._read_kept(self._kept[entry.handle], length)

    def _read_kept(self, member: tarfile.TarInfo, length: int) -> bytes:
        try:
            with self._lock:  # all readers share one file position
                file = self._tar.extractfile(member)
                if file is None:
                    raise FileReadError("not a regular file")
                return file.read(length)
        except KeyError:
            raise FileReadError("broken link") from None
        except RecursionError:
            raise FileReadError("circular link") from None
        except DAMAGE as error:
            raise FileReadError(f"damaged archive entry ({error})") from None

    def position(self, entry: Entry) -> int | None:
        """Return the offset of a regular file in the tar that is not compressed; None if the entry is a link."""
        if isinstance(entry.handle, tuple):
            return int(entry.handle[0])
        member = self._kept[entry.handle]
        return member.offset_data if member.isreg() else None

    def close(self) -> None:
        self._tar.close()
        self._file.close()

    def _require_end(self, source: str) -> None:
        # tarfile treats a truncated header as the end of the archive: files would be missing silently.
        self._file.seek(self._tar.offset)
        if self._file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise damaged_archive(source, "its end marker is missing, so files may be missing")


class ZipSource:
    """The files of a zip. The handle of a file is the place of its record in the zip's directory."""

    def __init__(self, source: str, path: Path) -> None:
        try:
            self._directory = ZipDirectory(path)
            # The encoding of the names follows from all of them.
            infos = DiskRows((*_facts(info), place) for info, place in self._directory)
        except DAMAGE as error:
            raise damaged_archive(source, error) from None
        encoding, note = encoding_in_zip(NameInZip(*row[:4]) for row in infos)
        names = (NameInZip(*row[:4]).decode(encoding) for row in infos)
        self.entries, self.duplicates = keep_last(
            _zip_entry(name, row) for name, row in zip(names, infos, strict=True) if not is_folder_in_zip(name)
        )
        self.notes = [note] if note else []

    def read(self, entry: Entry) -> bytes:
        content = io.BytesIO()  # ZipFile.read would hold a large file in memory twice
        with self._open(entry) as file:
            shutil.copyfileobj(file, content, 2**20)
        return content.getvalue()

    def peek(self, entry: Entry, length: int) -> bytes:
        with self._open(entry) as file:
            return file.read(length)

    def close(self) -> None:
        self._directory.close()

    @contextlib.contextmanager
    def _open(self, entry: Entry) -> Iterator[IO[bytes]]:
        try:
            with self._directory.open(*entry.handle) as archive, archive.open(archive.infolist()[0]) as file:
                yield file
        except (NotImplementedError, RuntimeError, *DAMAGE) as error:
            raise FileReadError(f"damaged archive entry ({error})") from None


def archive_type(path: Path) -> Literal["tar", "zip"] | None:
    """Return the type of an archive from its content; None if the file is not an archive."""
    with contextlib.suppress(EOFError):  # of a few bytes that begin like a compressed file
        if tarfile.is_tarfile(path):
            return "tar"
    if zipfile.is_zipfile(path):
        return "zip"
    # The name decides about a damaged archive, so that it is reported as damaged.
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return "zip" if name.endswith(".zip") else "tar"
    return None


def damaged_archive(source: str, why: object) -> EsvitError:
    """Return the error for an archive that cannot be used at all."""
    if isinstance(why, OSError) and why.errno in _NO_ROOM:
        return InfrastructureError(
            f"{source}: not enough space in {tempfile.gettempdir()} to decompress it; "
            "free some space there, set TMPDIR, or unpack it yourself and pass the folder"
        )
    return UserError(f"{source}: damaged archive ({why}); copy or create it again, or pass the unpacked folder")


def _members_for_links(file: BinaryIO, kept: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """Return the members of a tar among which tarfile finds the targets of links, in their order.

    Args:
        file: the tar.
        kept: its links, and other members that are no ordinary files.
    """
    links = {member.offset: member for member in kept if member.islnk() or member.issym()}
    if not links:
        return []
    targets = {_target(member) for member in links.values()}
    found = []
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            _set_members(tar, [])
            if member.offset in links:
                found.append(links[member.offset])
            elif posixpath.normpath(member.name) in targets:
                found.append(member)
    return found


def _set_members(tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> None:
    """Replace the list of all members that tarfile has read."""
    tar.members = members  # type: ignore[attr-defined]


def _target(link: tarfile.TarInfo) -> str:
    """Return the name under which tarfile looks for the target of a link."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath("/".join(part for part in (folder, link.linkname) if part))


def _tar_entry(member: tarfile.TarInfo, handle: object) -> Entry:
    entry = _with_safe_name(Entry(name_of_text(member.name), member.size, str(member.mtime), handle))
    if entry.problem is None and not (member.isreg() or member.islnk() or member.issym()):
        return replace(entry, problem="not a regular file")
    return entry


def _facts(info: zipfile.ZipInfo) -> Row:
    """Return what is needed of a file in a zip."""
    extra = info.extra if has_unicode_path(info.extra) else b""
    return info.orig_filename, info.flag_bits, info.create_system, extra, info.file_size, info.CRC


def _zip_entry(name: str, row: Row) -> Entry:
    _, flags, _, _, size, checksum, place = row
    entry = _with_safe_name(Entry(name, size, f"{checksum:08x}", place))
    if entry.problem is None and flags & 1:
        return replace(entry, problem="encrypted")
    return entry


def _with_safe_name(entry: Entry) -> Entry:
    parts = [part for part in entry.name.split("/") if part not in ("", ".")]
    unsafe = ".." in parts or entry.name.startswith("/") or re.match(r"[A-Za-z]:/", entry.name)
    problem = "path outside the archive" if unsafe else None
    name = "/".join(parts) or "(no name)"
    return entry if name == entry.name and problem is None else replace(entry, name=name, problem=problem)


def _plain_tar(source: str, path: Path) -> BinaryIO:
    """Open a tar, decompressed if necessary."""
    with path.open("rb") as file:
        head = file.read(6)
    opener = next((o for magic, o in _COMPRESSIONS.items() if head.startswith(magic)), None)
    if opener is None:
        return path.open("rb")
    plain = tempfile.TemporaryFile(prefix="esvit-")  # noqa: SIM115 (unnamed, so there is nothing to clean up)
    try:
        with opener(path) as compressed:
            shutil.copyfileobj(compressed, plain, 2**20)
        plain.seek(0)  # flushes the buffer
    except DAMAGE as error:
        with contextlib.suppress(OSError):  # closing tries to flush again
            plain.close()
        raise damaged_archive(source, error) from None
    return plain
