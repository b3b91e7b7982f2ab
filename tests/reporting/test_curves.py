"""Curves in the terminal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.reporting.curves import chart, sparkline

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=200)


def dots(row: str) -> int:
    return sum(bin(ord(c) - 0x2800).count("1") for c in row if 0x2800 <= ord(c) < 0x2900)


def test_a_falling_curve_falls() -> None:
    rows = chart([4.0, 3.0, 2.0, 1.0], width=14, height=4)
    assert [row.split()[0] for row in (rows[0], rows[-1])] == ["4.00", "1.00"]
    first = [next(i for i, c in enumerate(row) if 0x2800 < ord(c) < 0x2900) for row in rows]
    assert first == sorted(first) and len(set(first)) == 4


def test_a_gap_where_a_value_is_not_finite() -> None:
    whole, holed = (chart(values, 20, 3) for values in ([1.0] * 40, [1.0] * 16 + [math.nan] * 8 + [1.0] * 16))
    assert sum(map(dots, holed)) < sum(map(dots, whole))


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_nothing_to_draw(values: list[float]) -> None:
    assert chart(values, 20, 3) == [] and sparkline(values, 20) == ""


def test_blocks() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([8.0, 8.0, 0.0, 0.0], 2) == "█▁"
    assert sparkline([1.0, math.nan, 2.0], 20) == "▁ █"
    assert sparkline([3.0], 20) == "▁"


@given(values=VALUES, width=st.integers(10, 100), height=st.integers(1, 10))
def test_any_curve_stays_in_its_box(values: list[float], width: int, height: int) -> None:
    rows = chart(values, width, height)
    finite = [value for value in values if math.isfinite(value)]
    assert len(rows) == (height if finite else 0)
    assert all(len(row) <= max(width, 12 + 1) for row in rows)
    assert (sum(map(dots, rows)) > 0) == bool(finite)
    assert len(sparkline(values, width)) <= width
