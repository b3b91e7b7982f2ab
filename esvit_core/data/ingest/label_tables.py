"""Labels from tables: text files in a source that name its images and their classes."""

from __future__ import annotations

import csv
import heapq
import io
import posixpath
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from esvit_core.data.ingest.file_kinds import suffix
from esvit_core.data.ingest.number_arrays import pick
from esvit_core.data.ingest.split_folders import SplitName, exact_role

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classname",
    "class_name",
    "category",
    "classid",
    "class_id",
    "target",
    "species",
    "breed",
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "usage")
_TRIED = 50  # tables that are read
_MENTIONED = 3
_MATCHING = 0.9  # share of the rows that must name a known class
_AMBIGUOUS = -1
Row = list[str]
#: Yields the names and texts of some files; None: the text cannot be read, or it is too large for a table.
ReadTexts = Callable[[Collection[str]], Iterable[tuple[str, str | None]]]


@dataclass(frozen=True)
class Tables:
    """Labels from a table.

    Attributes:
        file: name of the table.
        rows: label and split (None: the table has none) of each image, by its number.
    """

    file: str
    rows: dict[int, tuple[str, SplitName | None]]


def labels_of_tables(
    wanted: np.ndarray,
    names: Sequence[str],
    others: Iterable[str],
    read_texts: ReadTexts | None,
    known: Collection[str] | None,
) -> Tables | None:
    """Find the table that gives the most labels; None if none gives any.

    Args:
        wanted: numbers of the images that need a label.
        names: of all images.
        others: names of the files that are no images; only those in a folder above the images are read.
        read_texts: yields the texts of files.
        known: names of the classes; None: the table says what the classes are.
    """
    if read_texts is None:
        return None
    images: dict[str, dict[str, int]] = {}
    above = {path[:-1] for _, path in _paths(wanted, names)}
    above = {path[:n] for path in above for n in range(len(path) + 1)}
    tables = (name for name in others if suffix(name) in TABLE_SUFFIXES and tuple(name.split("/")[:-1]) in above)
    tried = heapq.nsmallest(_TRIED, tables, key=lambda name: (-name.count("/"), name))
    ranks = {name: rank for rank, name in enumerate(tried)}
    best: Tables | None = None
    for name, text in read_texts(ranks) if ranks else ():
        folder = posixpath.dirname(name)
        if folder not in images:
            images[folder] = _images_by_name(wanted, names, tuple(folder.split("/")) if folder else ())
        rows = {} if text is None else _read(text, images[folder], known)
        if rows and (best is None or (len(rows), -ranks[name]) > (len(best.rows), -ranks[best.file])):
            best = Tables(name, rows)
    return best


def mention_tables(others: Iterable[str]) -> list[str]:
    """Return a line about the tables of a source whose images have no labels; none if there are no tables."""
    tables = (name for name in others if suffix(name) in (".csv", ".tsv"))
    found = heapq.nsmallest(_MENTIONED + 1, tables, key=lambda name: (name.count("/"), name))
    if not found:
        return []
    shown = ", ".join(found[:_MENTIONED]) + (", ..." if len(found) > _MENTIONED else "")
    return [f"not read: {shown}; if a table names the images and their classes, set data.labels=csv"]


def _paths(wanted: np.ndarray, names: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the numbers and the parts of the names of images."""
    for number, name in pick(enumerate(names), wanted):
        yield number, tuple(unicodedata.normalize("NFC", name).split("/"))


def _images_by_name(wanted: np.ndarray, names: Sequence[str], folder: tuple[str, ...]) -> dict[str, int]:
    """Return the numbers of the images below a folder by what a table in it may call them.

    That is the path or its end, with and without the suffix. A name that fits several images is left out.
    """
    found: dict[str, int] = {}
    for i, path in _paths(wanted, names):
        if path[: len(folder)] != folder:
            continue
        for start in range(len(path)):
            name = "/".join(path[start:])
            for each in {name, posixpath.splitext(name)[0]}:
                found[each] = _AMBIGUOUS if each in found else i
    return {name: i for name, i in found.items() if i != _AMBIGUOUS}


def _read(text: str, images: dict[str, int], known: Collection[str] | None) -> dict[int, tuple[str, SplitName | None]]:
    rows = _rows(text)
    if not rows:
        return {}
    width = max(map(len, rows))
    numbers = [[images.get(_cell(row, c).removeprefix("./")) for row in rows] for c in range(width)]
    file_column = max(range(width), key=lambda c: sum(n is not None for n in numbers[c]))
    named = [(n, row) for n, row in zip(numbers[file_column], rows, strict=True) if n is not None]
    header = [] if numbers[file_column][0] is not None else [cell.strip().casefold() for cell in rows[0]]
    if not named:
        return {}
    columns = [c for c in range(width) if c != file_column]
    labels = _known_labels(named, columns, known) if known is not None else _label_column(named, columns, header)
    split = next((c for c in columns if c < len(header) and header[c] in SPLIT_COLUMNS), None)
    splits = [None if split is None else _split(_cell(row, split)) for _, row in named]
    return {n: (label, s) for (n, _), label, s in zip(named, labels, splits, strict=True) if label}


def _known_labels(named: list[tuple[int, Row]], columns: list[int], known: Collection[str]) -> list[str | None]:
    """Return the labels of the column that names known classes; numbers count with and without leading zeros."""
    classes = {str(int(name)): name for name in known if name.isdecimal()} | {name: name for name in known}

    def label(row: Row, column: int) -> str | None:
        cell = _cell(row, column)
        first = cell.split(" ")[0]
        return classes.get(cell) or classes.get(first) or (classes.get(str(int(first))) if first.isdecimal() else None)

    found = [[label(row, c) for _, row in named] for c in columns]
    best = max(found, key=lambda labels: sum(each is not None for each in labels), default=[])
    return best if sum(each is not None for each in best) >= _MATCHING * len(named) else [None] * len(named)


def _label_column(named: list[tuple[int, Row]], columns: list[int], header: list[str]) -> list[str | None]:
    by_name = [c for word in LABEL_COLUMNS for c in columns if c < len(header) and header[c] == word]
    if not by_name and len(columns) == 1:
        by_name = columns
    if not by_name:
        return [None] * len(named)
    return [_cell(row, by_name[0]) or None for _, row in named]


def _rows(text: str) -> list[Row]:
    """Return the rows of a table, with the delimiter that gives the most even columns."""
    lines = [line for line in text.splitlines() if line.strip()]
    for delimiter in ("\t", ";", ",", " "):
        widths = [line.count(delimiter) for line in lines[:20]]
        if widths and min(widths) > 0 and (delimiter != " " or max(widths) == min(widths)):
            return list(csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter))
    return []


def _cell(row: Row, column: int) -> str:
    return row[column].strip() if column < len(row) else ""


def _split(value: str) -> SplitName | None:
    role = exact_role(value)
    return "train" if role == "extra" else role
