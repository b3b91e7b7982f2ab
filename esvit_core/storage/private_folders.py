"""Folders of this user below the system's temporary one, where anyone may make a folder of any name first."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from esvit_core.errors import UserError

_BITS_OF_OTHERS = 0o077
_WRITABLE_BY_OTHERS = 0o022


def private_folder(purpose: str, variable: str) -> Path:
    """Make or find ``<temporary folder>/esvit-<purpose>-<user id>``, which nobody else can read or write.

    Args:
        purpose: part of its name.
        variable: environment variable that names another folder, for the error's advice.

    Raises:
        UserError: it cannot be made, or what has its name is a link, no folder, another user's, or could be written
            to by others.
    """
    path = Path(tempfile.gettempdir()) / f"esvit-{purpose}-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made ({error.strerror}); set {variable} to a folder that can be written to"
        ) from None
    problem = _problem(found)
    if problem:
        raise UserError(f"{path}: {problem}; expected a folder of yours alone: remove it, or set {variable} to another")
    if found.st_mode & _BITS_OF_OTHERS:
        path.chmod(0o700)
    return path


def _problem(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if found.st_uid != os.geteuid():
        return f"belongs to another user (user id {found.st_uid})"
    if found.st_mode & _WRITABLE_BY_OTHERS:
        return "can be written to by other users"
    return None
