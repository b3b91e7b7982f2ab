"""The files that the published EsViT code reads: a zip with a map of its labels, and TSV files of encoded images.

``train.zip`` lies beside ``train_map.txt``, whose lines are ``train.zip@/n01440764/1.JPEG<tab>0``. A line of a TSV file is
the key of an image, its label and the image itself in base64, separated by tabs. The label is a number, or JSON such as
``[{"class": "n01440764"}]``. ``train.lineidx`` beside ``train.tsv`` holds the offset of each line, one per line.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.entries import Entries, Entry, Given
from esvit_core.data.ingest.file_kinds import HEAD, is_image_head, is_named_as_image
from esvit_core.errors import UserError
from esvit_core.storage.disk import read_at

TSV_HEAD = 2**16  # bytes; the key and the label of a row are shorter
_HEAD_CHARACTERS = 4 * -(-HEAD // 3)


class TsvImages:
    """The images in a TSV file of the published code."""

    def __init__(self, path: Path) -> None:
        self.duplicates = 0
        self.notes: list[str] = []
        self._path = path
        stamp = str(path.stat().st_mtime_ns)
        with path.open("rb") as file:
            self.entries = Entries(
                _row_entry(file.fileno(), number, start, end, stamp, path)
                for number, (start, end) in enumerate(_rows(path))
                if end > start
            )

    def read(self, entry: Entry) -> bytes:
        start, end = entry.handle
        return self._decoded(start, end)

    def peek(self, entry: Entry, length: int) -> bytes:
        start, end = entry.handle
        return self._decoded(start, min(end, start + 4 * -(-length // 3)))[:length]

    def _decoded(self, start: int, end: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                return base64.b64decode(read_at(file.fileno(), end - start, start))
        except OSError as error:
            raise FileReadError(f"cannot be read ({error.strerror})") from None
        except binascii.Error as error:
            raise FileReadError(f"not base64 ({error})") from None

    def close(self) -> None:
        pass


def is_image_tsv(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of a TSV file of encoded images."""
    columns = head.split(b"\n", 1)[0].split(b"\t")
    return len(columns) == 3 and _is_encoded_image(columns[2][:_HEAD_CHARACTERS])


def labels_of_map(text: str, source: str) -> dict[str, str]:
    """Return the label of each file that the map of a zip names.

    Raises:
        UserError: a line has no label.
    """
    labels: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        columns = [column for column in line.strip().split("\t") if column]
        if not columns:
            continue
        if len(columns) < 2:
            raise UserError(f"{source}: line {number} has no label; expected the lines of a map: file, tab, label")
        name = columns[0].partition("@")[2] or columns[0]
        labels[name.lstrip("/")] = columns[1]
    return labels


def with_map_labels(entries: Entries, labels: dict[str, str], map_name: str) -> tuple[Entries, list[str]]:
    """Return the entries that a map names, with their labels, and a line about the images that it does not name."""
    kept = Entries(replace(entry, given=Given(labels[entry.name])) for entry in entries if entry.name in labels)
    others = sum(is_named_as_image(name) and name not in labels for name in entries.names())
    return kept, [f"left out: {others:,} images that {map_name} does not name"] if others else []


def _rows(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each row, in bytes."""
    index, size = path.with_suffix(".lineidx"), path.stat().st_size
    if index.is_file():
        try:
            with index.open(encoding="ascii") as lines:
                starts = array("Q", (int(each) for line in lines for each in line.split()))
        except (ValueError, OverflowError):
            raise UserError(
                f"{index}: expected the offset of a row in each line; remove it to read without it"
            ) from None
        if any(start > stop for start, stop in itertools.pairwise(starts)) or (starts and starts[-1] >= size):
            raise UserError(f"{index}: does not belong to {path.name}; remove it to read without it")
        yield from itertools.pairwise(itertools.chain(starts, [size]))
        return
    with path.open("rb") as file:
        start = 0
        for line in file:
            yield start, start + len(line)
            start += len(line)


def _row_entry(descriptor: int, number: int, start: int, end: int, stamp: str, path: Path) -> Entry:
    head = read_at(descriptor, min(end - start, TSV_HEAD), start)
    columns = head.split(b"\t", 2)
    if len(columns) < 3:
        raise UserError(f"{path}: row {number + 1} has no third column; expected key, label and the image in base64")
    key, label, image = columns
    begin = start + len(key) + len(label) + 2
    tail = read_at(descriptor, min(8, end - begin), max(begin, end - 8)).rstrip(b"\r\n")
    end = end - (min(8, end - begin) - len(tail))
    size = (end - begin) * 3 // 4 - tail.count(b"=")
    name = key.decode("utf-8", "replace").strip().replace("/", "_") or str(number)
    if not is_named_as_image(name):
        name += _ending(image)
    return Entry(name, size, stamp, (begin, end), given=Given(_label(label.decode("utf-8", "replace").strip())))


def _label(text: str) -> str | None:
    if not text or text[0] not in "[{":
        return text or None
    try:
        values = json.loads(text)
    except ValueError:
        return text
    first = values[0] if isinstance(values, list) and values else values
    label = first.get("class") if isinstance(first, dict) else None
    return None if label is None else str(label)


def _is_encoded_image(start: bytes) -> bool:
    try:
        return is_image_head(base64.b64decode(start[: len(start) // 4 * 4]))
    except binascii.Error:
        return False


def _ending(image: bytes) -> str:
    return ".png" if image.startswith(b"iVBOR") else ".jpg"
