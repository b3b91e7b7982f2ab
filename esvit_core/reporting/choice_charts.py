"""Charts of the choices on validation images: the learning rate of the linear probe, and lambda of each transfer set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esvit_core.reporting.charts import Chart, Line, curve
from esvit_core.reporting.result_rows import label_of

_MODELS = ("trained", "baseline")


def choice_charts(results: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw the validation accuracy of every value that was tried, of the trained backbone and the baseline."""
    found = []
    for result in results:
        name, validation = str(result.get("name")), result.get("validation", {})
        if result.get("status") != "measured" or not validation:
            continue
        if name == "linear":
            chosen = result.get("chosen", {})
            lines = [
                _line(model, validation[model][chosen[model]["feature"]])
                for model in _MODELS
                if model in validation and model in chosen
            ]
            chart = curve(
                "Learning rate of the linear probe",
                "Accuracy on the validation images, %, by the power of ten of the learning rate, for the chosen feature.",
                lines,
                name="choice-linear",
                axis="power",
            )
        else:
            label = label_of(f"transfer/{name.removeprefix('transfer-')}")
            chart = curve(
                f"Lambda of {label}",
                "Metric on the validation images, %, by the power of ten of lambda, for the values that the search tried.",
                [_line(model, validation[model]) for model in _MODELS if model in validation],
                name=f"choice-{name}",
                axis="power",
            )
        if chart is not None:
            found.append(chart)
    return found


def _line(name: str, scores: Mapping[str, float]) -> Line:
    pairs = sorted((math.log10(float(value)), score) for value, score in scores.items())
    powers, values = np.array(pairs, dtype=float).T
    return Line(name, powers, values)
