"""Find the folders of training, validation and test images among the folders of a source."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

SplitName = Literal["train", "val", "test"]
#: What a folder holds; ``extra``: more images to train on, which are not held out.
Role = Literal["train", "val", "test", "extra"]
Folders = tuple[str, ...]
_WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainval", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "valset", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled", "extra", "pred"), "extra"),
}
# Words that say nothing about the content of a folder beside the word for its split: `train_images`, `Final_Training`.
_NEUTRAL = frozenset(
    [
        "set",
        "sets",
        "image",
        "images",
        "img",
        "imgs",
        "data",
        "final",
        "split",
        "large",
        "small",
        "standard",
        "full",
        "new",
        "folder",
    ]
)
_TOKEN = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class SplitFolders:
    """The folders that hold the splits.

    Attributes:
        level: number of folders above them.
        roles: what each folder holds, by its name.
    """

    level: int
    roles: Mapping[str, Role]

    def of(self, folders: Folders) -> Role | None:
        """Return the role of the images in a folder; None: the folder is outside the splits."""
        return self.roles.get(folders[self.level]) if len(folders) > self.level else None

    def below(self, folders: Folders) -> Folders:
        """Return the folders without the one of the split, which some archives repeat: ``seg_train/seg_train``."""
        end = self.level + 1
        while len(folders) > end and folders[end] == folders[self.level]:
            end += 1
        return folders[: self.level] + folders[end:]


def exact_role(name: str) -> Role | None:
    """Return the role that the whole name of a folder says: ``Train``, ``VALID``, ``unlabeled``."""
    return _WORDS.get(name.casefold())


def word_role(name: str) -> tuple[Role, str] | None:
    """Return the role that a word in the name says, and the rest of the name: ``seg_train`` -> ``("train", "seg_")``."""
    lower = name.casefold()
    found = [match for match in _TOKEN.finditer(lower) if match.group() in _WORDS]
    if not found:
        return None
    # `train_extra` holds images to train on; of several words the first decides.
    word = found[0]
    return _WORDS[word.group()], lower[: word.start()] + "*" + lower[word.end() :]


def folder_role(name: str) -> Role | None:
    """Return the role of a folder whose name says nothing but that: ``val2017``, ``test_images``."""
    found = word_role(name)
    return found[0] if found and _is_neutral(found[1]) else None


def find_split_folders(folders: Collection[Folders], require_train: bool = True) -> SplitFolders | None:
    """Find the folders that hold splits, at the top or, below every folder at the top, at the second level.

    Folders are recognized by whole names in any case, if there is one for training and either another split or nothing
    else; and by a word in their names (``train2017``, ``seg_train``), if the names are otherwise the same or say nothing
    else, so that classes such as ``train station`` and ``test tube`` are not taken for splits.

    Args:
        folders: the folders with images, relative to the source and without the folders that all of them share.
        require_train: whether there must be a folder for training.
    """
    for level in (0, 1):
        deep = [path for path in folders if len(path) > level]
        if level == 1 and (len(deep) < len(folders) or len({path[0] for path in deep}) < 2):
            return None
        roles = _roles({path[level] for path in deep}, require_train)
        if roles and (level == 0 or _in_most_tops(deep, roles)):
            return SplitFolders(level, roles)
    return None


def assigned_split_folders(given: Mapping[str, SplitName], folders: Collection[Folders]) -> list[tuple[Folders, Role]]:
    """Return the split of each folder that a name or pattern of ``data.splits`` matches, the first that matches counts."""
    found: list[tuple[Folders, Role]] = []
    for path in folders:
        for pattern, split in given.items():
            parts = tuple(part for part in pattern.casefold().split("/") if part)
            spots = range(len(path) - len(parts) + 1)
            if parts and any(_matches(path[i : i + len(parts)], parts) for i in spots):
                found.append((path, split))
                break
    return found


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return all(fnmatchcase(name.casefold(), part) for name, part in zip(path, pattern, strict=True))


def _roles(names: set[str], require_train: bool) -> dict[str, Role] | None:
    exact: dict[str, Role] = {name: role for name in names if (role := exact_role(name))}
    if _complete(exact, require_train) and (len(set(exact.values())) > 1 or exact.keys() == names):
        return exact | {name: role for name in names - exact.keys() if (role := folder_role(name))}
    found = {name: word for name in names if (word := word_role(name))}
    for rest in sorted({rest for _, rest in found.values()}):
        alike: dict[str, Role] = {name: role for name, (role, other) in found.items() if other == rest}
        if "train" not in alike.values() and (whole := _data_folder(names, rest)):
            alike[whole] = "train"
        if _complete(alike, require_train) and len(set(alike.values())) > 1:
            others = {name: role for name, (role, other) in found.items() if _is_neutral(other)}
            return alike | {name: role for name, role in others.items() if name not in alike}
    if found.keys() == names and all(_is_neutral(rest) for _, rest in found.values()):
        roles: dict[str, Role] = {name: role for name, (role, _) in found.items()}
        if _complete(roles, require_train) and len(set(roles.values())) > 1:
            return roles
    return None


def _complete(roles: Mapping[str, Role], require_train: bool) -> bool:
    return bool(roles) and (bool({"train", "extra"} & set(roles.values())) or not require_train)


def _data_folder(names: Collection[str], rest: str) -> str | None:
    """Return the folder ``data_large`` beside ``val_large``: Places365 calls its training images so."""
    wanted = rest.replace("*", "data")
    return next((name for name in names if name.casefold() == wanted), None)


def _is_neutral(rest: str) -> bool:
    return all(word in _NEUTRAL for word in _TOKEN.findall(rest))


def _in_most_tops(folders: Collection[Folders], roles: Mapping[str, Role]) -> bool:
    """Return whether most folders at the top have more than one split: ``bottle/train``, ``bottle/test``, ``cable/train``."""
    splits: dict[str, set[Role]] = {}
    for path in folders:
        if path[1] in roles:
            splits.setdefault(path[0], set()).add(roles[path[1]])
    return 2 * sum(len(found) > 1 for found in splits.values()) > len({path[0] for path in folders})
