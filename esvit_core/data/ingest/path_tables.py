"""Tables as sources: a CSV, TSV or Parquet file that names images, and optionally their labels and splits."""

from __future__ import annotations

import csv
import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from esvit_core.config.auto_choice import count
from esvit_core.data.ingest.arrow_files import require_pyarrow
from esvit_core.data.ingest.disk_rows import DiskRows
from esvit_core.data.ingest.entries import Entries, Entry, Given, keep_last
from esvit_core.data.ingest.entry_names import name_of_text
from esvit_core.data.ingest.file_kinds import is_named_as_image
from esvit_core.data.ingest.fingerprint import listing_fingerprint
from esvit_core.data.ingest.label_tables import LABEL_COLUMNS, SPLIT_COLUMNS
from esvit_core.data.ingest.listed_sources import FolderSource, PrefixSource, file_entry
from esvit_core.data.ingest.prefetch import prefetch
from esvit_core.data.ingest.split_folders import SplitName, folder_role
from esvit_core.errors import UserError
from esvit_core.storage import NotFound, ObjectStore, StoreRefused, join_uri
from esvit_core.storage.parallel_transfer import PARALLEL
from esvit_core.storage.uri import SCHEME

SUFFIXES = (".csv", ".tsv", ".parquet")
_PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path"),
    *("uri", "url", "s3_uri", "key", "name", "id"),
)
_PROBED = 100  # rows that show which column names the images
_EXPECTED = "expected a column of paths or s3:// addresses, and optionally the columns label and split"
_PARQUET_ROWS = 1024  # that are decoded at once
Row = Sequence[str]
_Image = tuple[str, str, Given | None]  # name, address, and what the table says


class PathTable:
    """The images that a table names.

    A relative path is relative to the folder of the table. An image below that folder is named by its path there, another
    one by its whole address.

    Args:
        source: the table, a file or an ``s3://`` object.
        path: its content on this machine.
        store: store of ``s3://`` addresses; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the table names no images.
    """

    def __init__(self, source: str, path: Path, store: ObjectStore | None) -> None:
        is_parquet = source.lower().endswith(".parquet")
        rows = DiskRows(map(tuple, _parquet_rows(source, path) if is_parquet else _text_rows(path)))
        header = _header(rows)
        first = 1 if header else 0
        column = _path_column(header, list(itertools.islice(rows, first, first + _PROBED)))
        if column is None:
            raise UserError(f"{source}: names no images; {_EXPECTED}")
        label, split = _named(header, LABEL_COLUMNS, column), _named(header, SPLIT_COLUMNS, column)
        self._folder = source.rpartition("/")[0] if source.startswith(SCHEME) else str(Path(source).absolute().parent)

        def images() -> Iterator[_Image]:
            for row in itertools.islice(rows, first, None):
                if cell := _cell(row, column):
                    address = self._address(cell)
                    given = None if label is None and split is None else _given(row, label, split)
                    yield self._name(address), address, given

        images_found, in_store = 0, False
        for _, address, _ in images():
            images_found += 1
            in_store = in_store or address.startswith(SCHEME)
            if address.startswith(("http://", "https://")):
                raise UserError(
                    f"{source}: {address}: files are not downloaded from the web; copy them to a folder or a bucket"
                )
        if in_store:
            store = store or ObjectStore.from_env()
        self._objects = None if store is None else PrefixSource(store, self._folder, entries=())
        self._files = FolderSource(Path(self._folder), ())
        self.entries, self.duplicates = keep_last(_entries(images(), store))
        columns = [
            f"{kind} from the column {header[c]}" for kind, c in (("labels", label), ("splits", split)) if c is not None
        ]
        self.notes = [f"a table of {count(images_found, 'image')}" + (f", {', '.join(columns)}" if columns else "")]

    def read(self, entry: Entry) -> bytes:
        return self._source(entry).read(entry)

    def peek(self, entry: Entry, length: int) -> bytes:
        return self._source(entry).peek(entry, length)

    def fingerprint(self) -> str:
        entries = Entries(
            replace(entry, name="\0".join([entry.name, entry.given.label or "", entry.given.split or ""]))
            if entry.given
            else entry
            for entry in self.entries
        )
        return listing_fingerprint(entries, lambda entry, *piece: self._source(entry).read_piece(entry, *piece))

    def _source(self, entry: Entry) -> FolderSource | PrefixSource:
        if str(entry.handle).startswith(SCHEME):
            assert self._objects is not None
            return self._objects
        return self._files

    def _name(self, address: str) -> str:
        folder = self._folder.rstrip("/") + "/"
        path = address.removeprefix(folder) if address.startswith(folder) else address.removeprefix(SCHEME)
        parts = posixpath.normpath(path.replace("//", "/")).split("/")
        return "/".join(part for part in parts if part not in ("", ".", "..")) or "(no name)"

    def _address(self, cell: str) -> str:
        if "://" in cell or os.path.isabs(cell):  # noqa: PTH117
            return cell
        if self._folder.startswith(SCHEME):
            return join_uri(self._folder, cell)
        return os.path.join(self._folder, cell)  # noqa: PTH118


