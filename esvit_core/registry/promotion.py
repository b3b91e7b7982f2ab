"""Promotion: move the ``champion`` pointer to a new backbone that beats the current champion.

A backbone beats the champion if it is better by the margin on ``promotion.metric`` and loses no more than ``max_loss`` on
any transfer set. The pointer is changed by compare-and-swap: of two runs that finish at the same time one wins, and the
other is compared with the winner.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.evaluation.results import Result, read_result
from esvit_core.registry.champions import pointer_uri, timestamp, with_history
from esvit_core.registry.comparison import CHAMPION, compare_with_champion, is_retraining, read_comparison
from esvit_core.runs.run import PROMOTION
from esvit_core.storage import ObjectStore, Pointer, join_uri, split_uri
from esvit_core.storage.store_errors import NotFound

_ATTEMPTS = 20
_EARLIER = "promoted by an earlier attempt"
_TOLERANCE = 1e-9  # percentage points; in binary floating point 33.1 - 33.0 is slightly less than 0.1


@dataclass(frozen=True)
class Figure:
    """A metric of one run.

    Attributes:
        value: value of the trained backbone, percent.
        baseline: of the same network before training, percent.
        task: digest of the classes; figures of different tasks cannot be compared.
    """

    value: float
    baseline: float
    task: str


def promote(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    """Make the run's backbone the champion if it beats the current one, and record the reason either way.

    The first champion has to beat its own baseline. Another call for the same run returns the recorded decision. If an
    attempt died after it changed the pointer and before it recorded the decision, the pointer shows that.

    Returns:
        The decision, which is also in ``promotion.json``: ``promoted``, ``reason``, ``metric``, ``value``, ``baseline``,
        ``margin``, ``max_loss``, ``champion`` (run and value of the champion it was compared with; None for the first),
        ``figures`` (every metric of the run and of the champion, None where not measured), ``pointer``, ``time``.

    Raises:
        UserError: the pointer changed during every attempt.
    """
    record = join_uri(run_uri, PROMOTION)
    try:
        return store.get_json(record)
    except NotFound:
        pass
    decision = _decide_and_swap(run_uri, store, config)
    if store.put_if_absent(record, (json.dumps(decision, indent=1) + "\n").encode()):
        return decision
    return store.get_json(record)


def preview_promotion(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    """Return the recorded decision, or the one that :func:`promote` would take timestamp, without changing anything.

    Returns:
        ``promoted``, ``reason``, and ``decided``: whether the decision is recorded.
    """
    try:
        return store.get_json(join_uri(run_uri, PROMOTION)) | {"decided": True}
    except NotFound:
        pass
    figure = metric_figure(store, run_uri, config.promotion.metric)
    if isinstance(figure, str):
        return {"promoted": False, "reason": figure, "decided": False}
    current = store.read_pointer(_pointer_uri(run_uri, config))
    if current is not None and (earlier := _own_entry(current.value, run_uri)):
        return {"promoted": True, "reason": earlier.get("reason", _EARLIER), "decided": False}
    promoted, reason = _verdict(run_uri, figure, current, store, config)
    return {"promoted": promoted, "reason": reason, "decided": False}


def metric_figure(store: ObjectStore, run_uri: str, metric: str) -> Figure | str:
    """Return the run's figure of a metric (``knn/<k>``, ``linear``, ``transfer/<set>``), or the reason why it has none."""
    name = _evaluation(metric)
    result = read_result(store, run_uri, name)
    if result is None:
        return f"{metric} was not measured: the run has no result {name}"
    return _figure(result, metric, "trained", "baseline")


def beats(value: float, champion: float, margin: float) -> bool:
    """Whether ``value`` is higher than the champion's by at least ``margin``; an equal value is not better."""
    return value > champion and value - champion >= margin - _TOLERANCE


