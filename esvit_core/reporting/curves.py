"""Curves in the terminal: a chart of Braille dots, and one line of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esvit_core.monitoring.progress_line import format_figure

# Bit of each dot of a Braille character, by column and row.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
_BLOCKS = "▁▂▃▄▅▆▇█"


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """A curve as lines of text, with its highest and lowest value at the left.

    Args:
        values: in order; those that are not finite leave a gap.
        width, height: in characters, the figures at the left included in the width.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return []
    low, high = min(finite), max(finite)
    top, bottom = format_figure(float(high)), format_figure(float(low))
    margin = max(len(top), len(bottom))
    columns = max(1, width - margin - 1)
    cells = [[_BLANK] * columns for _ in range(height)]
    previous: int | None = None
    for x, value in enumerate(_resampled(values, 2 * columns)):
        if value is None:
            previous = None
            continue
        y = round((high - value) / (high - low) * (4 * height - 1)) if high > low else 2 * height
        # Down or up to where the last one was, so that a steep curve stays a curve.
        first, last = (y, y) if previous is None else sorted((y, previous + (y > previous) - (y < previous)))
        for row in range(first, last + 1):
            cells[row // 4][x // 2] |= _DOTS[x % 2][row % 4]
        previous = y
    labels = [top, *[""] * (height - 2), bottom] if height > 1 else [top]
    return [
        f"{label:>{margin}} {''.join(map(chr, row))}".rstrip(chr(_BLANK))
        for label, row in zip(labels, cells, strict=True)
    ]


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve as one line of blocks; a value that is not finite is a space."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)

    def block(value: float | None) -> str:
        if value is None:
            return " "
        return _BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1)) if high > low else 0]

    return "".join(block(value) for value in _resampled(values, min(width, len(values))))


def _resampled(values: Sequence[float], number: int) -> list[float | None]:
    """So many values: means of neighbours where there are more, on the lines between them where there are fewer."""
    return [_between(values, i, number) if len(values) < number else _mean(values, i, number) for i in range(number)]


def _between(values: Sequence[float], i: int, number: int) -> float | None:
    place = i * (len(values) - 1) / (number - 1)
    left = int(place)
    right = min(left + 1, len(values) - 1)
    value = values[left] + (place - left) * (values[right] - values[left])
    if not math.isfinite(value):
        value = values[round(place)]
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float], i: int, number: int) -> float | None:
    part = values[i * len(values) // number : (i + 1) * len(values) // number]
    finite = [value for value in part if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
