"""Derive the classes and splits of images from the names of their files."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from esvit_core.data.ingest.file_kinds import is_named_as_image, may_be_image
from esvit_core.errors import UserError

SplitName = Literal["train", "val", "test"]
SPLIT_FOLDERS: dict[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Assignment:
    """The split and class of a file.

    Attributes:
        key: path without the folders that all files share; determines the split of the image.
        split: None if the source has no folders for splits.
        label: name of its class; None if it has none.
        problem: why the file has no place in the layout; None: it has.
    """

    key: str
    split: SplitName | None = None
    label: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Layout:
    """The assignments of all files, in their order, and the sorted names of the classes."""

    assignments: list[Assignment]
    classes: list[str]


def detect_layout(names: Sequence[str], source: str, require_train: bool = True) -> Layout:
    """Determine the splits and classes of a source from its folders.

    The layouts are ``<class>/image``, ``{train,val|valid|validation|test}/[<class>/]image`` and ``image``. A single folder
    that contains everything is ignored. Folders below a class belong to it. ``test`` is used as ``val`` if there is no
    ``val``.

    Args:
        names: paths below the source with ``/``, without ignored files.
        source: for error messages.
        require_train: whether images to train on are required; False: folders for evaluation may stand alone.

    Raises:
        UserError: there are folders for evaluation but none to train on.
    """
    paths = [tuple(unicodedata.normalize("NFC", name).split("/")) for name in names]
    # A README beside the folders must not influence the layout.
    relevant = [p for p in paths if is_named_as_image(p[-1])] or [p for p in paths if may_be_image(p[-1])] or paths
    shared = _shared_folders(relevant)
    top = tuple(relevant[0][:shared]) if relevant else ()
    inside = [path[shared:] for path in relevant]
    folders = {path[0].casefold() for path in inside if len(path) > 1}
    known = folders & SPLIT_FOLDERS.keys()
    if require_train and known and known == folders and "train" not in known:
        raise UserError(
            f"{source}: has {' and '.join(f'{f}/' for f in sorted(known))} but no train/; "
            "expected images to train on in a folder train"
        )
    splits = ("train" in known or not require_train) and bool(known) and (len(known) > 1 or known == folders)
    depth = 1 if splits else 0
    classes = {
        path[depth] for path in inside if len(path) > depth + 1 and (not splits or path[0].casefold() in SPLIT_FOLDERS)
    }
    assignments = [_assign(path, top, splits, classes) for path in paths]
    if splits and all(assignment.split != "val" for assignment in assignments):  # evaluate on test instead
        assignments = [replace(each, split="val") if each.split == "test" else each for each in assignments]
    return Layout(assignments, sorted(classes))


def _assign(path: tuple[str, ...], top: tuple[str, ...], splits: bool, classes: set[str]) -> Assignment:
    inside = path[len(top) :] if path[: len(top)] == top and len(path) > len(top) else path
    key = "/".join(inside)
    if not splits:
        return Assignment(key, None, inside[0] if len(inside) > 1 and inside[0] in classes else None)
    split = SPLIT_FOLDERS.get(inside[0].casefold()) if len(inside) > 1 else None
    if split is None:
        return Assignment(key, problem="outside the folders train, val and test")
    return Assignment(key, split, inside[1] if len(inside) > 2 and inside[1] in classes else None)


def _shared_folders(paths: Sequence[tuple[str, ...]]) -> int:
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