def _decide_and_swap(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    metric = config.promotion.metric
    pointer = _pointer_uri(run_uri, config)

    def decision(promoted: bool, reason: str, champion: dict[str, Any] | None = None) -> dict[str, Any]:
        return {
            "promoted": promoted,
            "reason": reason,
            "metric": metric,
            "value": figure.value if isinstance(figure, Figure) else None,
            "baseline": figure.baseline if isinstance(figure, Figure) else None,
            "margin": config.promotion.margin,
            "max_loss": config.promotion.max_loss,
            "champion": champion,
            "figures": _side_by_side(run_uri, current, store, config),
            "pointer": pointer,
            "time": timestamp(),
        }

    current: Pointer | None = None
    figure = metric_figure(store, run_uri, metric)
    if isinstance(figure, str):
        return decision(False, figure)
    if store.read_manifest(join_uri(run_uri, "backbone")) is None:
        return decision(False, "the run has published no backbone")
    lost, retraining = "", is_retraining(run_uri, store)
    for _ in range(_ATTEMPTS):
        current = store.read_pointer(pointer)
        if current is not None and (earlier := _own_entry(current.value, run_uri)):
            # An earlier attempt changed the pointer and died before it recorded the decision.
            return decision(True, earlier.get("reason", _EARLIER), earlier.get("compared"))
        champion = _compared(current)
        if retraining and current is not None:
            compare_with_champion(run_uri, store, config, current.value)
        promoted, reason = _verdict(run_uri, figure, current, store, config)
        if not promoted:
            return decision(False, lost + reason, champion)
        value = _pointer_value(run_uri, figure, metric, lost + reason, current)
        if store.swap_pointer(pointer, value, current):
            return decision(True, lost + reason, champion)
        lost = "another run became champion in the meantime; "
    raise UserError(f"pointer {pointer}: changed during each of {_ATTEMPTS} attempts; run the step again")


def _pointer_uri(run_uri: str, config: Config) -> str:
    return pointer_uri(split_uri(run_uri)[0], config.promotion.pointer)


def _verdict(
    run_uri: str, figure: Figure, current: Pointer | None, store: ObjectStore, config: Config
) -> tuple[bool, str]:
    metric, margin = config.promotion.metric, config.promotion.margin
    if current is None:
        comparison = f"{metric} {figure.value:.2f} against {figure.baseline:.2f} of the baseline"
        if figure.value > figure.baseline:
            return True, f"first champion: {comparison}"
        return False, f"no better than the baseline: {comparison}"
    champion = _champion_figure(run_uri, current, store, metric)
    if isinstance(champion, str):
        return False, f"cannot be compared with the champion {current.value['run']}: {champion}"
    if champion.task != figure.task:
        return False, (
            f"cannot be compared with the champion {current.value['run']}: it was measured on other classes; "
            "name another promotion.pointer for another task"
        )
    comparison = f"{metric} {figure.value:.2f} against {champion.value:.2f} of the champion {current.value['run']}"
    if not beats(figure.value, champion.value, margin):
        return False, f"{'no better' if figure.value <= champion.value else f'not better by {margin:g}'}: {comparison}"
    if losses := _too_much_lost(run_uri, current, store, config):
        return False, f"better: {comparison}; but {losses}"
    return True, f"better: {comparison}" + (f", margin {margin:g}" if margin else "")


def _too_much_lost(run_uri: str, current: Pointer, store: ObjectStore, config: Config) -> str:
    """Describe the transfer sets that lose more than ``promotion.max_loss``; empty if there are none."""
    allowed, losses = config.promotion.max_loss, []
    for transfer_set in config.evaluation.transfer:
        metric = f"transfer/{transfer_set.name}"
        own, champion = metric_figure(store, run_uri, metric), _champion_figure(run_uri, current, store, metric)
        # A missing figure, or one on other classes, is no evidence of a loss.
        if isinstance(own, Figure) and isinstance(champion, Figure) and own.task == champion.task:
            loss = champion.value - own.value
            if allowed is not None and loss > allowed + _TOLERANCE:
                losses.append(f"{metric} fell by {loss:.2f} points to {own.value:.2f}")
    return f"{' and '.join(losses)}, more than the allowed {allowed:g}" if losses else ""


def _champion_figure(run_uri: str, current: Pointer, store: ObjectStore, metric: str) -> Figure | str:
    """Return the champion's figure: on the run's images if it was evaluated on them, else from the pointer if it has
    this metric, else from the results of its own run.
    """
    pointer = current.value
    if (compared := read_comparison(run_uri, store, pointer)) is not None:
        result = compared["results"].get(_evaluation(metric))
        return f"{metric} was not measured" if result is None else _figure(result, metric, CHAMPION, CHAMPION)
    if pointer.get("metric") == metric and {"value", "baseline", "task"} <= pointer.keys():
        return Figure(float(pointer["value"]), float(pointer["baseline"]), str(pointer["task"]))
    return metric_figure(store, str(pointer["run"]), metric)


def _side_by_side(
    run_uri: str, current: Pointer | None, store: ObjectStore, config: Config
) -> dict[str, dict[str, float | None]]:
    """Return every figure of the run with the champion's."""
    names = ("knn", "linear", *(f"transfer-{s.name}" for s in config.evaluation.transfer))
    results = [result for name in names if (result := read_result(store, run_uri, name)) is not None]
    found: dict[str, dict[str, float | None]] = {}
    for metric in (metric for result in results for metric in result["results"].get("trained", {})):
        both = (
            metric_figure(store, run_uri, metric),
            "there is no champion" if current is None else _champion_figure(run_uri, current, store, metric),
        )
        run, champion = (figure.value if isinstance(figure, Figure) else None for figure in both)
        found[metric] = {"run": run, "champion": champion}
    return found


def _evaluation(metric: str) -> str:
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
    return Figure(value, compared, _task_digest(result["classes"]))


def _pointer_value(run_uri: str, figure: Figure, metric: str, reason: str, current: Pointer | None) -> dict[str, Any]:
    value = {
        "run": run_uri,
        "backbone": join_uri(run_uri, "backbone"),
        "metric": metric,
        "value": figure.value,
        "baseline": figure.baseline,
        "task": figure.task,
        "reason": reason,
        "compared": _compared(current),
        "time": timestamp(),
    }
    return with_history(value, None if current is None else current.value)


def _own_entry(pointer: dict[str, Any], run_uri: str) -> dict[str, Any] | None:
    entries = [pointer, *reversed(pointer.get("history", []))]
    return next((entry for entry in entries if entry.get("run") == run_uri), None)


def _compared(current: Pointer | None) -> dict[str, Any] | None:
    return None if current is None else {key: current.value.get(key) for key in ("run", "metric", "value")}


def _task_digest(classes: list[str]) -> str:
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]
