"""Derive the classes and splits of images from the names of their files."""

from __future__ import annotations

import itertools
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from esvit_core.data.ingest.assignments import (
    Assignment,
    Assignments,
    Place,
    labels_in_use,
    measured_split,
)
from esvit_core.data.ingest.class_folders import (
    Classes,
    classes_as_set,
    find_classes,
    is_annotation_folder,
    is_container,
)
from esvit_core.data.ingest.entries import Given
from esvit_core.data.ingest.file_kinds import is_named_as_image, may_be_image
from esvit_core.data.ingest.label_tables import ReadTexts, Tables, labels_of_tables, mention_tables
from esvit_core.data.ingest.number_arrays import fit_numbers, iterate, numbers_where, translate
from esvit_core.data.ingest.split_folders import (
    Folders,
    Role,
    SplitFolders,
    SplitName,
    assigned_split_folders,
    find_split_folders,
    folder_role,
    word_role,
)
from esvit_core.errors import UserError

OUTSIDE = "outside the folders of the splits"
ANNOTATION = "in a folder of masks or labels beside images"


@dataclass(frozen=True)
class Layout:
    """How the folders of a source were understood.

    Attributes:
        assignments: of all files, in their order.
        classes: sorted names of the classes.
        messages: how the source was understood, in lines for the user.
    """

    assignments: Assignments
    classes: list[str]
    messages: list[str]


@dataclass(frozen=True)
class LayoutSettings:
    """How a source is to be understood; see ``data.labels`` and ``data.splits``.

    Attributes:
        labels: ``auto``, ``none``, ``folder``, ``depth:N`` or ``csv``.
        splits: ``auto``, ``none``, or the split of each folder.
        require_train: whether images to train on are required; False: folders for evaluation may stand alone.
        is_part: whether the source is one of several, so that others may have what it lacks.
    """

    labels: str = "auto"
    splits: Literal["auto", "none"] | Mapping[str, SplitName] = "auto"
    require_train: bool = True
    is_part: bool = False


@dataclass(frozen=True)
class _Folder:
    """The files of a folder, or those of a folder of which the source says the same.

    Attributes:
        folders: its path.
        given: what the source says about them.
        files: number of files; named: of those that are named as images; likely: of those that have no suffix, too.
    """

    folders: Folders
    given: Given | None
    files: int
    named: int
    likely: int


def detect_layout(
    names: Sequence[str],
    source: str,
    settings: LayoutSettings | None = None,
    others: Iterable[str] = (),
    read_texts: ReadTexts | None = None,
    given: Iterable[Given | None] = (),
) -> Layout:
    """Determine the splits and classes of a source from its folders.

    ``docs/data.md`` lists the layouts. A layout that is not known is read as unlabelled, and a message says so.

    Args:
        names: paths below the source with ``/``, without ignored files.
        source: for error messages.
        settings: None: everything is detected.
        others: paths of the files that are no images; they show which folders hold annotations.
        read_texts: yields the names and texts of some of the others, which may be tables of labels.
        given: what the source itself says about each of the images; empty: nothing.

    Raises:
        UserError: there are folders for evaluation but none to train on, or the settings do not fit the source.
    """
    settings = settings or LayoutSettings()
    numbers, found = _folders_of(names, given)
    # A README beside the folders must not influence the layout.
    counts = _sum(found, lambda each: each.named) or _sum(found, lambda each: each.likely)
    counts = counts or _sum(found, lambda each: each.files)
    siblings = _folders_by_parent([*counts, *{tuple(name.split("/")[:-1]) for name in others}])
    with_images = _folders_by_parent(counts)
    masks = {folders for folders in counts if _is_of_annotations(folders, siblings)}
    if len(masks) == len(counts):
        masks = set()
    counts = Counter({folders: count for folders, count in counts.items() if folders not in masks})
    shared = _shared_folders([*counts])
    top = next(iter(counts), ())[:shared]
    chains = {
        each.folders: _without_containers(each.folders, shared, with_images, siblings)
        for each in found
        if each.folders[:shared] == top
    }
    considered = {chains[folders] for folders in counts}
    roles, below, messages = _splits(sorted(considered), source, settings)
    training: Counter[Folders] = Counter()
    for folders, count in counts.items():
        if not roles or roles.get(chains[folders]) == "train":
            training[below[chains[folders]]] += count
    if not training:
        training.update({below[chains[folders]]: count for folders, count in counts.items()})
    classes = find_classes(training) if settings.labels in ("auto", "csv") else classes_as_set(settings.labels)
    places: list[Place] = []
    for each in found:
        chain = chains.get(each.folders)
        cut = shared if each.folders[:shared] == top else 0
        if masks and _is_of_annotations(each.folders, siblings):
            places.append(Place(Assignment("", problem=ANNOTATION), cut))
        elif roles and (chain is None or roles.get(chain) is None):
            places.append(Place(Assignment("", problem=OUTSIDE), cut))
        else:
            role = roles.get(chain) if chain is not None else None
            label = classes.label(below[chain]) if chain in considered and role != "extra" else None
            places.append(Place(Assignment("", "train" if role == "extra" else role, label), cut))
    if any(each.given for each in found):
        places, classes = _with_given(places, classes, [each.given for each in found], settings)
    message, tables = classes.message, None
    assignments = Assignments(names, numbers, places)
    if settings.labels == "csv" or (settings.labels == "auto" and any(place.assignment.label for place in places)):
        assignments, tables = _with_tables(assignments, settings, others, read_texts, source)
        if settings.labels == "csv" and tables is not None:
            message = f"labels: {tables.file}"
        elif tables is not None:
            messages.append(f"labels of {len(tables.rows):,} held-out images: {tables.file}")
    more: list[str] = []
    if not settings.is_part:
        assignments, more = measured_split(assignments)
    labels = labels_in_use(assignments)
    hints = mention_tables(others) if settings.labels == "auto" and not labels else []
    messages = [*messages, message, *hints, *more, *_left_out(assignments, found)]
    return Layout(assignments, labels, messages)


