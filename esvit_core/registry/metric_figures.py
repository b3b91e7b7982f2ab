"""The figures on which a promotion is decided: those of a run, of its baseline, and of the champion."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esvit_core.evaluation.outcomes import compare_outcomes
from esvit_core.evaluation.results import Result, read_result
from esvit_core.evaluation.significance import Difference
from esvit_core.registry.comparison import CHAMPION, read_comparison
from esvit_core.storage import ObjectStore

TRAINED, BASELINE = "trained", "baseline"


@dataclass(frozen=True)
class Figure:
    """A metric of one model.

    Attributes:
        value: value of the model, percent.
        baseline: of the same network with its initial weights, percent.
        task: digest of the classes; figures of different tasks cannot be compared.
        metric: ``knn/<k>``, ``linear``, or ``transfer/<set>``.
        result: the result that has the figure, with the outcomes of the single images; None if it is gone.
        model: name of the model in the result.
    """

    value: float
    baseline: float
    task: str
    metric: str
    result: Result | None
    model: str

    def compared_with(self, other: Figure) -> Difference | str:
        """Return the difference from another model's figure, or the reason why it has no interval."""
        if self.result is None or other.result is None:
            return "the outcomes of the single images were not kept"
        return compare_outcomes(self.metric, self.result, self.model, other.result, other.model)

    def of_baseline(self) -> Figure:
        """Return the figure of the baseline of the same run."""
        return Figure(self.baseline, self.baseline, self.task, self.metric, self.result, BASELINE)


def metric_figure(store: ObjectStore, run_uri: str, metric: str) -> Figure | str:
    """Return the run's figure of a metric (``knn/<k>``, ``linear``, ``transfer/<set>``), or the reason why it has none."""
    name = evaluation_of(metric)
    result = read_result(store, run_uri, name)
    if result is None:
        return f"{metric} was not measured: the run has no result {name}"
    return _figure(result, metric, TRAINED, BASELINE)


def champion_figure(run_uri: str, champion: Mapping[str, Any], store: ObjectStore, metric: str) -> Figure | str:
    """Return the champion's figure: on the run's images if it was evaluated on them, else from the pointer if it has
    this metric, else from the results of its own run.

    Args:
        run_uri: the run that is compared with the champion.
        champion: value of the champion's pointer.
    """
    if (compared := read_comparison(run_uri, store, dict(champion))) is not None:
        result = compared["results"].get(evaluation_of(metric))
        return f"{metric} was not measured" if result is None else _figure(result, metric, CHAMPION, CHAMPION)
    own = metric_figure(store, str(champion["run"]), metric)
    if champion.get("metric") == metric and {"value", "baseline", "task"} <= champion.keys():
        result = own.result if isinstance(own, Figure) else None
        value, baseline = float(champion["value"]), float(champion["baseline"])
        return Figure(value, baseline, str(champion["task"]), metric, result, TRAINED)
    return own


def evaluation_of(metric: str) -> str:
    """Return the name of the evaluation that measures a metric."""
    kind, _, rest = metric.partition("/")
    return f"transfer-{rest}" if kind == "transfer" else kind


def _figure(result: Result, metric: str, model: str, baseline: str) -> Figure | str:
    """Return the figure of a model in a result, or the reason why it has none."""
    if result["status"] != "measured":
        return f"{metric} was left out: {result['reason']}"
    figures = result["results"]
    if metric not in figures[model]:
        return f"{metric} was not measured; {result['name']} has {', '.join(figures[model])}"
    value, compared = float(figures[model][metric]), float(figures[baseline][metric])
    if not math.isfinite(value) or not math.isfinite(compared):
        return f"{metric} is not a number: {value} {model}, {compared} {baseline}"
    return Figure(value, compared, _task_digest(result["classes"]), metric, result, model)


def _task_digest(classes: list[str]) -> str:
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]
