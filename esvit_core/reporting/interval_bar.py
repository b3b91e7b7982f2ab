"""The dot and the bar of a difference and its interval, as SVG in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup

from esvit_core.evaluation.significance import Difference, interval_text
from esvit_core.reporting.result_rows import points, typeset

_WIDTH, _HEIGHT, _MARGIN = 160, 16, 5  # viewBox units; the margin keeps a dot at the end of the scale inside
_LIMITS = (1, 2, 5)  # limits of the scale, times powers of ten


def scale_limit(comparisons: Iterable[Difference]) -> float:
    """Return the limit of a common scale around 0 for all intervals, percentage points."""
    largest = max((max(abs(c.low), abs(c.high), abs(c.points)) for c in comparisons), default=1.0)
    power = 10.0 ** math.floor(math.log10(max(largest, 0.1)))
    return next(limit for limit in [factor * power for factor in (*_LIMITS, 10)] if limit >= largest * 0.999)


def interval_bar(comparison: Difference, limit: float) -> Markup:
    """Draw a difference as a dot, its interval as a bar, and no difference as a line in the middle.

    Args:
        comparison: the difference.
        limit: value at the right end of the scale, percentage points.
    """

    def x(value: float) -> str:
        inner = _WIDTH / 2 - _MARGIN
        return f"{_WIDTH / 2 + inner * max(-1.0, min(1.0, value / limit)):.1f}"

    label = f"{points(comparison.points)} points, 95 % interval {interval_text(comparison)}: {comparison.decision}"
    tone = {"better": "good", "worse": "bad"}.get(comparison.decision, "plain")
    middle = _HEIGHT / 2
    return Markup(
        '<svg class="interval {tone}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        '<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{height}"></line>'
        '<line class="bar" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"></line>'
        '<circle cx="{dot}" cy="{middle}" r="4"></circle></svg>'
    ).format(
        tone=tone,
        width=_WIDTH,
        height=_HEIGHT,
        label=typeset(label),
        zero=x(0),
        low=x(comparison.low),
        high=x(comparison.high),
        dot=x(comparison.points),
        middle=f"{middle:g}",
    )
