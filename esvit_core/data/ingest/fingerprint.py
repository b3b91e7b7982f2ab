"""Fingerprints of sources: names, sizes and content of the files, independent of dates and location.

Reading the content of a million images before a run starts would take too long, so only a cheap part of it is read.
Preparation reads everything, and the manifest of the prepared data contains a digest of everything. ``docs/data.md``
explains which edits a fingerprint cannot show and how they are detected nevertheless.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.entries import Entries, Entry
from esvit_core.data.ingest.file_kinds import is_ignored
from esvit_core.data.ingest.prefetch import reading_threads

SAMPLE = 4096  # files of a source whose content is read
_WHOLE_FILE = 128 * 2**10  # only the two ends of a larger file are read
_END = _WHOLE_FILE // 2
_WHOLE_ARCHIVE = 64 * 2**20  # only pieces of a larger archive are read
_PIECE, _PIECES = 2**16, 256
_SMALLEST_PART = 5 * 2**20
_MD5 = re.compile(r"[0-9a-f]{32}")


def listing_fingerprint(entries: Entries, read: Callable[[Entry, int, int], bytes]) -> str:
    """Return the fingerprint of files that are listed individually.

    Args:
        entries: all files, in any order; ignored ones do not count.
        read: returns ``length`` bytes of a file from ``offset``; raises FileReadError.

    Returns:
        64 hexadecimal digits.
    """
    unknown = (entry for entry in entries if entry.problem is None and entry.size and not _known_content(entry))
    unknown = (entry for entry in unknown if not is_ignored(entry.name))
    sample = heapq.nsmallest(SAMPLE, unknown, key=lambda entry: (zlib.crc32(_bytes(entry.name)), entry.name))
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="fingerprint") as pool:
        contents = pool.map(lambda entry: _content(entry, read), sample)
        sampled = dict(zip((entry.name for entry in sample), contents, strict=True))
    digest = hashlib.sha256()
    for entry in entries.by_name():
        if is_ignored(entry.name):
            continue
        content = _known_content(entry) or sampled.get(entry.name, "")
        digest.update(_bytes(f"{entry.name}\0{entry.size}\0{content}\n"))
    return digest.hexdigest()


def archive_fingerprint(size: int, read: Callable[[int, int], bytes]) -> str:
    """Return the fingerprint of an archive: of all its bytes, or of evenly spaced pieces of a large one.

    Args:
        size: in bytes.
        read: returns ``length`` bytes from ``offset``.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{size}\0".encode())
    if size <= _WHOLE_ARCHIVE:
        for offset in range(0, size, 4 * 2**20):
            digest.update(read(offset, min(4 * 2**20, size - offset)))
        return digest.hexdigest()
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="fingerprint") as pool:
        offsets = [i * (size - _PIECE) // (_PIECES - 1) for i in range(_PIECES)]
        for piece in pool.map(lambda offset: read(offset, _PIECE), offsets):
            digest.update(piece)
    return digest.hexdigest()


def _known_content(entry: Entry) -> str:
    """Return the digest of a file's content if the listing has one: the ETag of an object stored in one piece.

    The ETag of an object stored in several parts depends on their sizes. Each tool decides by itself when it uses parts, so
    the ETag is used only below the smallest part size that S3 allows.
    """
    return entry.stamp if entry.size < _SMALLEST_PART and _MD5.fullmatch(entry.stamp) else ""


def _content(entry: Entry, read: Callable[[Entry, int, int], bytes]) -> str:
    try:
        if entry.size <= _WHOLE_FILE:
            data = read(entry, 0, entry.size)
        else:
            data = read(entry, 0, _END) + read(entry, entry.size - _END, _END)
    except FileReadError:
        return "unreadable"
    return hashlib.sha256(data).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
