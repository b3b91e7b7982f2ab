"""How the classes fared under the linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from esvit_core.evaluation.results import Result
from esvit_core.reporting.charts import confusion


@dataclass(frozen=True)
class ClassRow:
    """One class: held-out images, share recognised (percent), and what it was taken for most often instead."""

    name: str
    images: int
    right: float
    mistaken_for: str
    mistaken: int


@dataclass(frozen=True)
class ClassTable:
    """The classes, best first, those without held-out images left out, and their confusion as SVG."""

    rows: list[ClassRow]
    chart: Markup


def class_table(results: Sequence[Result]) -> ClassTable | str:
    """The table of the linear probe's confusion, or why there is none."""
    linear = next((r for r in results if r.get("name") == "linear"), {})
    if linear.get("status") != "measured":
        return f"it comes from the linear probe, which was left out: {linear.get('reason')}"
    if "confusion" not in linear:
        return f"the linear probe recorded no confusion ({len(linear['classes']):,} classes are too many for a table)"
    counts, names = np.array(linear["confusion"]), list(linear["classes"])
    rows = [_row(names, counts[i], i) for i in range(len(names)) if counts[i].sum()]
    return ClassTable(sorted(rows, key=lambda r: (-r.right, r.name)), confusion(counts, names))


def _row(names: Sequence[str], predicted: np.ndarray, own: int) -> ClassRow:
    others = predicted.copy()
    others[own] = 0
    most = int(others.argmax())
    total = int(predicted.sum())
    return ClassRow(
        names[own], total, 100 * int(predicted[own]) / total, names[most] if others[most] else "", int(others[most])
    )
