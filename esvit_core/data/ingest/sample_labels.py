"""Labels in archives of samples, in WebDataset's naming: ``000017.jpg`` beside ``000017.cls`` or ``000017.json``."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.disk_rows import DiskRows, Row, sort_rows
from esvit_core.data.ingest.entries import Entries, Entry, Given
from esvit_core.data.ingest.file_kinds import is_ignored, is_named_as_image, suffix

_LABEL_KEYS = ("label", "cls", "class", "class_name", "classname", "class_id", "category", "target")
_PROBED = 20  # .json files that must all hold a label
_LARGEST_JSON = 2**20  # bytes


@dataclass(frozen=True)
class _Sample:
    """The files of a sample, as their numbers among the entries.

    Attributes:
        images: its images.
        masks: those of its images that are left out, because there is one with the sample's own name.
        labels: the files that may hold its label, by their suffix.
    """

    images: array[int] = field(default_factory=lambda: array("Q"))
    masks: array[int] = field(default_factory=lambda: array("Q"))
    labels: dict[str, int] = field(default_factory=dict)


def with_sample_labels(entries: Entries, read: Callable[[Entry], bytes]) -> Entries:
    """Return the entries of an archive with the labels that lie beside its images; unchanged if there are none.

    A sample is all files whose names are the same up to the first dot. If one of them is ``<key>.<suffix of an image>``,
    its other images (``000017.seg.png``) are masks and the like, and are left out.

    Args:
        entries: the files of the archive.
        read: returns the content of a file.
    """
    if not any(suffix(name) in (".cls", ".json") and not is_ignored(name) for name in entries.names()):
        return entries
    rows = DiskRows(sort_rows(_files_by_sample(entries)))
    if any(".cls" in sample.labels for sample in _samples(rows)):
        labels = (
            (s, _read_text(entries[s.labels[".cls"]], read) or None) for s in _samples(rows) if ".cls" in s.labels
        )
    else:
        described = (sample for sample in _samples(rows) if ".json" in sample.labels)
        probed = [_json_label(entries[s.labels[".json"]], read) for s in itertools.islice(described, _PROBED)]
        if not probed or any(label is None for label in probed):
            return entries
        labels = ((s, _json_label(entries[s.labels[".json"]], read)) for s in _samples(rows) if ".json" in s.labels)
    numbers: dict[str, int] = {}  # of the labels
    label_of = np.full(len(entries), -1, dtype=np.int32)
    for sample, label in labels:
        if label is not None:
            label_of[sample.images] = numbers.setdefault(label, len(numbers))
    if not numbers:
        return entries
    left_out = np.zeros(len(entries), dtype=bool)
    for sample in _samples(rows):
        left_out[sample.masks] = True
    names: list[str | None] = [*numbers, None]
    return Entries(
        replace(entry, given=Given(names[label_of[number]])) if is_named_as_image(entry.name) else entry
        for number, entry in enumerate(entries)
        if not left_out[number]
    )


def _files_by_sample(entries: Entries) -> Iterator[Row]:
    """Yield the key of the sample, the number, and the kind of each image and each label: a suffix, or ``mask``."""
    for number, entry in enumerate(entries):
        ending, key = suffix(entry.name), _key(entry.name)
        if ending in (".cls", ".json") and not is_ignored(entry.name) and entry.problem is None:
            yield key, number, ending
        elif is_named_as_image(entry.name):
            yield key, number, "image" if _is_simple(entry.name, key) else "mask"


def _samples(rows: Iterable[Row]) -> Iterator[_Sample]:
    """Yield the samples that have images, in the order of their keys."""
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        sample = _Sample()
        for _, number, kind in group:
            if kind == "mask":
                sample.masks.append(number)
            elif kind == "image":
                sample.images.append(number)
            else:
                sample.labels[kind] = number
        if sample.images:
            yield sample
        elif sample.masks:  # none has the sample's own name, so all of them are its images
            yield _Sample(sample.masks, labels=sample.labels)


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _is_simple(name: str, key: str) -> bool:
    return name == f"{key}.{name.rpartition('.')[2]}"


def _read_text(entry: Entry, read: Callable[[Entry], bytes]) -> str:
    try:
        return read(entry).decode("utf-8", "replace").strip() if entry.size <= _LARGEST_JSON else ""
    except FileReadError:
        return ""


def _json_label(entry: Entry, read: Callable[[Entry], bytes]) -> str | None:
    try:
        values = json.loads(_read_text(entry, read))
    except ValueError:
        return None
    if isinstance(values, int | str) and not isinstance(values, bool):
        return str(values)
    if not isinstance(values, dict):
        return None
    known = {str(key).casefold(): value for key, value in values.items()}
    for key in _LABEL_KEYS:
        if isinstance(value := known.get(key), int | str) and not isinstance(value, bool) and value != "":
            return str(value)
    return None
