"""What makes a source the same source: the names, sizes and content of its files; never their dates or their folder.

The content of a million images cannot be read before a run starts, so it is read as far as it is cheap. Preparation
reads all of it, and the manifest of the prepared data has the digest of all of it. What an edit looks like that a
fingerprint cannot see, and how it is noticed nevertheless: ``docs/data.md``.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from esvit_core.data.ingest.archives import Entry, ReadProblem
from esvit_core.data.ingest.layout import is_ignored
from esvit_core.data.ingest.prefetch import reading_threads

SAMPLE = 4096  # files of a source whose content is looked at
_WHOLE_FILE = 128 * 2**10  # a larger one is known by its ends
_END = _WHOLE_FILE // 2
_WHOLE_ARCHIVE = 64 * 2**20  # a larger one is known by pieces of it
_PIECE, _PIECES = 2**16, 256
_SMALLEST_PART = 5 * 2**20
_MD5 = re.compile(r"[0-9a-f]{32}")


def listing_fingerprint(entries: Iterable[Entry], read: Callable[[Entry, int, int], bytes]) -> str:
    """The fingerprint of files that are listed one by one.

    Args:
        entries: all of them, in any order; those that no one means as images do not count.
        read: gives so many bytes of a file from an offset on; raises ReadProblem.

    Returns:
        64 hexadecimal digits.
    """
    counted = sorted((entry for entry in entries if not is_ignored(entry.name)), key=lambda entry: entry.name)
    unknown = (entry for entry in counted if not _known_content(entry) and entry.problem is None and entry.size)
    sample = heapq.nsmallest(SAMPLE, unknown, key=lambda entry: (zlib.crc32(_bytes(entry.name)), entry.name))
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="fingerprint") as pool:
        contents = pool.map(lambda entry: _content(entry, read), sample)
        sampled = dict(zip((entry.name for entry in sample), contents, strict=True))
    digest = hashlib.sha256()
    for entry in counted:
        content = _known_content(entry) or sampled.get(entry.name, "")
        digest.update(_bytes(f"{entry.name}\0{entry.size}\0{content}\n"))
    return digest.hexdigest()


def archive_fingerprint(size: int, read: Callable[[int, int], bytes]) -> str:
    """The fingerprint of an archive: of all its bytes, or, of a large one, of its ends and of pieces between.

    Args:
        size: in bytes.
        read: gives so many bytes from an offset on.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{size}\0".encode())
    if size <= _WHOLE_ARCHIVE:
        for offset in range(0, size, 16 * 2**20):
            digest.update(read(offset, min(16 * 2**20, size - offset)))
        return digest.hexdigest()
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="fingerprint") as pool:
        places = [i * (size - _PIECE) // (_PIECES - 1) for i in range(_PIECES)]
        for piece in pool.map(lambda place: read(place, _PIECE), places):
            digest.update(piece)
    return digest.hexdigest()


def _known_content(entry: Entry) -> str:
    """The digest of a file's content where the listing has one: the ETag of an object that was stored in one piece.

    The ETag of an object that was stored in several parts depends on their size. Which objects are, every tool decides
    by itself, so the ETag counts only below the smallest part that S3 allows.
    """
    return entry.stamp if entry.size < _SMALLEST_PART and _MD5.fullmatch(entry.stamp) else ""


def _content(entry: Entry, read: Callable[[Entry, int, int], bytes]) -> str:
    try:
        if entry.size <= _WHOLE_FILE:
            data = read(entry, 0, entry.size)
        else:
            data = read(entry, 0, _END) + read(entry, entry.size - _END, _END)
    except ReadProblem:
        return "unreadable"
    return hashlib.sha256(data).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
