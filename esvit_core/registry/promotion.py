"""Promotion: the ``champion`` pointer moves to a new backbone that is better than the present one.

Better is by the margin on the metric that decides, and on no transfer set worse by more than ``max_loss``. The pointer
is the only thing that changes in the store; it is changed by compare-and-swap, so that of two runs that finish together
one wins and the other is compared with the winner.
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
from esvit_core.registry.champions import now, pointer_uri, with_history
from esvit_core.registry.comparison import CHAMPION, compare_with_champion, is_retraining, read_comparison
from esvit_core.runs.run import PROMOTION
from esvit_core.storage import ObjectStore, Pointer, join_uri, split_uri
from esvit_core.storage.store_errors import NotFound

_ATTEMPTS = 20
_EARLIER = "promoted by an earlier attempt"
_TOLERANCE = 1e-9  # percentage points: 33.1 - 33.0 is a little less than 0.1 in binary


@dataclass(frozen=True)
class Figure:
    """The metric of one run.

    Attributes:
        value: of the trained backbone, percent.
        baseline: of the network before training.
        task: digest of the classes measured: figures of different tasks do not compare.
    """

    value: float
    baseline: float
    task: str


def promote(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    """Make the run's backbone the champion if it beats the present one, and record the reason either way.

    The first champion has to beat its own baseline. Called again for the same run it returns the decision
    that was taken; an attempt that died between the change and the record is recognised in the pointer.

    Returns:
        The decision, also in ``promotion.json``: ``promoted``, ``reason``, ``metric``, ``value``, ``baseline``,
        ``margin``, ``max_loss``, ``champion`` (the one it was compared with: run and value; None for the first),
        ``figures`` (of every metric the run's and the champion's, None where it has none), ``pointer``, ``time``.

    Raises:
        UserError: the pointer changed under every one of many attempts.
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


def foresee(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    """The decision on record, or else the one that :func:`promote` would take now; changes nothing.

    Returns:
        ``promoted``, ``reason``, and ``decided``: whether it is on record.
    """
    try:
        return store.get_json(join_uri(run_uri, PROMOTION)) | {"decided": True}
    except NotFound:
        pass
    figure = metric_figure(store, run_uri, config.promotion.metric)
    if isinstance(figure, str):
        return {"promoted": False, "reason": figure, "decided": False}
    present = store.read_pointer(_pointer_uri(run_uri, config))
    if present is not None and (earlier := _own_entry(present.value, run_uri)):
        return {"promoted": True, "reason": earlier.get("reason", _EARLIER), "decided": False}
    promoted, reason = _verdict(run_uri, figure, present, store, config)
    return {"promoted": promoted, "reason": reason, "decided": False}


def metric_figure(store: ObjectStore, run_uri: str, metric: str) -> Figure | str:
    """The run's figure of a metric (``knn/<k>``, ``linear``, ``transfer/<set>``), or why there is none."""
    name = _evaluation(metric)
    result = read_result(store, run_uri, name)
    if result is None:
        return f"{metric} was not measured: the run has no result {name}"
    return _figure(result, metric, "trained", "baseline")


def beats(value: float, champion: float, margin: float) -> bool:
    """Whether ``value`` is higher than the champion's by at least ``margin``; an equal one is not better."""
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
            "figures": _side_by_side(run_uri, present, store, config),
            "pointer": pointer,
            "time": now(),
        }

    present: Pointer | None = None
    figure = metric_figure(store, run_uri, metric)
    if isinstance(figure, str):
        return decision(False, figure)
    if store.read_manifest(join_uri(run_uri, "backbone")) is None:
        return decision(False, "the run has published no backbone")
    lost, retraining = "", is_retraining(run_uri, store)
    for _ in range(_ATTEMPTS):
        present = store.read_pointer(pointer)
        if present is not None and (earlier := _own_entry(present.value, run_uri)):
            # An earlier attempt of this run changed the pointer and died before it wrote so.
            return decision(True, earlier.get("reason", _EARLIER), earlier.get("compared"))
        champion = _compared(present)
        if retraining and present is not None:
            compare_with_champion(run_uri, store, config, present.value)
        promoted, reason = _verdict(run_uri, figure, present, store, config)
        if not promoted:
            return decision(False, lost + reason, champion)
        value = _pointer_value(run_uri, figure, metric, lost + reason, present)
        if store.swap_pointer(pointer, value, present):
            return decision(True, lost + reason, champion)
        lost = "another run became champion in the meantime; "
    raise UserError(f"pointer {pointer}: changed under {_ATTEMPTS} attempts; run the step again")


def _pointer_uri(run_uri: str, config: Config) -> str:
    return pointer_uri(split_uri(run_uri)[0], config.promotion.pointer)


