"""Decide which folders are classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Folders = tuple[str, ...]
# Folders that hold the images of a data set or a class, beside or instead of other folders.
CONTAINERS = frozenset(
    ["images", "image", "img", "imgs", "jpegimages", "photos", "pictures", "rgb", "leftimg8bit", "jpg", "jpeg", "png"]
)
_ANNOTATIONS = frozenset(
    [
        "annotations",
        "annotation",
        "labels",
        "label",
        "masks",
        "mask",
        "trimaps",
        "trimap",
        "segmentation",
        "segmentations",
        "segmentationclass",
        "segmentationobject",
        "segmentationclassaug",
        "groundtruth",
        "ground_truth",
        "gt",
        "gtfine",
        "gtcoarse",
        "bboxes",
        "boxes",
    ]
)
_ANNOTATION_WORDS = frozenset(["annotations", "annotation", "labels", "masks", "mask", "segmentation"])
_YEAR = r"(19|20)\d\d"
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_DATE = re.compile(
    rf"{_YEAR}"  # 2019
    rf"|{_YEAR}([-_. ](0?[1-9]|1[0-2])|(0[1-9]|1[0-2]))(?!\d)\D*"  # 2019-5, 201905__, 2019_05 Rome
    rf"|{_YEAR}[-_. ]?(0[1-9]|1[0-2])[-_. ]?(0[1-9]|[12]\d|3[01])(?!\d).*"  # 2019-05-12, 20190512 Rome
    rf"|(0?[1-9]|[12]\d|3[01])[-_. ](0?[1-9]|1[0-2])[-_. ]{_YEAR}"  # 12.05.2019
    rf"|photos from {_YEAR}"  # Google Takeout
    r"|\d{3}([a-z_]{5}|_\d{4})"  # 100APPLE, 101CANON: folders of cameras
)
_DEVICE = frozenset(
    [
        "camera",
        "screenshots",
        "screenshot",
        "download",
        "downloads",
        "dcim",
        "whatsapp",
        "telegram",
        "instagram",
        "snapchat",
        "facebook",
        "pictures",
        "videos",
        "restored",
        "edited",
        "bluetooth",
    ]
)
_FEW_IMAGES, _MANY_FOLDERS = 2, 50  # folders that hold fewer images on average, if there are that many, are no classes


@dataclass(frozen=True)
class Classes:
    """How the class of an image follows from its folders.

    Attributes:
        label: returns the name of the class; None: it has none.
        message: how the folders were understood.
    """

    label: Callable[[Folders], str | None]
    message: str


def is_annotation_folder(name: str) -> bool:
    """Return whether a folder is named as one of masks or labels, which are no images to train on."""
    words = re.findall(r"[a-z]+", name.casefold())
    return name.casefold() in _ANNOTATIONS or (bool(words) and words[-1] in _ANNOTATION_WORDS)


def is_container(name: str) -> bool:
    """Return whether a folder only says that it holds images."""
    return name.casefold() in CONTAINERS


def classes_as_set(labels: str) -> Classes:
    """Return the classes for a value of ``data.labels`` other than ``auto`` and ``csv``."""
    if labels == "none":
        return Classes(lambda folders: None, "labels: none, as data.labels says")
    if labels == "folder":
        return Classes(lambda folders: folders[-1] if folders else None, "labels: the folder of each image")
    depth = int(labels.removeprefix("depth:"))
    return Classes(
        lambda folders: folders[depth - 1] if len(folders) >= depth else None,
        f"labels: the folders at depth {depth} below the source or the split",
    )


def find_classes(counts: Mapping[Folders, int]) -> Classes:
    """Decide from the folders of the training images what their classes are.

    Args:
        counts: number of images in each folder; folders relative to the source or the split.
    """
    paths = [path for path in counts if path]
    if not paths:
        return _unlabelled("the images lie in no folders that could be classes", hint=False)
    tops = {path[0] for path in paths}
    if len(tops) == 1 and len(paths) > 1 and len(paths) == len(counts) and all(len(path) > 1 for path in paths):
        below = find_classes({path[1:]: count for path, count in counts.items()})  # one folder holds everything
        return Classes(lambda folders: below.label(folders[1:]), below.message)
    dates = sum(_is_date(top) for top in tops)
    if 2 * dates >= len(tops) or all(_is_date(top) or _is_device(top) for top in tops):
        return _unlabelled(f"the folders are dates or folders of a device ({_examples(tops)})")
    if _are_letters(paths, tops):
        return Classes(
            lambda folders: "/".join(folders[1:]) or None, "labels: the folders below the letters, such as a/abbey"
        )
    images = sum(count for path, count in counts.items() if path)
    if len(tops) > _MANY_FOLDERS and images < _FEW_IMAGES * len(tops):
        return _unlabelled(
            f"{len(tops):,} folders hold {images / len(tops):.1f} images on average, too few for classes"
        )
    second = defaultdict(set)
    for path in paths:
        if len(path) > 1:
            second[path[1]].add(path[0])
    pairs = sum(map(len, second.values()))
    two_levels = () not in counts and all(len(path) > 1 for path in paths) and len(tops) > 1 and pairs >= 2 * len(tops)
    if two_levels and not all(re.search(r"\d", name) for name in second):
        if all(len(above) == 1 for above in second.values()):
            return Classes(
                lambda folders: folders[1] if len(folders) > 1 else None,
                f"labels: the folders at depth 2 ({_examples(second)}); data.labels=depth:1 takes the {len(tops)} above",
            )
        if 2 * sum(len(above) > 1 for above in second.values()) > len(second):
            return _unlabelled(
                f"folders of the same names ({_examples(n for n, above in second.items() if len(above) > 1)}) lie below "
                f"several others ({_examples(tops)}), so either may be the classes"
            )
    return Classes(lambda folders: folders[0] if folders else None, "labels: one folder per class")


def _unlabelled(reason: str, hint: bool = True) -> Classes:
    more = "; if there are classes, set data.labels to folder, depth:N or csv" if hint else ""
    return Classes(lambda folders: None, f"no labels: {reason}{more}")


def _are_letters(paths: list[Folders], tops: set[str]) -> bool:
    """Return whether the folders are sorted below letters: ``a/abbey``, ``b/bakery``."""
    if any(len(top) != 1 or not top.isalpha() for top in tops) or any(len(path) < 2 for path in paths):
        return False
    fitting = sum(path[1][:1].casefold() == path[0].casefold() for path in paths)
    return fitting > 0.8 * len(paths)


def _is_date(name: str) -> bool:
    return _DATE.fullmatch(name.casefold()) is not None or name.casefold() in _MONTHS


def _is_device(name: str) -> bool:
    return bool(_DEVICE & set(re.findall(r"[a-z]+", name.casefold())))


def _examples(names: object) -> str:
    found = sorted(names)  # type: ignore[call-overload]
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