def _folders_of(names: Sequence[str], given: Iterable[Given | None]) -> tuple[np.ndarray, list[_Folder]]:
    """Return the number of the folder of each file, (N,) of integers, and the folders."""
    known: dict[tuple[str, Given | None], int] = {}
    numbers = np.empty(len(names), dtype=np.int32)
    files, named, likely = array("Q"), array("Q"), array("Q")
    for i, (name, says) in enumerate(zip(names, given or itertools.repeat(None), strict=False)):
        path = unicodedata.normalize("NFC", name)
        above = path[: path.rfind("/") + 1]
        number = known.setdefault((above, says), len(known))
        if number == len(files):
            files.append(0)
            named.append(0)
            likely.append(0)
        numbers[i] = number
        files[number] += 1
        if is_named_as_image(path):
            named[number] += 1
        elif may_be_image(path):
            likely[number] += 1
    return fit_numbers(numbers, len(known)), [
        _Folder(tuple(above.split("/")[:-1]), says, files[n], named[n], named[n] + likely[n])
        for (above, says), n in known.items()
    ]


def _sum(found: Iterable[_Folder], count: Callable[[_Folder], int]) -> Counter[Folders]:
    """Return the number of files of each folder that has some."""
    counts: Counter[Folders] = Counter()
    for each in found:
        if count(each):
            counts[each.folders] += count(each)
    return counts


def _with_given(
    places: list[Place], classes: Classes, given: Sequence[Given | None], settings: LayoutSettings
) -> tuple[list[Place], Classes]:
    """Apply the labels and splits that the source itself states, unless the settings say otherwise."""
    if settings.splits == "auto" and any(each and each.split for each in given):
        places = [
            place.change(split=says.split or place.assignment.split, problem=None) if says else place
            for place, says in zip(places, given, strict=True)
        ]
    if settings.labels == "auto" and any(each and each.label for each in given):
        places = [place.change(label=says.label if says else None) for place, says in zip(places, given, strict=True)]
        classes = replace(classes, message="labels: those that the source states")
    return places, classes


def _splits(
    chains: list[Folders], source: str, settings: LayoutSettings
) -> tuple[dict[Folders, Role], dict[Folders, Folders], list[str]]:
    """Return the role of each folder, the folders without those of the splits, and messages."""
    if not isinstance(settings.splits, str):
        given = dict(assigned_split_folders(settings.splits, chains))
        if not given and settings.is_part:
            return {}, {chain: chain for chain in chains}, []
        if not given:
            names = ", ".join(sorted({"/".join(chain) for chain in chains if chain})[:3]) or "none"
            raise UserError(f"{source}: data.splits matches none of its folders; it has {names}")
        patterns = tuple(settings.splits)
        below = {chain: tuple(part for part in chain if not _is_named(part, patterns)) for chain in chains}
        return (
            given,
            below,
            [f"splits: as data.splits says ({', '.join(f'{k}: {v}' for k, v in settings.splits.items())})"],
        )
    split_folders = find_split_folders(chains, settings.require_train)
    if split_folders is None:
        _require_training_folder(chains, source, settings)
        return {}, {chain: chain for chain in chains}, []
    below = {chain: split_folders.below(chain) if split_folders.of(chain) else chain for chain in chains}
    if settings.splits == "none":
        return {}, below, ["splits: none, as data.splits says"]
    found = {chain: role for chain in chains if (role := split_folders.of(chain))}
    return found, below, [_describe_splits(split_folders)]


def _is_named(part: str, patterns: Sequence[str]) -> bool:
    return bool(assigned_split_folders(dict.fromkeys(patterns, "train"), [(part,)]))


def _describe_splits(split_folders: SplitFolders) -> str:
    roles: dict[str, list[str]] = {}
    for name, role in sorted(split_folders.roles.items()):
        roles.setdefault(role, []).append(f"{name}/")
    words = {"extra": "train without labels"}
    return "splits: " + ", ".join(
        f"{words.get(role, role)} from {' and '.join(names)}" for role, names in roles.items()
    )


