"""Several sources as one source of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from esvit_core.data.ingest.archives import Source
from esvit_core.data.ingest.entries import Entries, Entry


class CombinedSource:
    """The files of several sources. Their names begin with the number of their source, from 1: ``2/cat/1.jpg``.

    Args:
        parts: the sources, in order.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.entries = Entries(
            replace(entry, name=f"{number}/{entry.name}", part=number)
            for number, part in enumerate(parts, start=1)
            for entry in part.entries
        )
        self.duplicates = sum(part.duplicates for part in parts)
        self.notes = [f"source {number}: {note}" for number, part in enumerate(parts, start=1) for note in part.notes]

    def read(self, entry: Entry) -> bytes:
        return self.parts[entry.part - 1].read(_in_its_source(entry))

    def peek(self, entry: Entry, length: int) -> bytes:
        return self.parts[entry.part - 1].peek(_in_its_source(entry), length)


def _in_its_source(entry: Entry) -> Entry:
    return replace(entry, name=entry.name.partition("/")[2], part=0)
