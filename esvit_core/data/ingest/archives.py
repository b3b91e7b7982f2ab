"""Tar and zip archives as sources of images."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import re
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from esvit_core.data.ingest.entry_names import is_folder_in_zip, name_of_text, names_in_zip
from esvit_core.data.ingest.split_folders import SplitName
from esvit_core.errors import EsvitError, InfrastructureError, UserError

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


@dataclass(frozen=True, slots=True)
class Given:
    """What a source itself says about an image, beside its name.

    Attributes:
        label: name of its class; None: it has none.
        split: None: the folders say it.
    """

    label: str | None = None
    split: SplitName | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source.

    Attributes:
        name: path below the source, with ``/``.
        size: in bytes.
        stamp: changes with the content, as far as a listing can show.
        handle: the source's own reference to the file.
        problem: why the file cannot be an image; None: it may be one.
        given: label and split that the source states, such as a table or a WebDataset; None: the folders say them.
        part: number of its source if the files are those of several, from 1; 0: there is only one.
    """

    name: str
    size: int
    stamp: str
    handle: Any
    problem: str | None = None
    given: Given | None = None
    part: int = 0


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

    entries: list[Entry]
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
    """The files of a tar. A compressed tar is first decompressed to a temporary file, for random access."""

    def __init__(self, source: str, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = _plain_tar(source, path)
        self.is_compressed = self._file.name not in (path, str(path))
        try:
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115
            found = [_tar_entry(member) for member in self._tar if not member.isdir()]
            self._require_end(source)
        except DAMAGE as error:
            self._file.close()
            raise damaged_archive(source, error) from None
        except EsvitError:
            self._file.close()
            raise
        self.entries, self.duplicates = keep_last(found)
        self.notes: list[str] = []

    def read(self, entry: Entry) -> bytes:
        return self._read(entry, -1)

    def peek(self, entry: Entry, length: int) -> bytes:
        return self._read(entry, length)

    def _read(self, entry: Entry, length: int) -> bytes:
        assert isinstance(entry.handle, tarfile.TarInfo)
        try:
            with self._lock:  # all readers share one file position
                file = self._tar.extractfile(entry.handle)
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
        assert isinstance(entry.handle, tarfile.TarInfo)
        return entry.handle.offset_data if entry.handle.isreg() else None

    def close(self) -> None:
        self._tar.close()
        self._file.close()

    def _require_end(self, source: str) -> None:
        # tarfile treats a truncated header as the end of the archive: files would be missing silently.
        self._file.seek(self._tar.offset)
        if self._file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise damaged_archive(source, "its end marker is missing, so files may be missing")


class ZipSource:
    """The files of a zip."""

    def __init__(self, source: str, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise damaged_archive(source, error) from None
        infos = self._zip.infolist()
        names, note = names_in_zip(infos)
        self.entries, self.duplicates = keep_last(
            _zip_entry(name, info) for name, info in zip(names, infos, strict=True) if not is_folder_in_zip(name)
        )
        self.notes = [note] if note else []

    def read(self, entry: Entry) -> bytes:
        assert isinstance(entry.handle, zipfile.ZipInfo)
        content = io.BytesIO()  # ZipFile.read would hold a large file in memory twice
        try:
            with self._zip.open(entry.handle) as file:
                shutil.copyfileobj(file, content, 2**20)
        except (NotImplementedError, RuntimeError, *DAMAGE) as error:
            raise FileReadError(f"damaged archive entry ({error})") from None
        return content.getvalue()

    def peek(self, entry: Entry, length: int) -> bytes:
        assert isinstance(entry.handle, zipfile.ZipInfo)
        try:
            with self._zip.open(entry.handle) as file:
                return file.read(length)
        except (NotImplementedError, RuntimeError, *DAMAGE) as error:
            raise FileReadError(f"damaged archive entry ({error})") from None

    def close(self) -> None:
        self._zip.close()


def archive_type(path: Path) -> Literal["tar", "zip"] | None:
    """Return the type of an archive from its content; None if the file is not an archive."""
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


def keep_last(entries: Iterable[Entry]) -> tuple[list[Entry], int]:
    """Keep the last of several entries with the same name, as unpacking does; also return the number of the others."""
    named: dict[str, Entry] = {}
    count = 0
    for entry in entries:
        named[entry.name] = entry
        count += 1
    return list(named.values()), count - len(named)


def _tar_entry(member: tarfile.TarInfo) -> Entry:
    entry = _with_safe_name(Entry(name_of_text(member.name), member.size, str(member.mtime), member))
    if entry.problem is None and not (member.isreg() or member.islnk() or member.issym()):
        return replace(entry, problem="not a regular file")
    return entry


def _zip_entry(name: str, info: zipfile.ZipInfo) -> Entry:
    entry = _with_safe_name(Entry(name, info.file_size, f"{info.CRC:08x}", info))
    if entry.problem is None and info.flag_bits & 1:
        return replace(entry, problem="encrypted")
    return entry


def _with_safe_name(entry: Entry) -> Entry:
    parts = [part for part in entry.name.split("/") if part not in ("", ".")]
    unsafe = ".." in parts or entry.name.startswith("/") or re.match(r"[A-Za-z]:/", entry.name)
    problem = "path outside the archive" if unsafe else None
    return replace(entry, name="/".join(parts) or "(no name)", problem=problem)


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
