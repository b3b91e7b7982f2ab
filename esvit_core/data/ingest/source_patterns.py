"""Patterns as sources: ``shards/train-{000..146}.tar``, ``s3://bucket/shards/*.tar``."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from esvit_core.data.ingest.listed_sources import FolderSource, PrefixSource, file_entry
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore
from esvit_core.storage.uri import SCHEME

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")
_WILD = re.compile(r"[*?\[]|\{[^{}]*(?:\.\.|,)[^{}]*\}")
_MOST = 1_000_000  # files that braces may name


def is_pattern(source: str) -> bool:
    """Return whether a source is a pattern: it has wildcards or braces, and no file or folder has that name."""
    return _WILD.search(source) is not None and (source.startswith(SCHEME) or not os.path.lexists(source))


def list_pattern(source: str, store: ObjectStore | None) -> FolderSource | PrefixSource:
    """List the files that match a pattern; they are named below the part of it that has no wildcards.

    Raises:
        UserError: no file matches.
    """
    top = _fixed_folder(source)
    patterns = list(_expanded(source))
    listed: FolderSource | PrefixSource
    if source.startswith(SCHEME):
        names, wild = {p for p in patterns if not _WILD.search(p)}, [p for p in patterns if _WILD.search(p)]
        listed = PrefixSource(
            store or ObjectStore.from_env(),
            top,
            lambda uri: uri in names or any(fnmatchcase(uri, pattern) for pattern in wild),
        )
    else:
        paths = sorted({path for pattern in patterns for path in glob.glob(pattern, recursive=True)})  # noqa: PTH207
        files = [path for path in paths if not Path(path).is_dir()]
        listed = FolderSource(Path(top), [file_entry(path, os.path.relpath(path, top or ".")) for path in files])
    if not listed.entries:
        raise UserError(f"{source}: no file matches; expected a pattern of archives, such as shards/train-*.tar")
    return listed


def _fixed_folder(source: str) -> str:
    match = _WILD.search(source)
    assert match is not None
    return source[: match.start()].rpartition("/")[0] or ("/" if source.startswith("/") else "")


def _expanded(pattern: str) -> Iterator[str]:
    """Yield the patterns that braces stand for: ``{a,b}`` and ``{000..146}``."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    span = _RANGE.fullmatch(match[1])
    if span is None:
        choices: Iterator[str] | list[str] = match[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < _MOST:
            raise UserError(f"{pattern}: {match[0]} is not a range of numbers; expected {{first..last}}")
        choices = (str(number).zfill(len(span[1])) for number in range(first, last + 1))
    for choice in choices:
        yield from _expanded(pattern[: match.start()] + choice + pattern[match.end() :])
