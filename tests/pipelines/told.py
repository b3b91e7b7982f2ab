"""What the tests of the commands about a cluster look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Call = Callable[..., tuple[int, str, str]]


def only(kept: dict[str, Any]) -> Any:
    (one,) = kept.values()
    return one


def told(result: tuple[int, str, str], *parts: str, expected: int = 2) -> None:
    """A mistake, or with 75 an outage: one line that has these parts, and the exit code."""
    code, out, error = result
    assert code == expected, (out, error)
    (line,) = error.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line
