"""Sets of files that hold many images each: WebDataset shards, archives, TSV files of the published code, Arrow files."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from esvit_core.data.ingest import archives, arrow_files
from esvit_core.data.ingest.archives import FileReadError, Source, TarSource, ZipSource
from esvit_core.data.ingest.arrow_files import ArrowImages
from esvit_core.data.ingest.entries import Entries, Entry, keep_last
from esvit_core.data.ingest.file_kinds import is_ignored, is_named_as_image, suffix
from esvit_core.data.ingest.listed_sources import EXPECTED, FolderSource, PrefixSource
from esvit_core.data.ingest.published_files import TSV_HEAD, TsvImages, is_image_tsv, labels_of_map, with_map_labels
from esvit_core.data.ingest.sample_labels import with_sample_labels
from esvit_core.data.ingest.split_folders import word_role
from esvit_core.errors import UserError

_NUMBERED = re.compile(r"(?P<base>.*?)[-_.]?(?P<number>\d+)(-of-\d+)?")
_MAP = "_map.txt"  # ends the name of a file with the labels of a zip
Listed = FolderSource | PrefixSource


@dataclass(frozen=True)
class _Container:
    """A file that holds images.

    Attributes:
        entry: the file.
        folder: folder of its images in the names of the source; it ends in ``/`` unless it is empty.
        number: begins the names of the images of one of several numbered files; empty: there is only one.
    """

    entry: Entry
    folder: str
    number: str

    def name(self, image: str) -> str:
        """Return the name of an image in the source."""
        above, slash, last = image.rpartition("/")
        return f"{self.folder}{above}{slash}{self.number}{last}"


class ContainerSet:
    """The images in several files, as one source.

    Images are named after the file that holds them: ``val.zip`` is read like a folder ``val``. Numbered files belong
    together: the names of their images begin with the number, ``000017-cat.jpg``.

    Args:
        source: for error messages.
        listed: the source that lists the files.
        containers: from :func:`find_containers`.

    Raises:
        UserError: one of the files is damaged.
    """

    def __init__(self, source: str, listed: Listed, containers: list[Entry]) -> None:
        self._listed = listed
        self._stack = contextlib.ExitStack()
        self._opened: list[Source] = []
        self.notes: list[str] = []
        try:
            self.entries, self.duplicates = keep_last(self._list(source, containers))
        except BaseException:
            self.close()
            raise
        kinds = Counter(_ending(entry.name) for entry in containers)
        self.notes.append("images in " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())))

    def read(self, entry: Entry) -> bytes:
        number, handle = entry.handle
        return self._opened[number].read(replace(entry, handle=handle))

    def peek(self, entry: Entry, length: int) -> bytes:
        number, handle = entry.handle
        return self._opened[number].peek(replace(entry, handle=handle), length)

    def fingerprint(self) -> str:
        return self._listed.fingerprint()

    def close(self) -> None:
        self._stack.close()

    def _list(self, source: str, containers: list[Entry]) -> Iterator[Entry]:
        maps = {entry.name: entry for entry in self._listed.entries if entry.name.endswith(_MAP)}
        for number, container in enumerate(_named(containers)):
            opened = self._open(source, container.entry)
            self._opened.append(opened)
            entries, notes = _with_labels(container.entry, opened, maps, self._listed)
            opened.entries = Entries()  # those of the set are enough
            self.notes += notes
            for entry in entries:
                yield replace(entry, name=container.name(entry.name), handle=(number, entry.handle))

    def _open(self, source: str, entry: Entry) -> Source:
        name = f"{source.rstrip('/')}/{entry.name}"
        if entry.problem is not None:
            raise UserError(f"{name}: {entry.problem}")
        with contextlib.ExitStack() as stack:
            if isinstance(self._listed, FolderSource):
                path = Path(str(entry.handle))
            else:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esvit-"))) / Path(entry.name).name
                self._listed.download(entry, path)
            opened = open_container(name, path)
            stack.callback(opened.close)
            if isinstance(opened, TarSource) and not opened.is_compressed:
                # Thousands of shards cannot stay open.
                return _Ranges(opened, partial(self._listed.read_piece, entry))
            self._stack.enter_context(stack.pop_all())
            return opened


class _Ranges:
    """The files of a tar that is not compressed, read as ranges of it."""

    def __init__(self, tar: TarSource, read: Callable[[int, int], bytes]) -> None:
        self.notes, self.duplicates = tar.notes, tar.duplicates
        self._read = read
        labelled = with_sample_labels(tar.entries, tar.read)
        self.entries = Entries(replace(entry, handle=tar.position(entry)) for entry in labelled)

    def read(self, entry: Entry) -> bytes:
        return self._piece(entry, entry.size)

    def peek(self, entry: Entry, length: int) -> bytes:
        return self._piece(entry, min(length, entry.size))

    def _piece(self, entry: Entry, length: int) -> bytes:
        if entry.handle is None:
            raise FileReadError("a link in a shard")
        data = self._read(entry.handle, length)
        if len(data) < length:
            raise FileReadError("the shard ends before it")
        return data


def open_container(source: str, path: Path) -> TarSource | ZipSource | TsvImages | ArrowImages:
    """Open a file that holds images.

    Raises:
        UserError: it is damaged or of another type.
    """
    if path.suffix == ".tsv":
        return TsvImages(path)
    if path.suffix in arrow_files.SUFFIXES:
        return ArrowImages(source, path)
    kind = archives.archive_type(path)
    if kind is None:
        raise UserError(f"{source}: neither a folder nor an archive; {EXPECTED}")
    return TarSource(source, path) if kind == "tar" else ZipSource(source, path)


def find_containers(listed: Listed) -> list[Entry]:
    """Return the files of a source that hold images, if it has no images beside them."""
    found = []
    for entry in listed.entries:
        if is_named_as_image(entry.name) and not is_ignored(entry.name):
            return []
        if is_container_name(entry.name) and not is_ignored(entry.name) and _holds_images(listed, entry):
            found.append(entry)
    return found


def is_container_name(name: str) -> bool:
    """Return whether a file with this name may hold images."""
    return name.lower().endswith(archives.SUFFIXES) or suffix(name) in (".tsv", *arrow_files.SUFFIXES)


def _holds_images(listed: Listed, entry: Entry) -> bool:
    if suffix(entry.name) != ".tsv":
        return isinstance(listed, FolderSource) or suffix(entry.name) not in arrow_files.SUFFIXES
    if isinstance(listed, PrefixSource):
        return False
    try:
        return is_image_tsv(listed.peek(entry, TSV_HEAD))
    except FileReadError:
        return False


def _with_labels(container: Entry, opened: Source, maps: dict[str, Entry], listed: Listed) -> tuple[Entries, list[str]]:
    """Return the images of a file with the labels that lie in it or beside it, and messages."""
    notes = list(opened.notes)
    if isinstance(opened, ZipSource):
        stem = container.name[: -len(_ending(container.name))]
        if (map_entry := maps.get(f"{stem}{_MAP}")) is not None:
            labels = labels_of_map(listed.read(map_entry).decode("utf-8-sig", "replace"), map_entry.name)
            entries, more = with_map_labels(opened.entries, labels, map_entry.name)
            return entries, [*notes, *more]
    if isinstance(opened, TarSource | ZipSource):
        return with_sample_labels(opened.entries, opened.read), notes
    return opened.entries, notes


def _named(containers: list[Entry]) -> Iterator[_Container]:
    """Decide how the images of each file are named."""
    parts = []
    bases: dict[str, set[str]] = defaultdict(set)
    for entry in containers:
        folder, _, last = entry.name.rpartition("/")
        stem = last[: -len(_ending(last))]
        match = _NUMBERED.fullmatch(stem)
        base, number = (match["base"], f"{match['number']}-") if match else (stem, "")
        bases[folder].add(base)
        parts.append((entry, folder, base, number))
    for entry, folder, base, number in parts:
        # A word that all numbered files share says nothing: data-00000-of-00002.arrow.
        says = len(containers) > 1 and (not number or len(bases[folder]) > 1 or word_role(base) is not None)
        path = [*([folder] if folder else []), *([base] if says and base else [])]
        yield _Container(entry, "".join(f"{part}/" for part in path), number if len(containers) > 1 else "")


def _ending(name: str) -> str:
    lower = name.lower()
    archive = max((s for s in archives.SUFFIXES if lower.endswith(s)), key=len, default="")
    return archive or suffix(name)
