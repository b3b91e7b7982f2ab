"""Folders that this program makes on the user's disk, marked so that it does not take what is in them for images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

MARKER = ".esvit-folder"
_TEXT = "esvit made this folder. It takes nothing in it for images to train on.\n"
# What such folders held before there was a mark: the store's, and a run's.
_UNMARKED = (frozenset({"identities.json", "security.toml"}), frozenset({"config.yaml", "run.log"}))


def mark(folder: Path) -> None:
    """Leave the mark in a folder.

    Raises:
        OSError: it cannot be written to.
    """
    path = folder / MARKER
    if not path.exists():
        path.write_text(_TEXT, encoding="utf-8")


def is_marked(folder: Path, files: Collection[str]) -> bool:
    """Whether this program made a folder.

    Args:
        folder: with the mark, or a store or a run that was made before there was a mark.
        files: names of the files in it.
    """
    if any(names <= {*files} for names in _UNMARKED):
        return True
    if MARKER not in files:
        return False
    try:
        return (folder / MARKER).read_text(encoding="utf-8", errors="replace") == _TEXT
    except OSError:
        return False