def _require_training_folder(chains: list[Folders], source: str, settings: LayoutSettings) -> None:
    """Raise an error if all folders are for evaluation."""
    tops = {chain[0] for chain in chains if chain}
    if len(tops) and all(folder_role(top) in ("val", "test") for top in tops) and settings.require_train:
        raise UserError(
            f"{source}: has {' and '.join(f'{f}/' for f in sorted(tops))} but no train/; "
            "expected images to train on in a folder train, or data.splits=none"
        )


def _with_tables(
    assignments: Assignments,
    settings: LayoutSettings,
    others: Iterable[str],
    read_texts: ReadTexts | None,
    source: str,
) -> tuple[Assignments, Tables | None]:
    """Take labels from tables where folders give none."""
    places, every = assignments.places, settings.labels == "csv"
    lacks = np.array([place.assignment.problem is None and (every or _lacks_label(place)) for place in places], bool)
    wanted = numbers_where(translate(assignments.numbers, lacks))
    known = None if every else {place.assignment.label for place in places if place.assignment.label}
    tables = labels_of_tables(wanted, assignments.names, others, read_texts, known) if len(wanted) else None
    if every:
        if tables is None:
            raise UserError(
                f"{source}: data.labels is csv, but no .csv, .tsv or .txt file in it names the images and their "
                "labels; expected the columns file and label, and optionally split"
            )
        places = [place.change(label=None) for place in places]
    if tables is None:
        return assignments, None
    changed: dict[Place, int] = {}
    numbers = fit_numbers(assignments.numbers, len(places) + len(tables.rows))
    for i, (label, split) in tables.rows.items():
        place = places[numbers[i]]
        place = place.change(label=label, split=split or place.assignment.split)
        numbers[i] = changed.setdefault(place, len(places) + len(changed))
    return Assignments(assignments.names, numbers, [*places, *changed]), tables


def _lacks_label(place: Place) -> bool:
    return place.assignment.split in ("val", "test") and place.assignment.label is None


def _left_out(assignments: Assignments, found: Sequence[_Folder]) -> list[str]:
    """Describe the images that have no place in the layout, in lines."""
    messages = []
    for problem in (OUTSIDE, ANNOTATION):
        concerned = [place.assignment.problem == problem for place in assignments.places]
        count = sum(each.named for each, concerns in zip(found, concerned, strict=False) if concerns)
        if not count:
            continue
        names = (name for name, n in zip(assignments.names, iterate(assignments.numbers), strict=True) if concerned[n])
        paths = (unicodedata.normalize("NFC", name) for name in names)
        shown = ", ".join(itertools.islice(filter(is_named_as_image, paths), 3)) + (", ..." if count > 3 else "")
        hint = "; data.splits says which folders to use" if problem == OUTSIDE else ""
        messages.append(f"left out: {count:,} {'image' if count == 1 else 'images'} {problem} ({shown}){hint}")
    return messages


def _folders_by_parent(folders: object) -> dict[Folders, set[str]]:
    """Return the names of the folders in each folder."""
    children: dict[Folders, set[str]] = {}
    for path in set(folders):  # type: ignore[call-overload]
        for i, name in enumerate(path):
            children.setdefault(path[:i], set()).add(name)
    return children


def _is_of_annotations(folders: Folders, siblings: Mapping[Folders, set[str]]) -> bool:
    """Return whether a folder holds masks or labels: its name says so, and images or splits lie beside it."""
    for i, name in enumerate(folders):
        if is_annotation_folder(name):
            beside = {other for other in siblings.get(folders[:i], ()) if not is_annotation_folder(other)}
            if any(is_container(other) or word_role(other) for other in beside):
                return True
    return False


def _without_containers(
    folders: Folders, shared: int, with_images: Mapping[Folders, set[str]], siblings: Mapping[Folders, set[str]]
) -> Folders:
    """Return the folders below the shared ones without those that say nothing, such as ``images``.

    A folder with annotations beside its images is a data set and no class: ``VOC2007/JPEGImages``, ``VOC2007/Annotations``.
    """
    kept: list[str] = []
    for i in range(shared, len(folders)):
        beside = with_images.get(folders[:i], {folders[i]})
        others = siblings.get(folders[:i], set())
        if is_container(folders[i]) and all(is_container(o) or is_annotation_folder(o) for o in beside):
            if kept and any(is_annotation_folder(other) for other in others) and word_role(kept[-1]) is None:
                kept.pop()
            continue
        kept.append(folders[i])
    return tuple(kept)


def _shared_folders(paths: Sequence[Folders]) -> int:
    """Return the number of leading folders that contain everything, ``train`` excepted."""
    shared = 0
    while paths:
        first = paths[0]
        folder = first[shared] if len(first) > shared else None
        if folder is None or folder.casefold() == "train":
            break
        if not all(len(p) > shared and p[shared] == folder for p in paths):
            break
        shared += 1
    return shared
