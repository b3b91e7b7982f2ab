"""Assertions for the tests of the cluster commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Call = Callable[..., tuple[int, str, str]]


def only(kept: dict[str, Any]) -> Any:
    (one,) = kept.values()
    return one


def assert_error(result: tuple[int, str, str], *parts: str, expected: int = 2) -> None:
    """Assert that a command failed with one error line that contains ``parts``: code 2 a mistake, 75 an outage."""
    code, out, error = result
    assert code == expected, (out, error)
    (line,) = error.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts), line
