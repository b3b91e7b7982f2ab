"""Divide the candidates of a preparation into parts, each of which is prepared, stored and repeated by itself.

A part is what is in memory at a time, what another pod may do, and what the manifest refers to. All images of a part
belong to one split.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esvit_core.data.ingest.ingest_plan import Candidate
from esvit_core.data.ingest.layout import SplitName

#: Files of a part; the keys of its samples have four digits for them.
PART_FILES = 4096


@dataclass(frozen=True)
class PlannedPart:
    """Files that are prepared together.

    Attributes:
        split: their split.
        number: of the part in its split.
        start, stop: the candidates of the plan that it consists of.
    """

    split: SplitName
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """First part of the names of its objects."""
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class Share:
    """The parts that one of several preparations of the same data does.

    Attributes:
        number: of the preparation, from 1.
        count: number of preparations.
    """

    number: int = 1
    count: int = 1

    def of(self, parts: Sequence[PlannedPart]) -> Sequence[PlannedPart]:
        """Return the parts of this share."""
        return parts[self.number - 1 :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Share:
        """Return the share that a text such as ``2/4`` says.

        Raises:
            ValueError: it is no share.
        """
        number, _, count = text.partition("/")
        share = cls(int(number), int(count))
        if not 1 <= share.number <= share.count:
            raise ValueError(f"{text}: expected a share such as 2/4")
        return share


def divide(candidates: Sequence[Candidate], first: Mapping[str, int]) -> list[PlannedPart]:
    """Divide candidates into parts.

    Args:
        candidates: sorted by their splits.
        first: number of the first part of a split; 0 where it is missing.
    """
    parts: list[PlannedPart] = []
    start = 0
    while start < len(candidates):
        split = candidates[start].split
        end = bisect_right(candidates, split, lo=start, key=lambda candidate: candidate.split)
        for number, begin in enumerate(range(start, end, PART_FILES), start=first.get(split, 0)):
            parts.append(PlannedPart(split, number, begin, min(begin + PART_FILES, end)))
        start = end
    return parts
