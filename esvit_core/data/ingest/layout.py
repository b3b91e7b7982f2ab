"""Derive the classes and splits of images from the names of their files."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from esvit_core.data.ingest.class_folders import (
    Classes,
    classes_as_set,
    find_classes,
    is_annotation_folder,
    is_container,
)
from esvit_core.data.ingest.entries import Given
from esvit_core.data.ingest.file_kinds import is_named_as_image, may_be_image
from esvit_core.data.ingest.label_tables import labels_of_tables
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
class Assignment:
    """The split and class of a file.

    Attributes:
        key: path without the folders that all files share; determines the split of the image.
        split: as it is used; None if the source has no folders for splits.
        source_split: as the source names it: its test images are used as ``val`` if there are no others to measure.
        label: name of its class; None if it has none.
        problem: why the file has no place in the layout; None: it has.
    """

    key: str
    split: SplitName | None = None
    label: str | None = None
    problem: str | None = None
    source_split: SplitName | None = None


@dataclass(frozen=True)
class Layout:
    """How the folders of a source were understood.

    Attributes:
        assignments: of all files, in their order.
        classes: sorted names of the classes.
        messages: how the source was understood, in lines for the user.
    """

    assignments: list[Assignment]
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


def detect_layout(
    names: Sequence[str],
    source: str,
    settings: LayoutSettings | None = None,
    others: Sequence[str] = (),
    read_text: Callable[[str], str | None] | None = None,
    given: Sequence[Given | None] = (),
) -> Layout:
    """Determine the splits and classes of a source from its folders.

    ``docs/data.md`` lists the layouts. A layout that is not known is read as unlabelled, and a message says so.

    Args:
        names: paths below the source with ``/``, without ignored files.
        source: for error messages.
        settings: None: everything is detected.
        others: paths of the files that are no images; they show which folders hold annotations.
        read_text: returns the text of one of the others, which may be a table of labels; None if it is too large.
        given: what the source itself says about each of the images; empty: nothing.

    Raises:
        UserError: there are folders for evaluation but none to train on, or the settings do not fit the source.
    """
    settings = settings or LayoutSettings()
    paths = [tuple(unicodedata.normalize("NFC", name).split("/")) for name in names]
    # A README beside the folders must not influence the layout.
    relevant = [p for p in paths if is_named_as_image(p[-1])] or [p for p in paths if may_be_image(p[-1])] or paths
    counts = Counter(path[:-1] for path in relevant)
    siblings = _folders_by_parent([*counts, *(tuple(name.split("/")[:-1]) for name in others)])
    with_images = _folders_by_parent(counts)
    masks = {folders for folders in counts if _is_of_annotations(folders, siblings)}
    if len(masks) == len(counts):
        masks = set()
    counts = Counter({folders: count for folders, count in counts.items() if folders not in masks})
    shared = _shared_folders([path for path in relevant if path[:-1] not in masks])
    top = relevant[0][:0] if not counts else next(iter(counts))[:shared]
    chains = {
        folders: _without_containers(folders, shared, with_images, siblings)
        for folders in {path[:-1] for path in paths}
        if folders[:shared] == top
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
    found: list[Assignment] = []
    for path in paths:
        folders = path[:-1]
        key = "/".join(path[shared:] if folders[:shared] == top else path)
        chain = chains.get(folders)
        if _is_of_annotations(folders, siblings) and masks:
            found.append(Assignment(key, problem=ANNOTATION))
        elif roles and (chain is None or roles.get(chain) is None):
            found.append(Assignment(key, problem=OUTSIDE))
        else:
            role = roles.get(chain) if chain is not None else None
            label = classes.label(below[chain]) if chain in considered and role != "extra" else None
            found.append(Assignment(key, "train" if role == "extra" else role, label))
    if any(given):
        found, classes = _with_given(found, classes, given, settings)
    return _finish(paths, found, classes, settings, messages, others, read_text, source)


def _with_given(
    found: list[Assignment], classes: Classes, given: Sequence[Given | None], settings: LayoutSettings
) -> tuple[list[Assignment], Classes]:
    """Apply the labels and splits that the source itself states, unless the settings say otherwise."""
    if settings.splits == "auto" and any(each and each.split for each in given):
        found = [
            replace(each, split=says.split or each.split, problem=None) if says else each
            for each, says in zip(found, given, strict=True)
        ]
    if settings.labels == "auto" and any(each and each.label for each in given):
        found = [replace(each, label=says.label if says else None) for each, says in zip(found, given, strict=True)]
        classes = replace(classes, message="labels: those that the source states")
    return found, classes


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


def _finish(
    paths: list[Folders],
    found: list[Assignment],
    classes: Classes,
    settings: LayoutSettings,
    messages: list[str],
    others: Sequence[str],
    read_text: Callable[[str], str | None] | None,
    source: str,
) -> Layout:
    """Take labels from tables where folders give none, and decide which split is measured."""
    message = classes.message
    if settings.labels == "csv" or (settings.labels == "auto" and any(each.label for each in found)):
        wanted = [i for i, each in enumerate(found) if each.problem is None and _lacks_label(each, settings)]
        known = {each.label for each in found if each.label} if settings.labels == "auto" else None
        tables = labels_of_tables(wanted, paths, others, read_text, known) if wanted else None
        if settings.labels == "csv":
            if tables is None:
                raise UserError(
                    f"{source}: data.labels is csv, but no .csv, .tsv or .txt file in it names the images and their "
                    "labels; expected the columns file and label, and optionally split"
                )
            found = [replace(each, label=None) for each in found]
            message = f"labels: {tables.file}"
        if tables is not None:
            for i, (label, split) in tables.rows.items():
                found[i] = replace(found[i], label=label, split=split or found[i].split)
            if settings.labels == "auto":
                messages.append(f"labels of {len(tables.rows):,} held-out images: {tables.file}")
    found, more = (found, []) if settings.is_part else measured_split(found)
    messages = [*messages, message, *more]
    for problem in (OUTSIDE, ANNOTATION):
        names = [
            "/".join(path)
            for path, each in zip(paths, found, strict=True)
            if each.problem == problem and is_named_as_image(path[-1])
        ]
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            hint = "; data.splits says which folders to use" if problem == OUTSIDE else ""
            messages.append(
                f"left out: {len(names):,} {'image' if len(names) == 1 else 'images'} {problem} ({shown}){hint}"
            )
    return Layout(found, sorted({each.label for each in found if each.label}), messages)


def _lacks_label(assignment: Assignment, settings: LayoutSettings) -> bool:
    return settings.labels == "csv" or (assignment.split in ("val", "test") and assignment.label is None)


def measured_split(found: list[Assignment]) -> tuple[list[Assignment], list[str]]:
    """Make ``val`` the split that is measured: the test images if there is no other.

    Held-out images without labels beside labelled training images cannot be measured. They stay apart, as ``test``.
    """
    held_out: tuple[SplitName, ...] = ("val", "test")
    sizes = Counter(each.split for each in found)
    labelled = {each.split for each in found if each.label}
    apart = {split for split in held_out if sizes[split] and "train" in labelled and split not in labelled}
    messages = [
        f"the {sizes[split]:,} {split} images have no labels: they are kept apart and not used" for split in apart
    ]
    moved: dict[SplitName | None, SplitName] = {split: "test" for split in held_out if split in apart}
    if sizes["test"] and "test" not in apart and (not sizes["val"] or "val" in apart):
        moved["test"] = "val"
        messages.append("there are no validation images: the test images are held out for evaluation")
    return [replace(e, split=moved.get(e.split, e.split), source_split=e.split) for e in found], messages


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
            beside = {other for other in siblings[folders[:i]] if not is_annotation_folder(other)}
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
        folder = first[shared] if len(first) > shared + 1 else None
        if folder is None or folder.casefold() == "train":
            break
        if not all(len(p) > shared + 1 and p[shared] == folder for p in paths):
            break
        shared += 1
    return shared
