"""Read a file that may be an image, without reading large files that are none."""

from __future__ import annotations

from esvit_core.data.ingest.archives import Source
from esvit_core.data.ingest.decode import BadImage
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.file_kinds import HEAD, UNREADABLE_SUFFIXES, is_image_head, is_named_as_image, suffix
from esvit_core.data.ingest.optional_formats import why_unreadable

_LARGE = 2**20  # bytes; of a larger file the first bytes are read first
_LARGE_IMAGE = 32 * 2**20  # the same for files with the suffix of an image


class NotAnImage(Exception):  # noqa: N818 (describes one file, not a failure of the program)
    """Neither the name nor the first bytes of a file are those of an image, so it is ignored."""


def read_image_file(opened: Source, entry: Entry) -> bytes:
    """Return the content of a file that may be an image.

    Raises:
        BadImage: the name says that it is an image, and it is not one, or of a format that cannot be read.
        NotAnImage: it is another kind of file.
        FileReadError: it cannot be read.
        UserError: the source cannot be read any more.
    """
    optional = suffix(entry.name) in UNREADABLE_SUFFIXES
    if optional and (reason := why_unreadable(suffix(entry.name))) is not None:
        raise BadImage(reason)
    if optional:  # their first bytes have many forms
        return opened.read(entry)
    named = is_named_as_image(entry.name)
    if entry.size > (_LARGE_IMAGE if named else _LARGE):
        head = opened.peek(entry, HEAD)
        if not is_image_head(head):
            raise BadImage("not an image") if named else NotAnImage
    data = opened.read(entry)
    if not named and not is_image_head(data[:HEAD]):
        raise NotAnImage
    return data
