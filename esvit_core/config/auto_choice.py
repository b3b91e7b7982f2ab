"""What the recipe ``auto`` chose, as a recipe and as a table for the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """A line of the table: what was chosen, its value, the reason, and the setting that changes it."""

    what: str
    value: str
    reason: str
    key: str


@dataclass(frozen=True)
class Choice:
    """A recipe that was chosen.

    Attributes:
        values: the recipe, as a nested mapping.
        rows: the choices for the user.
        seconds: estimated time of the whole run.
        memory: estimated memory of one GPU, or of the machine, bytes.
        rate: estimated images per second.
        source: where the estimated speed comes from.
    """

    values: dict[str, Any]
    rows: tuple[Row, ...]
    seconds: float
    memory: float
    rate: float
    source: str

    def lines(self, given: Mapping[str, str] | None = None) -> list[str]:
        """Return the choices as an aligned table, and the plan.

        Args:
            given: values of the settings that the user has set, by key.
        """
        set_ = given or {}
        rows = [replace(row, value=set_[row.key], reason="given") if row.key in set_ else row for row in self.rows]
        what, value = (max(len(getattr(row, name)) for row in rows) for name in ("what", "value"))
        return [
            *(f"  {row.what:{what}}  {row.value:{value}}  {row.reason}" for row in rows),
            f"  {'plan':{what}}  about {duration(self.seconds)}, {self.memory / 1e9:.1f} GB of memory; "
            f"{self.rate:,.0f} images/s ({self.source})",
        ]


def duration(seconds: float) -> str:
    """Return a time in words, such as ``45 minutes`` or ``7.5 hours``."""
    return count(max(1, round(seconds / 60)), "minute") if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 epoch`` or ``40 epochs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
