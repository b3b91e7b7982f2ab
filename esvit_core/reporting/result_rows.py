"""The rows of the table of results in the report and on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config
from esvit_core.evaluation.results import Result, left_out
from esvit_core.evaluation.significance import Difference
from esvit_core.storage import ObjectStore, join_uri

# Order of the evaluations; unknown ones follow by name.
_ORDER = ("knn", "retrieval", "linear", "few-shot", "transfer", "segmentation")
_MEASURES = {"map": "mAP", "r@1": "R@1", "r@5": "R@5", "r@10": "R@10"}

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Row:
    """One figure, or one evaluation without figures.

    Attributes:
        key: ``knn/20``, ``linear``, ``transfer/<set>``, ...
        label: name for people.
        trained, baseline: values of the trained backbone and of the baseline, percent; None if not measured.
        top5: top-5 accuracy of the trained backbone, percent.
        reason: why there are no figures; empty if there are.
        headline: whether it is the main figure of its evaluation.
        unit: unit of the values.
        comparison: interval and test of the difference; None if the outcomes of the single images were not kept.
        remark: what a reader must know about the values; usually empty.
    """

    key: str
    label: str
    trained: float | None
    baseline: float | None
    top5: float | None = None
    reason: str = ""
    headline: bool = False
    unit: str = "%"
    comparison: Difference | None = None
    remark: str = ""

    @property
    def difference(self) -> float | None:
        """Trained minus baseline, percentage points."""
        if self.trained is None or self.baseline is None:
            return None
        return self.trained - self.baseline

    @property
    def change(self) -> str:
        """The difference of the two figures as they are shown, so that the reader's subtraction agrees."""
        return change(self.trained, self.baseline)

    @property
    def decision(self) -> str:
        """``better``, ``worse``, ``no difference shown``, or ``not tested``."""
        return self.comparison.decision if self.comparison else "not tested"

    @property
    def tone(self) -> str:
        """``good`` for better, ``bad`` for worse, ``plain`` for everything else."""
        return {"better": "good", "worse": "bad"}.get(self.decision, "plain")


def read_results(store: ObjectStore, run_uri: str, config: Config | None = None) -> list[Result]:
    """Read every result below ``evaluation/`` of the run.

    Args:
        store: object store of the run.
        run_uri: ``s3://bucket/runs/<id>``.
        config: if given, evaluations of the run without a result are included as left out.
    """
    found = [store.get_json(stat.uri) for stat in store.list(join_uri(run_uri, "evaluation")) if _is_json(stat.uri)]
    names = {str(result.get("name")) for result in found}
    for name, headline in _expected(config):
        if name not in names:
            reason = "there is no result in the store, because the step has not run or has failed"
            found.append({"name": name, **left_out(headline, reason)})
    return sorted(found, key=_sort_key)


def result_rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Build the rows: every figure of every evaluation, of the trained network and of the baseline."""
    rows: list[Row] = []
    for result in sorted(results, key=_sort_key):
        headline = str(result.get("headline") or result.get("name"))
        unit = str(result.get("unit", "%"))
        trained = result.get("results", {}).get("trained", {})
        if result.get("status") != "measured" or not trained:
            reason = str(result.get("reason") or "no reason was given")
            rows.append(Row(headline, label_of(headline), None, None, reason=reason, headline=True, unit=unit))
            continue
        baseline = result["results"].get("baseline", {})
        top5 = result.get("top5", {}).get("trained", {})
        compared = {key: Difference.from_json(each) for key, each in result.get("differences", {}).items()}
        rows += [
            Row(
                key,
                label_of(key),
                value,
                baseline.get(key),
                top5.get(key),
                headline=key == headline,
                unit=unit,
                comparison=compared.get(key),
                remark=_unconverged(result.get("unconverged", {}).get(key, [])),
            )
            for key, value in trained.items()
        ]
    return rows


def decisive_row(rows: Sequence[Row], metric: str) -> Row | None:
    """Return the figure of ``promotion.metric``, or else the first main figure; None if nothing was compared."""
    compared = [row for row in rows if row.difference is not None]
    return next((r for r in compared if r.key == metric), None) or next((r for r in compared if r.headline), None)


def set_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return one figure for each data set: of the run's own data that of ``promotion.metric``, or else the first main
    figure; and the figure of each transfer set.
    """
    compared = [row for row in rows if row.difference is not None]
    own = [row for row in compared if not row.key.startswith("transfer/")]
    chosen = decisive_row(own, metric)
    return ([chosen] if chosen else []) + [row for row in compared if row.key.startswith("transfer/")]


def label_of(key: str) -> str:
    """Return the name of a figure for people: ``knn/20`` is 20-NN."""
    kind, _, rest = key.partition("/")
    if kind == "knn":
        return f"{rest}-NN" if rest else "k-NN"
    if kind == "linear":
        return f"linear probe, {rest} epoch" if rest else "linear probe"
    if kind == "retrieval" and rest:
        return f"retrieval, {_MEASURES.get(rest, rest)}"
    if kind == "few-shot" and rest:
        return f"few-shot, {rest.removesuffix('%')} %" if rest.endswith("%") else f"{rest}-shot"
    if kind == "segmentation":
        return "region retrieval, R@1" if rest else "region mIoU"
    return f"transfer to {rest}" if kind == "transfer" and rest else key


def percent(value: float | None) -> str:
    """Format with one decimal; a hyphen if there is no value."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.1f}"


def points(value: float | None) -> str:
    """Format a difference with its sign; without a sign if it rounds to 0."""
    if value is None or not math.isfinite(value):
        return "-"
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}"


def change(value: float | None, baseline: float | None) -> str:
    """Format the difference of two figures as :func:`percent` shows them, percentage points with a sign."""
    if value is None or baseline is None or not (math.isfinite(value) and math.isfinite(baseline)):
        return "-"
    return points(float(percent(value)) - float(percent(baseline)))


def typeset(figure: str) -> str:
    """Convert the output of :func:`percent` or :func:`points` to typographic minus signs and dashes."""
    return DASH if figure == "-" else figure.replace("-", MINUS)


def _unconverged(models: Sequence[str]) -> str:
    return f"{' and '.join(models)}: fit not converged" if models else ""


def _expected(config: Config | None) -> list[tuple[str, str]]:
    if config is None:
        return []
    evaluation = config.evaluation
    sets = [s.name for s in evaluation.transfer]
    optional = [
        *([("retrieval", "retrieval/map")] if evaluation.retrieval else []),
        *([("few-shot", f"few-shot/{evaluation.few_shot[-1]}")] if evaluation.few_shot else []),
        *([("segmentation", "segmentation")] if evaluation.segmentation else []),
    ]
    transfer = [(f"transfer-{name}", f"transfer/{name}") for name in sets]
    return [("knn", "knn/20"), ("linear", "linear"), *transfer, *optional]


def _sort_key(result: Mapping[str, Any]) -> tuple[int, str]:
    name = str(result.get("name"))
    kind = name if name in _ORDER else name.partition("-")[0]
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), name)


def _is_json(uri: str) -> bool:
    return uri.endswith(".json")
