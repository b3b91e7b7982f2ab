"""Plan a preparation: decide what happens to each file from its name and the earlier data, before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.combined_layout import combine_layouts
from esvit_core.data.ingest.entries import Entries, Entry
from esvit_core.data.ingest.file_kinds import (
    UNREADABLE_SUFFIXES,
    describe_ignored,
    ignored_kind,
    is_ignored,
    is_named_as_image,
    is_sidecar,
    may_be_image,
    suffix,
)
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.layout import Layout, LayoutSettings, SplitName, detect_layout
from esvit_core.data.ingest.listing import File
from esvit_core.data.ingest.source_lists import split_sources
from esvit_core.data.ingest.source_summary import count_images, describe_counts, find_oddities
from esvit_core.data.ingest.split import choose_images, hold_out, storage_order
from esvit_core.errors import UserError

_LARGEST_TABLE = 256 * 2**20  # bytes
_BYTES_PER_PIXEL = 8  # 16-bit RGBA; image files are rarely much larger than their pixels


@dataclass(frozen=True)
class Candidate:
    """A file that may be an image, with the split and label for it."""

    entry: Entry
    split: SplitName
    label: int


@dataclass(frozen=True)
class Reading:
    """How a source was understood, from the names and sizes of its files.

    Attributes:
        files: all files that may be images.
        readable: those without a known problem; one assignment of the layout each.
        layout: their splits and classes.
        images: numbers of the readable files that are named as images, or have no suffix.
        unclear: numbers of the readable files whose content must decide.
        bad: names and reasons of files that cannot be images.
        left_out: names of images that the layout has no place for, with the reasons.
        ignored: numbers of files that are no images, see :func:`esvit_core.data.ingest.file_kinds.ignored_kind`.
    """

    files: list[Entry]
    readable: list[Entry]
    layout: Layout
    images: list[int]
    unclear: list[int]
    bad: list[tuple[str, str]]
    left_out: dict[str, str]
    ignored: Counter[str]


@dataclass(frozen=True)
class IngestPlan:
    """The files to read, and what is known about the others.

    Attributes:
        candidates: files to read, in the order of storage.
        labels: classes of the images that are reused from earlier data, by name.
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

    candidates: list[Candidate]
    labels: dict[str, int]
    bad: list[tuple[str, str]]
    classes: list[str]
    files: list[Entry]
    skipped: Iterable[tuple[Entry, str]]
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
    layout, likely, rest, readable = reading.layout, reading.images, reading.unclear, reading.readable
    bad, ignored = reading.bad, reading.ignored
    messages = [*layout.messages, *_counts(reading)]
    chosen = _chosen(likely, layout, config.max_images)
    splits_assigned = all(layout.assignments[i].split != "val" for i in chosen)
    held = _held_out(chosen, layout, config.val_fraction, any(e.part for e in readable)) if splits_assigned else set()
    names = _classes(layout, base)
    classes: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    labels: dict[str, int] = {}
    candidates = []
    for i in storage_order([assignment.key for assignment in layout.assignments], [*chosen, *rest]):
        entry, split = readable[i], layout.assignments[i].split or "train"
        label = classes.get(layout.assignments[i].label, -1)
        before = base.files.get(entry.name) if base else None
        stored = before.split if before else None
        if before is not None and before.status == "bad" and before.is_same(entry):
            bad.append((entry.name, before.reason))
        elif before is not None and before.status == "ignored" and before.is_same(entry):
            ignored[ignored_kind(entry.name)] += 1
        elif before is not None and stored and before.is_same(entry):
            labels[entry.name] = label
        elif stored:  # changed; an image that was trained on must not be held out later
            candidates.append(Candidate(entry, stored, label))
        else:
            candidates.append(Candidate(entry, "val" if i in held else split, label))
    candidates.sort(key=lambda c: c.split)  # "train" before "val", so that copies follow the training images
    used = {candidate.entry.name for candidate in candidates} | labels.keys()
    unread = [entry for entry in reading.files if entry.name not in used]
    known = list(_known_files(unread, base))
    reasons, known_names = dict(bad) | reading.left_out, {file.name for file in known}
    skipped = [(e, reasons.get(e.name, "not chosen")) for e in unread if e.name not in known_names]
    return IngestPlan(
        candidates=candidates,
        labels=labels,
        bad=bad,
        classes=names,
        files=reading.files,
        skipped=skipped,
        known=known,
        ignored=dict(ignored),
        not_chosen=len(likely) - len(chosen),
        splits_assigned=splits_assigned,
        messages=messages,
    )


