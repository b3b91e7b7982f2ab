"""Plan a preparation: decide what happens to each file from its name and the earlier data, before any is read."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from esvit_core.config import DataConfig
from esvit_core.data.ingest.disk_rows import Row
from esvit_core.data.ingest.disk_table import DiskTable
from esvit_core.data.ingest.entries import Entries, Entry, Selection
from esvit_core.data.ingest.file_kinds import describe_ignored, ignored_kind
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.layout import Layout, LayoutSettings, SplitName
from esvit_core.data.ingest.lazy_sequence import LazySequence, Picked
from esvit_core.data.ingest.listing import File
from esvit_core.data.ingest.number_arrays import CHUNK, count_each, iterate, numbers_where, translate
from esvit_core.data.ingest.source_reading import TOO_LARGE, Reading, read_names, too_large
from esvit_core.data.ingest.source_summary import count_images, describe_counts, find_oddities
from esvit_core.data.ingest.split import choose_images, held_out, storage_order

_SPLITS: tuple[SplitName, ...] = ("test", "train", "val")  # in the order of storage: copies follow the training images


@dataclass(frozen=True)
class Candidate:
    """A file that may be an image, with the split and label for it."""

    entry: Entry
    split: SplitName
    label: int


class Candidates(LazySequence[Candidate]):
    """The files to read, in the order of storage, made when they are asked for.

    Args:
        readable: files of the source.
        order: which of them are stored, in order, (n,) uint32.
        ends: where the files of each split end in the order.
        labels: of the readable files: the place of each and the label of each place.
    """

    def __init__(
        self, readable: Selection, order: np.ndarray, ends: list[int], labels: tuple[np.ndarray, list[int]]
    ) -> None:
        self._readable, self._order, self._ends = readable, order, ends
        self._places, self._labels = labels

    def __len__(self) -> int:
        return len(self._order)

    def item(self, number: int) -> Candidate:
        file = int(self._order[number])
        split = _SPLITS[bisect_right(self._ends, number)]
        return Candidate(self._readable[file], split, self._labels[self._places[file]])

    def __iter__(self) -> Iterator[Candidate]:
        return map(self.item, range(len(self)))

    def entries(self) -> Iterable[Entry]:
        """Return the files in the order of the source, in which they are found fastest."""
        return self._readable.some(_mask(len(self._readable), self._order))


@dataclass(frozen=True)
class Skipped:
    """The files that are neither read nor reused, with the reason, except those that earlier data know.

    Attributes:
        reading: the source.
        used: which of its readable files are read or reused, (n,) bool.
        known: names of files that earlier data found bad or ignored.
    """

    reading: Reading
    used: np.ndarray
    known: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[tuple[Entry, str]]:
        if len(self.reading.files) == len(self.used) and self.used.all():
            return
        assignments = self.reading.layout.assignments
        problems = [place.assignment.problem for place in assignments.places]
        readable = zip(iterate(self.reading.kinds), iterate(self.used), iterate(assignments.numbers), strict=True)
        for entry in self.reading.files:
            if entry.problem is not None:
                is_used, reason = 0, entry.problem
            else:
                kind, is_used, place = next(readable)
                reason = too_large(entry) if kind == TOO_LARGE else problems[place] or "not chosen"
            if not is_used and entry.name not in self.known:
                yield entry, reason


@dataclass(frozen=True)
class IngestPlan:
    """The files to read, and what is known about the others.

    Attributes:
        candidates: files to read, in the order of storage.
        labels: classes of the images that are reused from earlier data, by name, (class,).
        bad: names and reasons of files that cannot be images.
        classes: names of the classes.
        files: all files of the source except ignored ones.
        skipped: the files that are neither read nor reused, with the reason, except those of ``known``.
        known: files that earlier data found bad or ignored and that are unchanged, so they are not read again.
        ignored: numbers of files that are no images, see :func:`esvit_core.data.ingest.file_kinds.ignored_kind`.
        not_chosen: number of images that are left out because of ``data.max_images``.
        splits_assigned: whether this program held images out, because the source has no folder for them.
        messages: how the source was understood.
    """

    candidates: Candidates
    labels: DiskTable
    bad: list[tuple[str, str]]
    classes: list[str]
    files: Selection
    skipped: Skipped
    known: list[File]
    ignored: dict[str, int]
    not_chosen: int
    splits_assigned: bool
    messages: list[str]


def plan_ingest(
    entries: Entries,
    source: str,
    config: DataConfig,
    base: Base | None = None,
    read: Callable[[Entry], bytes] | None = None,
) -> IngestPlan:
    """Decide what happens to every file of a source.

    Args:
        entries: the files.
        source: for error messages.
        config: the ``data`` section of the configuration.
        base: earlier data of the source, whose images are reused; None: there are none.
        read: returns the content of a file that may be a table of labels; None: no such file is read.

    Raises:
        UserError: the source contains no images, or none to train on.
    """
    reading = read_names(entries, source, config, LayoutSettings(config.labels, config.splits), read)
    layout, places = reading.layout, reading.layout.assignments.places
    messages = [*layout.messages, *_counts(reading)]
    chosen = _chosen(reading, config.max_images)
    splits_assigned = all(each.split != "val" for each in layout.assignments.counts(chosen))
    split_of = np.array([_SPLITS.index(place.assignment.split or "train") for place in places], dtype=np.uint8)
    splits = translate(layout.assignments.numbers, split_of)
    if splits_assigned:
        splits[_held_out(chosen, layout, config.val_fraction, any(entry.part for entry in reading.readable[:1]))] = (
            _SPLITS.index("val")
        )
    classes = _classes(layout, base)
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(place.assignment.label, -1) for place in places]
    used = chosen | reading.unclear if reading.unclear.any() else chosen.copy() if base else chosen
    order = storage_order(layout.assignments.keys, used)
    reused = DiskTable()
    known: list[File] = []
    if base is not None:
        order, reused = _without_known(reading, order, used, splits, labels, base)
        known = [*_known_files((entry for entry, _ in Skipped(reading, used)), base)]
    order, ends = _by_split(order, splits)
    skipped = Skipped(reading, used, frozenset(file.name for file in known))
    return IngestPlan(
        candidates=Candidates(reading.readable, order, ends, (layout.assignments.numbers, labels)),
        labels=reused,
        bad=reading.bad,
        classes=classes,
        files=reading.files,
        skipped=skipped,
        known=known,
        ignored=dict(reading.ignored),
        not_chosen=int(np.count_nonzero(reading.images) - np.count_nonzero(chosen)),
        splits_assigned=splits_assigned,
        messages=messages,
    )


def _without_known(
    reading: Reading, order: np.ndarray, used: np.ndarray, splits: np.ndarray, labels: list[int], base: Base
) -> tuple[np.ndarray, DiskTable]:
    """Return the files that earlier data do not have, in order, and the classes of the images that are reused.

    Args:
        reading: the source; what the earlier data say about its files is added.
        order: the files, in the order of storage.
        used: which of the readable files are read or reused, (N,) bool; those known to be no images are cleared.
        splits: number of the split of each readable file; those of changed images are set to their earlier one.
        labels: class of each place of the layout.
        base: the earlier data.
    """
    places = reading.layout.assignments.numbers
    is_read = np.ones(len(order), dtype=bool)

    def reused() -> Iterator[tuple[str, Row]]:
        for number, file in enumerate(iterate(order)):
            entry = reading.readable[file]
            before = base.files.get(entry.name)
            if before is None:
                continue
            stored = before.split
            is_read[number] = not before.is_same(entry) or (before.status not in ("bad", "ignored") and not stored)
            if is_read[number]:
                if stored:  # changed; an image that was trained on must not be held out later
                    splits[file] = _SPLITS.index(stored)
            elif stored:
                yield entry.name, (labels[places[file]],)
            else:
                used[file] = False
                if before.status == "bad":
                    reading.bad.append((entry.name, before.reason))
                else:
                    reading.ignored[ignored_kind(entry.name)] += 1

    classes = DiskTable(reused())
    return order[is_read], classes


def _by_split(order: np.ndarray, splits: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return the files ordered by split and, within a split, as before; and where those of each split end."""
    found, ends = np.empty_like(order), [0]
    for number in range(len(_SPLITS)):
        end = ends[-1]
        for start in range(0, len(order), CHUNK):
            some = order[start : start + CHUNK]
            of_split = some[splits[some] == number]
            found[end : end + len(of_split)] = of_split
            end += len(of_split)
        ends.append(end)
    return found, ends[1:]


