"""Mark the folders that this program creates, so that it does not use their content as images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

MARKER = ".esvit-folder"
_TEXT = "esvit created this folder and does not use its content as training images.\n"
# Files that identify older, unmarked folders: those of a store, and those of a run.
_UNMARKED = (frozenset({"identities.json", "security.toml"}), frozenset({"config.yaml", "run.log"}))
_TELLING = frozenset({MARKER}).union(*_UNMARKED)


def mark(folder: Path) -> None:
    """Mark a folder.

    Raises:
        OSError: the folder is not writable.
    """
    path = folder / MARKER
    if not path.exists():
        path.write_text(_TEXT, encoding="utf-8")


def is_marked(folder: Path, files: Iterable[str]) -> bool:
    """Return whether this program created a folder.

    Args:
        folder: the folder; older stores and runs are recognized without a mark.
        files: names of the files in it.
    """
    there = _TELLING.intersection(files)
    if any(names <= there for names in _UNMARKED):
        return True
    if MARKER not in there:
        return False
    try:
        return (folder / MARKER).read_text(encoding="utf-8", errors="replace") == _TEXT
    except OSError:
        return False
