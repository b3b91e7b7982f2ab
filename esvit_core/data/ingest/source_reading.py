"""Understand a source from the names and sizes of its files, before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.combined_layout import combine_layouts
from esvit_core.data.ingest.entries import Entries, Entry, Selection
from esvit_core.data.ingest.file_kinds import (
    UNREADABLE_SUFFIXES,
    describe_ignored,
    ignored_kind,
    is_ignored,
    is_named_as_image,
    is_sidecar,
    suffix,
)
from esvit_core.data.ingest.layout import Layout, LayoutSettings, detect_layout
from esvit_core.data.ingest.number_arrays import iterate, translate
from esvit_core.data.ingest.source_lists import split_sources
from esvit_core.errors import UserError

_LARGEST_TABLE = 256 * 2**20  # bytes
_BYTES_PER_PIXEL = 8  # 16-bit RGBA; image files are rarely much larger than their pixels
# What the listing says about a file. An image is named as one, or has no suffix.
_OTHER, _BAD, LEFT_OUT, TOO_LARGE, _UNCLEAR, _NO_SUFFIX, _NAMED = range(7)


@dataclass(frozen=True)
class Reading:
    """How a source was understood, from the names and sizes of its files.

    Attributes:
        files: all files that may be images.
        readable: those without a known problem; one assignment of the layout each.
        layout: their splits and classes.
        kinds: what the listing says about each of the readable files, (n,) uint8.
        bad: names and reasons of files that cannot be images.
        ignored: numbers of files that are no images, see :func:`esvit_core.data.ingest.file_kinds.ignored_kind`.
    """

    files: Selection
    readable: Selection
    layout: Layout
    kinds: np.ndarray
    bad: list[tuple[str, str]]
    ignored: Counter[str]

    @property
    def images(self) -> np.ndarray:
        """Which of the readable files are named as images, or have no suffix, (n,) bool."""
        return self.kinds >= _NO_SUFFIX

    @property
    def unclear(self) -> np.ndarray:
        """Of which of the readable files the content must decide, (n,) bool."""
        return self.kinds == _UNCLEAR

    @property
    def likely(self) -> np.ndarray:
        """Which of the readable files are named as images or, if none is, have no suffix, (n,) bool."""
        named = self.kinds == _NAMED
        return named if named.any() else self.images


def read_names(
    entries: Entries,
    source: str,
    config: DataConfig,
    settings: LayoutSettings,
    read: Callable[[Entry], bytes] | None = None,
) -> Reading:
    """Understand a source from the names and sizes of its files.

    Args:
        entries: the files.
        source: for error messages.
        config: the ``data`` section of the configuration.
        settings: how the folders are to be understood.
        read: returns the content of a file that may be a table of labels; None: no such file is read.

    Raises:
        UserError: the source contains no images, or the settings do not fit it.
    """
    found = bytearray()
    bad: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()
    for entry in entries:
        kind = _kind(entry, config.max_megapixels)
        found.append(kind)
        if kind == _OTHER:
            ignored[ignored_kind(entry.name)] += 1
        elif entry.problem is not None:
            bad.append((entry.name, entry.problem))
    kinds = np.frombuffer(found, dtype=np.uint8)
    files = Selection.where(entries, kinds != _OTHER)
    if not len(files):
        raise no_images(source, ignored)
    readable = Selection.where(entries, kinds > _BAD)
    kinds = kinds[kinds > _BAD]
    layout = layout_of(readable, source, settings, read)
    has_problem = np.array([place.assignment.problem is not None for place in layout.assignments.places], dtype=bool)
    if has_problem.any():
        kinds[translate(layout.assignments.numbers, has_problem)] = LEFT_OUT
        ignored.update(map(ignored_kind, readable.some(kinds == LEFT_OUT).names))
    if (kinds == TOO_LARGE).any():
        bad += ((entry.name, too_large(entry)) for entry in readable.some(kinds == TOO_LARGE))
    return Reading(files, readable, layout, kinds, bad, ignored)


def layout_of(
    images: Selection, source: str, settings: LayoutSettings, read: Callable[[Entry], bytes] | None = None
) -> Layout:
    """Determine the layout of a source, with the tables of labels in it.

    Args:
        images: the files that may be images, among all files.
        source: for error messages.
        settings: how the folders are to be understood.
        read: returns the content of a file; None: no table is read.
    """
    if not len(images) or not images[0].part:
        return _layout_of_one(images, _Others(images), source, settings, read)
    sources = split_sources(source)
    parts = np.fromiter((entry.part for entry in images), np.int32, len(images))

    def detect(part: int, settings: LayoutSettings) -> Layout:
        of_part = images.some(parts == part)
        return _layout_of_one(of_part, _Others(of_part, part), sources[part - 1], settings, read)

    return combine_layouts(np.unique(parts).tolist(), images.names, source, settings, detect)


class _Others:
    """The files of a source that are no images and not ignored.

    Args:
        images: the images.
        part: number of their source among several.
    """

    def __init__(self, images: Selection, part: int = 0) -> None:
        self._images, self._part = images, part

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in self.entries())

    def entries(self) -> Iterator[Entry]:
        if self._images.numbers is None:
            return
        images = iterate(self._images.numbers)
        following = next(images, -1)
        for number, entry in enumerate(self._images.entries):
            if number == following:
                following = next(images, -1)
            elif entry.part == self._part and not is_ignored(entry.name):
                yield entry


def _layout_of_one(
    images: Selection,
    others: _Others,
    source: str,
    settings: LayoutSettings,
    read: Callable[[Entry], bytes] | None,
) -> Layout:
    def read_texts(names: Collection[str]) -> Iterator[tuple[str, str | None]]:
        for entry in others.entries():
            if entry.name in names:
                yield entry.name, _text(entry, read)

    given = images.given() if images.entries.has_given else ()
    return detect_layout(images.names, source, settings, others, read_texts, given)


def _text(entry: Entry, read: Callable[[Entry], bytes] | None) -> str | None:
    if read is None or entry.problem is not None or entry.size > _LARGEST_TABLE:
        return None
    try:
        return read(entry).decode("utf-8-sig", "replace")
    except FileReadError:
        return None


def no_images(source: str, ignored: dict[str, int]) -> UserError:
    """Return the error for a source without images; it names the files that were ignored."""
    others = f" (ignored: {describe_ignored(ignored)})" if ignored else ""
    return UserError(f"{source}: no images in it{others}; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")


def is_other_file(entry: Entry, max_megapixels: float) -> bool:
    """Return whether a file is ignored without reading it: nothing about it says that it is an image."""
    return _kind(entry, max_megapixels) == _OTHER


def too_large(entry: Entry) -> str:
    """Return the reason why a file of that size is bad."""
    return f"file of {entry.size:,} bytes"


def _kind(entry: Entry, max_megapixels: float) -> int:
    """Return what the listing says about a file."""
    if is_ignored(entry.name) or is_sidecar(entry.name):
        return _OTHER
    ending, is_large = suffix(entry.name), entry.size > largest_file(max_megapixels)
    if is_named_as_image(entry.name):
        kind = _NAMED
    elif ending in UNREADABLE_SUFFIXES:
        kind = _UNCLEAR
    else:
        is_folder = entry.problem is not None and entry.problem.startswith("unreadable folder")
        if is_large or (entry.problem is not None and ending and not is_folder):
            return _OTHER
        kind = _UNCLEAR if ending else _NO_SUFFIX
    if entry.problem is not None:
        return _BAD
    return TOO_LARGE if is_large else kind


def largest_file(max_megapixels: float) -> float:
    """Return the size in bytes that no image file of so many pixels exceeds."""
    return max_megapixels * 1e6 * _BYTES_PER_PIXEL