def _known_files(entries: Iterable[Entry], base: Base | None) -> Iterator[File]:
    for entry in entries if base else ():
        before = base.files.get(entry.name) if base else None
        if before is not None and before.status in ("bad", "ignored") and before.is_same(entry):
            yield before


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
    files = [entry for entry in entries if not is_other_file(entry, config.max_megapixels)]
    kept = {entry.name for entry in files}
    ignored = Counter(ignored_kind(entry.name) for entry in entries if entry.name not in kept)
    if not files:
        raise no_images(source, ignored)
    bad = [(entry.name, entry.problem) for entry in files if entry.problem is not None]
    readable = [entry for entry in files if entry.problem is None]
    layout = layout_of(readable, entries, source, settings, read)
    left_out: dict[str, str] = {}
    likely: list[int] = []
    rest: list[int] = []
    for number, (entry, assignment) in enumerate(zip(readable, layout.assignments, strict=True)):
        if assignment.problem:
            left_out[entry.name] = assignment.problem
            ignored[ignored_kind(entry.name)] += 1
        elif entry.size > largest_file(config.max_megapixels):
            bad.append((entry.name, f"file of {entry.size:,} bytes"))
        else:
            (likely if may_be_image(entry.name) else rest).append(number)
    return Reading(files, readable, layout, likely, rest, bad, left_out, ignored)


def _counts(reading: Reading) -> list[str]:
    """Describe the numbers of images, and what looks odd about them, in lines."""
    named = [i for i in reading.images if is_named_as_image(reading.readable[i].name)]
    images = [reading.layout.assignments[i] for i in named or reading.images]
    lines = [*describe_counts(count_images(images)), *find_oddities(images)]
    return [*lines, f"ignored: {describe_ignored(reading.ignored)}"] if reading.ignored else lines


def layout_of(
    images: list[Entry],
    entries: Iterable[Entry],
    source: str,
    settings: LayoutSettings,
    read: Callable[[Entry], bytes] | None = None,
) -> Layout:
    """Determine the layout of a source, with the tables of labels in it.

    Args:
        images: the files that may be images.
        entries: all files.
        read: returns the content of a file; None: no table is read.
    """
    parts = [entry.part for entry in images]
    if any(parts):
        sources = split_sources(source)

        def detect(part: int, settings: LayoutSettings) -> Layout:
            of_part = [replace(entry, part=0) for entry in images if entry.part == part]
            beside = [replace(entry, part=0) for entry in entries if entry.part == part]
            return layout_of(of_part, beside, sources[part - 1], settings, read)

        return combine_layouts(parts, source, settings, detect)
    names = {entry.name for entry in images}
    others = {entry.name: entry for entry in entries if entry.name not in names and not is_ignored(entry.name)}

    def read_text(name: str) -> str | None:
        entry = others[name]
        if read is None or entry.problem is not None or entry.size > _LARGEST_TABLE:
            return None
        try:
            return read(entry).decode("utf-8-sig", "replace")
        except FileReadError:
            return None

    given = [entry.given for entry in images] if any(entry.given for entry in images) else ()
    return detect_layout([entry.name for entry in images], source, settings, list(others), read_text, given)


def no_images(source: str, ignored: dict[str, int]) -> UserError:
    """Return the error for a source without images; it names the files that were ignored."""
    others = f" (ignored: {describe_ignored(ignored)})" if ignored else ""
    return UserError(f"{source}: no images in it{others}; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")


def is_other_file(entry: Entry, max_megapixels: float) -> bool:
    """Return whether a file is ignored without reading it: nothing about it says that it is an image."""
    if is_ignored(entry.name) or is_sidecar(entry.name):
        return True
    if is_named_as_image(entry.name) or suffix(entry.name) in UNREADABLE_SUFFIXES:
        return False
    is_folder = entry.problem is not None and entry.problem.startswith("unreadable folder")
    unusable = entry.problem is not None and bool(suffix(entry.name)) and not is_folder
    return unusable or entry.size > largest_file(max_megapixels)


def largest_file(max_megapixels: float) -> float:
    """Return the size in bytes that no image file of so many pixels exceeds."""
    return max_megapixels * 1e6 * _BYTES_PER_PIXEL


def _classes(layout: Layout, base: Base | None) -> list[str]:
    """Return the names of the classes; classes of earlier data keep their numbers, which are stored in its shards."""
    known = base.manifest.classes if base else []
    return [*known, *(name for name in layout.classes if name not in known)]


def _chosen(likely: list[int], layout: Layout, count: int | None) -> list[int]:
    if count is None:
        return likely
    assignments = [layout.assignments[i] for i in likely]
    groups = [(assignment.split or "", assignment.label or "") for assignment in assignments]
    return [likely[i] for i in choose_images([assignment.key for assignment in assignments], groups, count)]


def _held_out(chosen: list[int], layout: Layout, fraction: float, several: bool) -> set[int]:
    """Choose the images to hold out; with a folder for training or several sources, among those that have a label."""
    chosen = [i for i in chosen if layout.assignments[i].split != "test"]
    if any((several or layout.assignments[i].split) and layout.assignments[i].label for i in chosen):
        chosen = [i for i in chosen if layout.assignments[i].label]
    assignments = [layout.assignments[i] for i in chosen]
    held = hold_out(
        [assignment.key for assignment in assignments], [assignment.label for assignment in assignments], fraction
    )
    return {chosen[i] for i in held}