def _verdict(
    run_uri: str, figure: Figure, present: Pointer | None, store: ObjectStore, config: Config
) -> tuple[bool, str]:
    metric, margin = config.promotion.metric, config.promotion.margin
    if present is None:
        told = f"{metric} {figure.value:.2f} against {figure.baseline:.2f} of the baseline"
        if figure.value > figure.baseline:
            return True, f"first champion: {told}"
        return False, f"no better than the baseline: {told}"
    champion = _champion_figure(run_uri, present, store, metric)
    if isinstance(champion, str):
        return False, f"cannot be compared with the champion {present.value['run']}: {champion}"
    if champion.task != figure.task:
        return False, (
            f"cannot be compared with the champion {present.value['run']}: it was measured on other classes; "
            "name another promotion.pointer for another task"
        )
    told = f"{metric} {figure.value:.2f} against {champion.value:.2f} of the champion {present.value['run']}"
    if not beats(figure.value, champion.value, margin):
        return False, f"{'no better' if figure.value <= champion.value else f'not better by {margin:g}'}: {told}"
    if losses := _too_much_lost(run_uri, present, store, config):
        return False, f"better: {told}; but {losses}"
    return True, f"better: {told}" + (f", margin {margin:g}" if margin else "")


def _too_much_lost(run_uri: str, present: Pointer, store: ObjectStore, config: Config) -> str:
    """The transfer sets on which the champion is better by more than is allowed, in words; empty if there are none."""
    allowed, losses = config.promotion.max_loss, []
    for transfer_set in config.evaluation.transfer:
        metric = f"transfer/{transfer_set.name}"
        own, champion = metric_figure(store, run_uri, metric), _champion_figure(run_uri, present, store, metric)
        # A figure that one of them lacks, or has of other classes, says nothing about a loss.
        if isinstance(own, Figure) and isinstance(champion, Figure) and own.task == champion.task:
            loss = champion.value - own.value
            if allowed is not None and loss > allowed + _TOLERANCE:
                losses.append(f"{metric} fell by {loss:.2f} points to {own.value:.2f}")
    return f"{' and '.join(losses)}, more than the allowed {allowed:g}" if losses else ""


def _champion_figure(run_uri: str, present: Pointer, store: ObjectStore, metric: str) -> Figure | str:
    """The champion's figure: on the run's own images if it was measured on them; else that of the pointer if it tells
    this metric, else of its run's results.
    """
    pointer = present.value
    if (compared := read_comparison(run_uri, store, pointer)) is not None:
        result = compared["results"].get(_evaluation(metric))
        return f"{metric} was not measured" if result is None else _figure(result, metric, CHAMPION, CHAMPION)
    if pointer.get("metric") == metric and {"value", "baseline", "task"} <= pointer.keys():
        return Figure(float(pointer["value"]), float(pointer["baseline"]), str(pointer["task"]))
    return metric_figure(store, str(pointer["run"]), metric)


def _side_by_side(
    run_uri: str, present: Pointer | None, store: ObjectStore, config: Config
) -> dict[str, dict[str, float | None]]:
    """Every figure of the run beside the champion's."""
    names = ("knn", "linear", *(f"transfer-{s.name}" for s in config.evaluation.transfer))
    results = [result for name in names if (result := read_result(store, run_uri, name)) is not None]
    found: dict[str, dict[str, float | None]] = {}
    for metric in (metric for result in results for metric in result["results"].get("trained", {})):
        both = (
            metric_figure(store, run_uri, metric),
            "there is no champion" if present is None else _champion_figure(run_uri, present, store, metric),
        )
        run, champion = (figure.value if isinstance(figure, Figure) else None for figure in both)
        found[metric] = {"run": run, "champion": champion}
    return found


def _evaluation(metric: str) -> str:
    """The name of the evaluation that measures a metric."""
    kind, _, rest = metric.partition("/")
    return f"transfer-{rest}" if kind == "transfer" else kind


def _figure(result: Result, metric: str, model: str, baseline: str) -> Figure | str:
    """The figure of a model in a result, or why there is none."""
    if result["status"] != "measured":
        return f"{metric} was left out: {result['reason']}"
    figures = result["results"]
    if metric not in figures[model]:
        return f"{metric} was not measured; {result['name']} has {', '.join(figures[model])}"
    value, compared = float(figures[model][metric]), float(figures[baseline][metric])
    if not math.isfinite(value) or not math.isfinite(compared):
        return f"{metric} is not a number: {value} {model}, {compared} {baseline}"
    return Figure(value, compared, _task_digest(result["classes"]))


def _pointer_value(run_uri: str, figure: Figure, metric: str, reason: str, present: Pointer | None) -> dict[str, Any]:
    value = {
        "run": run_uri,
        "backbone": join_uri(run_uri, "backbone"),
        "metric": metric,
        "value": figure.value,
        "baseline": figure.baseline,
        "task": figure.task,
        "reason": reason,
        "compared": _compared(present),
        "time": now(),
    }
    return with_history(value, None if present is None else present.value)


def _own_entry(pointer: dict[str, Any], run_uri: str) -> dict[str, Any] | None:
    entries = [pointer, *reversed(pointer.get("history", []))]
    return next((entry for entry in entries if entry.get("run") == run_uri), None)


def _compared(present: Pointer | None) -> dict[str, Any] | None:
    return None if present is None else {key: present.value.get(key) for key in ("run", "metric", "value")}


def _task_digest(classes: list[str]) -> str:
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]
