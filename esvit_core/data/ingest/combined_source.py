"""Several sources as one source of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from esvit_core.data.ingest.archives import Entry, Source


class CombinedSource:
    """The files of several sources. Their names begin with the number of their source, from 1: ``2/cat/1.jpg``.

    Args:
        parts: the sources, in order.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.entries = [
            replace(entry, name=f"{number}/{entry.name}", handle=(part, entry), part=number)
            for number, part in enumerate(parts, start=1)
            for entry in part.entries
        ]
        self.duplicates = sum(part.duplicates for part in parts)
        self.notes = [f"source {number}: {note}" for number, part in enumerate(parts, start=1) for note in part.notes]

    def read(self, entry: Entry) -> bytes:
        part, inner = entry.handle
        return bytes(part.read(inner))

    def peek(self, entry: Entry, length: int) -> bytes:
        part, inner = entry.handle
        return bytes(part.peek(inner, length))
