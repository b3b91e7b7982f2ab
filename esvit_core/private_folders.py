"""Private folders of this user below the system's temporary directory, where anyone may create a folder of any name."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from esvit_core.errors import UserError

_BITS_OF_OTHERS = 0o077
_WRITABLE_BY_OTHERS = 0o022


def private_folder(purpose: str, variable: str) -> Path:
    """Create or find ``<temporary directory>/esvit-<purpose>-<user id>``, which only this user can read or write.

    Args:
        purpose: part of its name.
        variable: environment variable for choosing another folder, for the error message.

    Raises:
        UserError: the folder cannot be created, or the path is a link, not a folder, owned by another user, or writable by
            others.
    """
    path = Path(tempfile.gettempdir()) / f"esvit-{purpose}-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path}: cannot be created ({error.strerror}); set {variable} to a writable folder") from None
    problem = folder_problem(found)
    if problem:
        raise UserError(f"{path}: {problem}; expected a private folder: remove it, or set {variable} to another one")
    if found.st_mode & _BITS_OF_OTHERS:
        path.chmod(0o700)
    return path


def folder_problem(found: os.stat_result) -> str | None:
    """Return why a path is not a folder that only this user can write; None if it is one."""
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.geteuid():
        return f"belongs to another user (user id {found.st_uid})"
    if found.st_mode & _WRITABLE_BY_OTHERS:
        return "is writable by other users"
    return None
