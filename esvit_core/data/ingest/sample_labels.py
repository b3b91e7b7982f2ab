"""Labels in archives of samples, in WebDataset's naming: ``000017.jpg`` beside ``000017.cls`` or ``000017.json``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from esvit_core.data.ingest.archives import Entry, FileReadError, Given
from esvit_core.data.ingest.file_kinds import is_ignored, is_named_as_image, suffix

_LABEL_KEYS = ("label", "cls", "class", "class_name", "classname", "class_id", "category", "target")
_PROBED = 20  # .json files that must all hold a label
_LARGEST_JSON = 2**20  # bytes


def with_sample_labels(entries: list[Entry], read: Callable[[Entry], bytes]) -> list[Entry]:
    """Return the entries of an archive with the labels that lie beside its images; unchanged if there are none.

    A sample is all files whose names are the same up to the first dot. If one of them is ``<key>.<suffix of an image>``,
    its other images (``000017.seg.png``) are masks and the like, and are left out.

    Args:
        entries: the files of the archive.
        read: returns the content of a file.
    """
    labels: dict[str, dict[str, Entry]] = {".cls": {}, ".json": {}}
    images: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        ending = suffix(entry.name)
        if ending in labels and not is_ignored(entry.name) and entry.problem is None:
            labels[ending][_key(entry.name)] = entry
        elif is_named_as_image(entry.name):
            images[_key(entry.name)].append(entry)
    found: dict[str, str] = {}
    if any(key in images for key in labels[".cls"]):
        found = {
            key: text for key, entry in labels[".cls"].items() if key in images and (text := _read_text(entry, read))
        }
    else:
        pairs = [(key, entry) for key, entry in sorted(labels[".json"].items()) if key in images]
        probed = [_json_label(entry, read) for _, entry in pairs[:_PROBED]]
        if probed and all(label is not None for label in probed):
            found = {key: label for key, entry in pairs if (label := _json_label(entry, read)) is not None}
    if not found:
        return entries
    others = {
        entry.name
        for key, group in images.items()
        if any(_is_simple(entry.name, key) for entry in group)
        for entry in group
        if not _is_simple(entry.name, key)
    }
    return [
        replace(entry, given=Given(found.get(_key(entry.name)))) if is_named_as_image(entry.name) else entry
        for entry in entries
        if entry.name not in others
    ]


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
