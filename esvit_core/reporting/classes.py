"""Results of the linear probe by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from esvit_core.evaluation.results import Result
from esvit_core.reporting.charts import confusion


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Attributes:
        name: name.
        images: number of held-out images.
        correct: share of correct predictions, percent.
        confused_with: most frequent wrong prediction; empty if there is none.
        confusions: number of these predictions.
    """

    name: str
    images: int
    correct: float
    confused_with: str
    confusions: int


@dataclass(frozen=True)
class ClassTable:
    """The classes that have held-out images, best first, and their confusion matrix as SVG."""

    rows: list[ClassRow]
    chart: Markup


def class_table(results: Sequence[Result]) -> ClassTable | str:
    """Build the table from the linear probe's confusion matrix, or return the reason why there is none."""
    linear = next((r for r in results if r.get("name") == "linear"), {})
    if linear.get("status") != "measured":
        return f"it needs the linear probe, which was not measured: {linear.get('reason')}"
    if "confusion" not in linear:
        return f"the linear probe recorded no confusion matrix ({len(linear['classes']):,} classes are too many)"
    counts, names = np.array(linear["confusion"]), list(linear["classes"])
    rows = [_row(names, counts[i], i) for i in range(len(names)) if counts[i].sum()]
    return ClassTable(sorted(rows, key=lambda r: (-r.correct, r.name)), confusion(counts, names))


def _row(names: Sequence[str], predicted: np.ndarray, own: int) -> ClassRow:
    others = predicted.copy()
    others[own] = 0
    most = int(others.argmax())
    total = int(predicted.sum())
    return ClassRow(
        names[own], total, 100 * int(predicted[own]) / total, names[most] if others[most] else "", int(others[most])
    )
