"""Tables as sources: a CSV, TSV or Parquet file that names images, and optionally their labels and splits."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from esvit_core.data.ingest.arrow_files import require_pyarrow
from esvit_core.data.ingest.entries import Entries, Entry, Given, keep_last
from esvit_core.data.ingest.entry_names import name_of_text
from esvit_core.data.ingest.file_kinds import is_named_as_image
from esvit_core.data.ingest.fingerprint import listing_fingerprint
from esvit_core.data.ingest.label_tables import LABEL_COLUMNS, SPLIT_COLUMNS
from esvit_core.data.ingest.listed_sources import FolderSource, PrefixSource, file_entry
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
Row = Sequence[str]


class PathTable:
    """The images that a table names.

    A relative path is relative to the folder of the table. An image below that folder is named by its path there, another
    one by its whole address.

    Args:
        source: the table, a file or an ``s3://`` object.
        data: its content.
        store: store of ``s3://`` addresses; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the table names no images.
    """

    def __init__(self, source: str, data: bytes, store: ObjectStore | None) -> None:
        rows = _parquet_rows(source, data) if source.lower().endswith(".parquet") else _text_rows(data)
        header, rows = _header(rows)
        column = _path_column(header, rows)
        if column is None:
            raise UserError(f"{source}: names no images; {_EXPECTED}")
        label, split = _named(header, LABEL_COLUMNS, column), _named(header, SPLIT_COLUMNS, column)
        self._folder = source.rpartition("/")[0] if source.startswith(SCHEME) else str(Path(source).absolute().parent)
        rows = [row for row in rows if _cell(row, column)]
        addresses = [self._address(_cell(row, column)) for row in rows]
        web = next((a for a in addresses if a.startswith(("http://", "https://"))), None)
        if web is not None:
            raise UserError(
                f"{source}: {web}: files are not downloaded from the web; copy them to a folder or a bucket"
            )
        if any(address.startswith(SCHEME) for address in addresses):
            store = store or ObjectStore.from_env()
        self._objects = None if store is None else PrefixSource(store, self._folder, entries=())
        entries = _entries([self._name(address) for address in addresses], addresses, store)
        self.entries, self.duplicates = keep_last(
            replace(entry, given=_given(row, label, split)) if label is not None or split is not None else entry
            for entry, row in zip(entries, rows, strict=True)
        )
        columns = [
            f"{kind} from the column {header[c]}" for kind, c in (("labels", label), ("splits", split)) if c is not None
        ]
        self.notes = [f"a table of {len(rows):,} images" + (f", {', '.join(columns)}" if columns else "")]

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
        return FolderSource(Path(self._folder), ())

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


def _entries(names: list[str], addresses: list[str], store: ObjectStore | None) -> list[Entry]:
    def entry(name: str, address: str) -> Entry:
        if not address.startswith(SCHEME):
            return file_entry(address, name)
        assert store is not None
        try:
            found = store.stat(address)
        except (NotFound, StoreRefused) as error:
            reason = "does not exist" if isinstance(error, NotFound) else "access denied"
            return Entry(name_of_text(name), 0, "", address, reason)
        return Entry(name_of_text(name), found.size, found.etag, address)

    if store is None:
        return [entry(name, address) for name, address in zip(names, addresses, strict=True)]
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="table") as pool:
        return list(pool.map(entry, names, addresses))


def _given(row: Row, label: int | None, split: int | None) -> Given:
    return Given(
        (_cell(row, label) or None) if label is not None else None,
        _split(_cell(row, split)) if split is not None else None,
    )


def _split(value: str) -> SplitName | None:
    role = folder_role(value) if value else None
    return "train" if role == "extra" else role


def _text_rows(data: bytes) -> list[Row]:
    """Return the rows of a text, with the delimiter that gives the most even columns; a single column has none."""
    text = data.decode("utf-8-sig", "surrogateescape")
    lines = [line for line in text.splitlines() if line.strip()]
    for delimiter in ("\t", ";", ","):
        widths = [line.count(delimiter) for line in lines[:20]]
        if widths and min(widths) > 0:
            return list(csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter))
    return [[line.strip()] for line in lines]


def _parquet_rows(source: str, data: bytes) -> list[Row]:
    require_pyarrow(source)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source}: not a Parquet file ({str(error).splitlines()[0][:100]})") from None
    columns = [["" if v is None else str(v) for v in column.to_pylist()] for column in table.columns]
    return [table.column_names, *(list(row) for row in zip(*columns, strict=True))]


def _header(rows: list[Row]) -> tuple[list[str], list[Row]]:
    """Separate the header from the rows; without one, columns have no names."""
    if not rows or any(is_named_as_image(cell.strip()) for cell in rows[0]):
        return [], rows
    return [cell.strip() for cell in rows[0]], rows[1:]


def _path_column(header: Sequence[str], rows: Sequence[Row]) -> int | None:
    """Return the column that names images: the one in which most cells look like it, or the one that is called so."""
    probed = rows[:_PROBED]
    counts = [
        sum(is_named_as_image(_cell(row, column)) or _cell(row, column).startswith(SCHEME) for row in probed)
        for column in range(max(map(len, probed), default=0))
    ]
    if counts and 2 * max(counts) > len(probed):
        return counts.index(max(counts))
    return _named(header, _PATH_COLUMNS, None) if rows else None


def _named(header: Sequence[str], names: Sequence[str], taken: int | None) -> int | None:
    folded = [name.casefold() for name in header]
    return next((folded.index(n) for n in names if n in folded and folded.index(n) != taken), None)


def _cell(row: Row, column: int) -> str:
    return row[column].strip() if column < len(row) else ""
