"""What becomes of each file of a source, as far as its name and the earlier data tell: decided before any is read."""

from __future__ import annotations

from dataclasses import dataclass

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import Entry
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.layout import Layout, SplitName, arrange, is_ignored, may_be_image
from esvit_core.data.ingest.split import choose, hold_out, in_order
from esvit_core.errors import UserError

_BYTES_PER_PIXEL = 8  # 16 bit RGBA: no sensible file is much larger than its pixels


@dataclass(frozen=True)
class Candidate:
    """A file that may be an image, and where it belongs if it is one."""

    entry: Entry
    split: SplitName
    label: int


@dataclass(frozen=True)
class Plan:
    """What is to be read, and what is known before anything is.

    Attributes:
        candidates: in the order of storage.
        labels: classes of the images that are taken over from earlier data, by name.
        bad: names and reasons.
        classes: names.
        files: all of the source, the ignored ones excepted, by name.
        ignored, not_chosen: files that are passed over.
        divided: the splits are ours, not the source's.
    """

    candidates: list[Candidate]
    labels: dict[str, int]
    bad: list[tuple[str, str]]
    classes: list[str]
    files: list[Entry]
    ignored: int
    not_chosen: int
    divided: bool


def plan(entries: list[Entry], source: str, config: DataConfig, base: Base | None = None) -> Plan:
    """Decide what becomes of every file of a source.

    Args:
        entries: the files.
        source: for the error's first words.
        config: the data section of the configuration.
        base: earlier data of the source, whose images are taken over; None: there are none.

    Raises:
        UserError: there are no images, or none to train on.
    """
    files = [entry for entry in entries if not is_ignored(entry.name)]
    if not files:
        raise UserError(f"{source}: no images in it; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")
    largest = config.max_megapixels * 1e6 * _BYTES_PER_PIXEL
    bad = [(entry.name, entry.problem) for entry in files if entry.problem is not None]
    sound = [entry for entry in files if entry.problem is None]
    layout = arrange([entry.name for entry in sound], source)
    likely: list[int] = []
    rest: list[int] = []
    for number, (entry, place) in enumerate(zip(sound, layout.places, strict=True)):
        problem = place.problem or (f"file of {entry.size:,} bytes" if entry.size > largest else None)
        if problem:
            bad.append((entry.name, problem))
        else:
            (likely if may_be_image(entry.name) else rest).append(number)
    chosen = _chosen(likely, layout, config.max_images)
    divided = all(layout.places[i].split is None for i in chosen)
    held = _held_out(chosen, layout, config.val_fraction) if divided else set()
    names = _classes(layout, base)
    classes: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    labels: dict[str, int] = {}
    candidates = []
    for i in in_order([place.key for place in layout.places], [*chosen, *rest]):
        entry, split = sound[i], layout.places[i].split or "train"
        label = classes.get(layout.places[i].label, -1)
        before = base.files.get(entry.name) if base else None
        stored = before.split if before else None
        if before is not None and before.fate == "bad" and before.is_same(entry):
            bad.append((entry.name, before.reason))
        elif before is not None and stored and before.is_same(entry):
            labels[entry.name] = label
        elif stored:  # changed: what was trained on is never held out
            candidates.append(Candidate(entry, stored, label))
        else:
            candidates.append(Candidate(entry, "val" if i in held else split, label))
    candidates.sort(key=lambda c: c.split)  # "train" comes before "val": see _settle
    return Plan(
        candidates=candidates,
        labels=labels,
        bad=bad,
        classes=names,
        files=files,
        ignored=len(entries) - len(files),
        not_chosen=len(likely) - len(chosen),
        divided=divided,
    )


def _classes(layout: Layout, base: Base | None) -> list[str]:
    """The classes: those of earlier data keep their numbers, for these are in its shards."""
    known = base.manifest.classes if base else []
    return [*known, *(name for name in layout.classes if name not in known)]


def _chosen(likely: list[int], layout: Layout, count: int | None) -> list[int]:
    if count is None:
        return likely
    places = [layout.places[i] for i in likely]
    groups = [(place.split or "", place.label or "") for place in places]
    return [likely[i] for i in choose([place.key for place in places], groups, count)]


def _held_out(chosen: list[int], layout: Layout, fraction: float) -> set[int]:
    places = [layout.places[i] for i in chosen]
    held = hold_out([place.key for place in places], [place.label for place in places], fraction)
    return {chosen[i] for i in held}