def _known_files(entries: Iterable[Entry], base: Base) -> Iterator[File]:
    for entry in entries:
        before = base.files.get(entry.name)
        if before is not None and before.status in ("bad", "ignored") and before.is_same(entry):
            yield before


def _mask(length: int, numbers: np.ndarray) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    mask[numbers] = True
    return mask


def _counts(reading: Reading) -> list[str]:
    """Describe the numbers of images, and what looks odd about them, in lines."""
    counts = reading.layout.assignments.counts(reading.likely)
    lines = [*describe_counts(count_images(counts)), *find_oddities(counts)]
    return [*lines, f"ignored: {describe_ignored(reading.ignored)}"] if reading.ignored else lines


def _classes(layout: Layout, base: Base | None) -> list[str]:
    """Return the names of the classes; classes of earlier data keep their numbers, which are stored in its shards."""
    known = base.manifest.classes if base else []
    return [*known, *(name for name in layout.classes if name not in known)]


def _chosen(reading: Reading, count: int | None) -> np.ndarray:
    """Return which of the readable files are images that are used, (n,) bool."""
    images = reading.images
    if count is None:
        return images
    numbers = numbers_where(images)
    found = reading.layout.assignments
    groups = [(place.assignment.split or "", place.assignment.label or "") for place in found.places]
    of_images = (groups[place] for place in itertools.compress(iterate(found.numbers), iterate(images)))
    return _mask(len(images), numbers[choose_images(Picked(found.keys, numbers), of_images, count)])


def _held_out(chosen: np.ndarray, layout: Layout, fraction: float, several: bool) -> np.ndarray:
    """Choose the images to hold out; with a folder for training or several sources, among those that have a label.

    Returns:
        Which of the readable files are held out, (n,) bool.
    """
    found = layout.assignments
    each = [place.assignment for place in found.places]
    counts = count_each(found.numbers, len(each), chosen)
    fitting = [assignment.split != "test" for assignment in each]
    if any(n and fits and (several or a.split) and a.label for n, fits, a in zip(counts, fitting, each, strict=True)):
        fitting = [fits and bool(a.label) for fits, a in zip(fitting, each, strict=True)]
    held = chosen & translate(found.numbers, np.array(fitting, dtype=bool))
    keys = itertools.compress(found.keys, iterate(held))
    labels = (each[place].label for place in itertools.compress(iterate(found.numbers), iterate(held)))
    held[held] = held_out(keys, labels, fraction)
    return held
