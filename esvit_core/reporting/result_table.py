"""What was measured, the trained network next to the baseline: rows for the report and the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config
from esvit_core.evaluation.results import Result, left_out
from esvit_core.storage import ObjectStore, join_uri

# Order of the evaluations; those that the library does not know follow by name.
_ORDER = ("knn", "linear", "transfer")

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Row:
    """One measured figure, or one evaluation that has none.

    Attributes:
        key: ``knn/20``, ``linear``, ``transfer/<set>``, ...
        label: the same in words.
        trained, baseline: percent; None where it was not measured.
        top5: of the trained backbone, percent.
        reason: why there are no figures; empty where there are.
        headline: the figure that stands for its evaluation.
        unit: of the figures.
    """

    key: str
    label: str
    trained: float | None
    baseline: float | None
    top5: float | None = None
    reason: str = ""
    headline: bool = False
    unit: str = "%"

    @property
    def difference(self) -> float | None:
        """Trained less baseline, percentage points."""
        if self.trained is None or self.baseline is None:
            return None
        return self.trained - self.baseline


def read_results(store: ObjectStore, run_uri: str, config: Config | None = None) -> list[Result]:
    """Every result below ``evaluation/`` of the run.

    Args:
        store: where the run is.
        run_uri: ``s3://bucket/runs/<id>``.
        config: where given, an evaluation that belongs to the run and has no result is listed too, as left out.
    """
    found = [store.get_json(stat.uri) for stat in store.list(join_uri(run_uri, "evaluation")) if _is_json(stat.uri)]
    names = {str(result.get("name")) for result in found}
    for name, headline in _expected(config):
        if name not in names:
            reason = "there is no result in the store: the step has not run, or it failed"
            found.append({"name": name, **left_out(headline, reason)})
    return sorted(found, key=_place)


def summarise(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of the table of results: every figure of every evaluation, of the trained network and the baseline."""
    rows: list[Row] = []
    for result in sorted(results, key=_place):
        headline = str(result.get("headline") or result.get("name"))
        unit = str(result.get("unit", "%"))
        trained = result.get("results", {}).get("trained", {})
        if result.get("status") != "measured" or not trained:
            reason = str(result.get("reason") or "no reason was given")
            rows.append(Row(headline, label_of(headline), None, None, reason=reason, headline=True, unit=unit))
            continue
        baseline = result["results"].get("baseline", {})
        top5 = result.get("top5", {}).get("trained", {})
        rows += [
            Row(key, label_of(key), value, baseline.get(key), top5.get(key), headline=key == headline, unit=unit)
            for key, value in trained.items()
        ]
    return rows


def label_of(key: str) -> str:
    """A figure's key in words: ``knn/20`` is 20-NN."""
    kind, _, rest = key.partition("/")
    if kind == "knn":
        return f"{rest}-NN" if rest else "k-NN"
    if kind == "linear":
        return f"linear probe, {rest} epoch" if rest else "linear probe"
    return f"transfer to {rest}" if kind == "transfer" and rest else key


def percent(value: float | None) -> str:
    """One decimal, as papers print it; a hyphen where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.1f}"


def points(value: float | None) -> str:
    """A difference with its sign; no sign for what rounds to nothing."""
    if value is None or not math.isfinite(value):
        return "-"
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}"


def typeset(figure: str) -> str:
    """What :func:`percent` or :func:`points` wrote for a terminal, for a page: a true minus, a dash for nothing."""
    return DASH if figure == "-" else figure.replace("-", MINUS)


def _expected(config: Config | None) -> list[tuple[str, str]]:
    if config is None:
        return []
    sets = [s.name for s in config.evaluation.transfer]
    return [("knn", "knn/20"), ("linear", "linear"), *((f"transfer-{name}", f"transfer/{name}") for name in sets)]


def _place(result: Mapping[str, Any]) -> tuple[int, str]:
    name = str(result.get("name"))
    kind = name.partition("-")[0]
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), name)


def _is_json(uri: str) -> bool:
    return uri.endswith(".json")
