"""What the names of files say: which are images, which class and which split they belong to."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from esvit_core.errors import UserError

SplitName = Literal["train", "val", "test"]
SPLIT_FOLDERS: dict[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_IMAGE_ENDINGS = "jpg jpeg jpe jfif mpo png gif webp bmp dib tif tiff ppm pgm pbm pnm jp2 j2k avif"
IMAGE_SUFFIXES = frozenset(f".{ending}" for ending in _IMAGE_ENDINGS.split())
_LEFT_BY_SYSTEMS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"})


@dataclass(frozen=True)
class Place:
    """Where a file belongs.

    Attributes:
        key: path without what all files share; what its fate is decided by.
        split: None where the source has no folders for splits.
        label: name of its class; None where it has none.
        problem: why it belongs nowhere; None: it does.
    """

    key: str
    split: SplitName | None = None
    label: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Layout:
    """The places of all files, in their order, and the classes by name."""

    places: list[Place]
    classes: list[str]


def is_ignored(name: str) -> bool:
    """Whether a file is one that operating systems leave about, or a hidden one."""
    return any(
        (part.startswith(".") and part != "..") or part.casefold() in _LEFT_BY_SYSTEMS for part in name.split("/")
    )


def suffix(name: str) -> str:
    """``.jpg`` of ``a/b.JPG``; empty where there is none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def is_named_as_image(name: str) -> bool:
    """Whether the name ends as those of images do."""
    return suffix(name) in IMAGE_SUFFIXES


def may_be_image(name: str) -> bool:
    """The same, or it ends in no way at all: then only its content tells."""
    return suffix(name) in IMAGE_SUFFIXES or not suffix(name)


def arrange(names: Sequence[str], source: str, to_train_on: bool = True) -> Layout:
    """Find the splits and classes of a source in its folders.

    The layouts are ``<class>/image``, ``{train,val|valid|validation|test}/[<class>/]image`` and ``image``. One
    folder that holds everything is looked through. Folders below a class belong to it. ``test`` is the split ``val``
    where there is no other.

    Args:
        names: paths below the source with ``/``, without the ignored ones.
        source: for the error's first words.
        to_train_on: images to train on are wanted; False: folders to measure on may stand alone.

    Raises:
        UserError: there are folders to measure on but none to train on.
    """
    paths = [tuple(unicodedata.normalize("NFC", name).split("/")) for name in names]
    # A README beside the folders says nothing about the layout.
    telling = [p for p in paths if is_named_as_image(p[-1])] or [p for p in paths if may_be_image(p[-1])] or paths
    shared = _shared_folders(telling)
    top = tuple(telling[0][:shared]) if telling else ()
    inside = [path[shared:] for path in telling]
    folders = {path[0].casefold() for path in inside if len(path) > 1}
    known = folders & SPLIT_FOLDERS.keys()
    if to_train_on and known and known == folders and "train" not in known:
        raise UserError(
            f"{source}: has {' and '.join(f'{f}/' for f in sorted(known))} but no train/; "
            "expected images to train on in a folder train"
        )
    splits = ("train" in known or not to_train_on) and bool(known) and (len(known) > 1 or known == folders)
    depth = 1 if splits else 0
    classes = {
        path[depth] for path in inside if len(path) > depth + 1 and (not splits or path[0].casefold() in SPLIT_FOLDERS)
    }
    places = [_place(path, top, splits, classes) for path in paths]
    if splits and not any(place.split == "val" for place in places):  # what is there to measure on is measured on
        places = [replace(place, split="val") if place.split == "test" else place for place in places]
    return Layout(places, sorted(classes))


def _place(path: tuple[str, ...], top: tuple[str, ...], splits: bool, classes: set[str]) -> Place:
    inside = path[len(top) :] if path[: len(top)] == top and len(path) > len(top) else path
    key = "/".join(inside)
    if not splits:
        return Place(key, None, inside[0] if len(inside) > 1 and inside[0] in classes else None)
    split = SPLIT_FOLDERS.get(inside[0].casefold()) if len(inside) > 1 else None
    if split is None:
        return Place(key, problem="outside the folders train, val and test")
    return Place(key, split, inside[1] if len(inside) > 2 and inside[1] in classes else None)


def _shared_folders(paths: Sequence[tuple[str, ...]]) -> int:
    """Number of leading folders that hold everything, ``train`` excepted."""
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