def is_path_table(source: str) -> bool:
    """Return whether the name of a source is that of a table."""
    return source.lower().endswith(SUFFIXES)


def _entries(images: Iterable[_Image], store: ObjectStore | None) -> Iterator[Entry]:
    def entry(image: _Image) -> Entry:
        name, address, given = image
        if not address.startswith(SCHEME):
            return replace(file_entry(address, name), given=given)
        assert store is not None
        try:
            found = store.stat(address)
        except (NotFound, StoreRefused) as error:
            reason = "does not exist" if isinstance(error, NotFound) else "access denied"
            return Entry(name_of_text(name), 0, "", address, reason, given)
        return Entry(name_of_text(name), found.size, found.etag, address, given=given)

    if store is None:
        yield from map(entry, images)
        return
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="table") as pool:
        for _, found in prefetch(pool, entry, images, 2 * PARALLEL):
            yield found.result()


def _given(row: Row, label: int | None, split: int | None) -> Given:
    return Given(
        (_cell(row, label) or None) if label is not None else None,
        _split(_cell(row, split)) if split is not None else None,
    )


def _split(value: str) -> SplitName | None:
    role = folder_role(value) if value else None
    return "train" if role == "extra" else role


def _text_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a text, with the delimiter that gives the most even columns; a single column has none."""
    first = list(itertools.islice(_lines(path), 20))
    for delimiter in ("\t", ";", ","):
        if first and min(line.count(delimiter) for line in first) > 0:
            return csv.reader(_lines(path), delimiter=delimiter)
    return ([line.strip()] for line in _lines(path))


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text that are not empty."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            yield from (f"{each}\n" for each in line.splitlines() if each.strip())


def _parquet_rows(source: str, path: Path) -> Iterator[Row]:
    require_pyarrow(source)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file.schema_arrow.names
            for batch in file.iter_batches(_PARQUET_ROWS):
                columns = [["" if v is None else str(v) for v in column.to_pylist()] for column in batch.columns]
                yield from zip(*columns, strict=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source}: not a Parquet file ({str(error).splitlines()[0][:100]})") from None


def _header(rows: DiskRows) -> list[str]:
    """Return the header; empty if there is none, and columns have no names."""
    if not len(rows) or any(is_named_as_image(cell.strip()) for cell in rows[0]):
        return []
    return [cell.strip() for cell in rows[0]]


def _path_column(header: Sequence[str], probed: Sequence[Row]) -> int | None:
    """Return the column that names images: the one in which most cells look like it, or the one that is called so."""
    counts = [
        sum(is_named_as_image(_cell(row, column)) or _cell(row, column).startswith(SCHEME) for row in probed)
        for column in range(max(map(len, probed), default=0))
    ]
    if counts and 2 * max(counts) > len(probed):
        return counts.index(max(counts))
    return _named(header, _PATH_COLUMNS, None) if probed else None


def _named(header: Sequence[str], names: Sequence[str], taken: int | None) -> int | None:
    folded = [name.casefold() for name in header]
    return next((folded.index(n) for n in names if n in folded and folded.index(n) != taken), None)


def _cell(row: Row, column: int) -> str:
    return row[column].strip() if column < len(row) else ""
