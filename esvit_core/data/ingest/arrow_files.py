"""Hugging Face data sets on disk: Arrow and Parquet files with encoded images in a column."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.entries import Entries, Entry, Given
from esvit_core.data.ingest.file_kinds import is_named_as_image
from esvit_core.errors import UserError
from esvit_core.storage.disk import read_at

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".arrow", ".parquet")
_LABELS = ("label", "labels", "fine_label", "class", "cls", "category", "target")
_ROWS = 256  # of a Parquet file that are decoded at once


def require_pyarrow(source: str) -> None:
    """Raise an error if Arrow files cannot be read here.

    Raises:
        UserError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UserError(f"{source}: reading Arrow and Parquet files needs pyarrow; install the extra `esvit[formats]`")


class ArrowImages:
    """The images in a file of a Hugging Face data set.

    The rows of an Arrow file are read where they lie. The images of a Parquet file are first copied to a temporary file,
    because its rows can only be decoded in large groups.

    Args:
        source: for error messages.
        path: the file.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or has no column of images.
    """

    def __init__(self, source: str, path: Path) -> None:
        require_pyarrow(source)
        import pyarrow as pa

        self.duplicates = 0
        self.notes: list[str] = []
        self._copy = tempfile.TemporaryFile(prefix="esvit-") if path.suffix == ".parquet" else None  # noqa: SIM115
        self._chunks: list[Any] = []
        stamp = str(path.stat().st_mtime_ns)
        try:
            self.entries = Entries(self._list(path, stamp))
        except (pa.ArrowException, OSError, LookupError, ValueError) as error:
            self.close()
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{source}: cannot be read ({reason}); expected a column of encoded images") from None

    def read(self, entry: Entry) -> bytes:
        if self._copy is not None:
            start, size = entry.handle
            return read_at(self._copy.fileno(), size, start)
        chunk, row = entry.handle
        data = self._chunks[chunk][row].as_py()
        if data is None:
            raise FileReadError("the row has no image")
        return bytes(data)

    def peek(self, entry: Entry, length: int) -> bytes:
        return self.read(entry)[:length]

    def close(self) -> None:
        self._chunks.clear()
        if self._copy is not None:
            self._copy.close()

    def _list(self, path: Path, stamp: str) -> Iterator[Entry]:
        count = 0
        for batch in _batches(path):
            yield from self._entries(batch, stamp, count)
            count += len(batch)

    def _entries(self, batch: pa.RecordBatch, stamp: str, first: int) -> Iterator[Entry]:
        column = image_column(batch.schema)
        if column is None:
            raise ValueError(f"its columns are {', '.join(batch.schema.names)}")
        images = batch.column(column)
        paths: Any = None
        if hasattr(images.type, "fields"):
            paths = images.field("path") if images.type.get_field_index("path") >= 0 else None
            images = images.field("bytes")
        labels = _labels(batch)
        for row in range(len(images)):
            path = None if paths is None else paths[row].as_py()
            name = f"{first + row:09d}"
            if path and is_named_as_image(path):
                name += f"-{Path(path).name}"
            size = len(images[row].as_buffer()) if images[row].is_valid else 0
            problem = None if images[row].is_valid else "the row names a file and holds no image"
            yield Entry(name, size, stamp, self._handle(images, row, size), problem, given=Given(labels[row]))
        if self._copy is None:
            self._chunks.append(images)
        else:
            self._copy.flush()

    def _handle(self, images: Any, row: int, size: int) -> tuple[int, int]:
        if self._copy is None:
            return len(self._chunks), row
        start = self._copy.tell()
        if size:
            self._copy.write(images[row].as_buffer())
        return start, size


def holds_images(path: Path) -> bool:
    """Return whether a Parquet file has a column of images; False if it is damaged."""
    require_pyarrow(str(path))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return image_column(pq.read_schema(path)) is not None
    except (pa.ArrowException, OSError):
        return False


def image_column(schema: pa.Schema) -> str | None:
    """Return the name of the column that holds encoded images; None if there is none."""
    import pyarrow as pa

    features = _features(schema)
    named = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    for name in named or sorted(schema.names, key=lambda name: name not in ("image", "img")):
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(name)
        if (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and (named or "im" in name.casefold()):
            return str(name)
    return None


def _batches(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        column = image_column(file.schema_arrow)
        if column is None:
            raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
        wanted = [column, *(name for name in file.schema_arrow.names if name.casefold() in _LABELS)]
        yield from file.iter_batches(_ROWS, columns=wanted)
        return
    mapped = pa.memory_map(str(path))
    try:
        yield from pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(mapped)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _labels(batch: pa.RecordBatch) -> list[str | None]:
    features = _features(batch.schema)
    classes = [name for name in batch.schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    named = sorted(
        (n for n in batch.schema.names if n.casefold() in _LABELS), key=lambda n: _LABELS.index(n.casefold())
    )
    columns = [name for name in named if name in classes] or classes or named
    if not columns:
        return [None] * len(batch)
    words = features.get(columns[0], {}).get("names")
    values = batch.column(columns[0]).to_pylist()
    return [_label(value, words) for value in values]


def _label(value: object, words: list[str] | None) -> str | None:
    if value is None or value == "" or isinstance(value, list | dict):
        return None
    if words and isinstance(value, int):
        return words[value] if 0 <= value < len(words) else None  # -1: the data set hides its labels
    return str(value)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the types that Hugging Face's library has stored for the columns."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        return dict(json.loads(text)["info"]["features"]) if text else {}
    except (ValueError, LookupError, TypeError):
        return {}
