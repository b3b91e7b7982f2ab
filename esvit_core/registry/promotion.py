"""Promotion: move the ``champion`` pointer to a new backbone that beats the current champion.

``promotion_rule.py`` decides whether a backbone beats the champion. The pointer is changed by compare-and-swap: of two runs that finish at the same time one wins, and the
other is compared with the winner.
"""

from __future__ import annotations

import json
from typing import Any

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.evaluation.results import read_result
from esvit_core.evaluation.significance import Difference
from esvit_core.registry.champions import pointer_uri, timestamp, with_history
from esvit_core.registry.comparison import compare_with_champion, is_retraining
from esvit_core.registry.metric_figures import TRAINED, Figure, champion_figure, metric_figure
from esvit_core.registry.promotion_rule import Judgement, judge_against, judge_first
from esvit_core.runs.run import PROMOTION
from esvit_core.storage import ObjectStore, Pointer, join_uri, split_uri
from esvit_core.storage.store_errors import NotFound

_ATTEMPTS = 20
_EARLIER = "promoted by an earlier attempt"


def promote(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    """Make the run's backbone the champion if it beats the current one, and record the reason either way.

    The first champion has to beat its own baseline. Another call for the same run returns the recorded decision. If an
    attempt died after it changed the pointer and before it recorded the decision, the pointer shows that.

    Returns:
        The decision, which is also in ``promotion.json``: ``promoted``, ``reason``, ``metric``, ``value``, ``baseline``,
        ``rule``, ``margin``, ``max_loss``, ``difference`` (of the metric, with its interval; None if it has none),
        ``champion`` (run and value of the champion it was compared with; None for the first), ``figures`` (every metric of
        the run and of the champion, None where not measured), ``differences`` (of these, where they have an interval),
        ``pointer``, ``time``.

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
    judgement = _judge(run_uri, figure, current, store, config)
    return {"promoted": judgement.promoted, "reason": judgement.reason, "decided": False}


def _decide_and_swap(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    metric = config.promotion.metric
    pointer = _pointer_uri(run_uri, config)

    def decision(
        promoted: bool, reason: str, champion: dict[str, Any] | None = None, difference: Difference | None = None
    ) -> dict[str, Any]:
        figures, differences = _side_by_side(run_uri, current, store, config)
        return {
            "promoted": promoted,
            "reason": reason,
            "metric": metric,
            "value": figure.value if isinstance(figure, Figure) else None,
            "baseline": figure.baseline if isinstance(figure, Figure) else None,
            "rule": config.promotion.rule,
            "margin": config.promotion.margin,
            "max_loss": config.promotion.max_loss,
            "difference": difference.as_json() if difference else None,
            "champion": champion,
            "figures": figures,
            "differences": differences,
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
        judgement = _judge(run_uri, figure, current, store, config)
        reason = lost + judgement.reason
        if not judgement.promoted:
            return decision(False, reason, champion, judgement.difference)
        value = _pointer_value(run_uri, figure, metric, reason, current)
        if store.swap_pointer(pointer, value, current):
            return decision(True, reason, champion, judgement.difference)
        lost = "another run became champion in the meantime; "
    raise UserError(f"pointer {pointer}: changed during each of {_ATTEMPTS} attempts; run the step again")


def _pointer_uri(run_uri: str, config: Config) -> str:
    return pointer_uri(split_uri(run_uri)[0], config.promotion.pointer)


def _judge(run_uri: str, figure: Figure, current: Pointer | None, store: ObjectStore, config: Config) -> Judgement:
    if current is None:
        return judge_first(figure, config)
    sets = []
    for transfer_set in config.evaluation.transfer:
        metric = f"transfer/{transfer_set.name}"
        own, theirs = metric_figure(store, run_uri, metric), champion_figure(run_uri, current.value, store, metric)
        # A missing figure, or one on other classes, is no evidence of a loss.
        if isinstance(own, Figure) and isinstance(theirs, Figure) and own.task == theirs.task:
            sets.append((own, theirs))
    champion = champion_figure(run_uri, current.value, store, config.promotion.metric)
    return judge_against(figure, champion, str(current.value["run"]), sets, config)


def _side_by_side(
    run_uri: str, current: Pointer | None, store: ObjectStore, config: Config
) -> tuple[dict[str, dict[str, float | None]], dict[str, dict[str, Any]]]:
    """Return every figure of the run with the champion's, and their differences where these have an interval."""
    names = ("knn", "linear", *(f"transfer-{s.name}" for s in config.evaluation.transfer))
    results = [result for name in names if (result := read_result(store, run_uri, name)) is not None]
    figures: dict[str, dict[str, float | None]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for metric in (metric for result in results for metric in result["results"].get(TRAINED, {})):
        both = (
            metric_figure(store, run_uri, metric),
            "there is no champion" if current is None else champion_figure(run_uri, current.value, store, metric),
        )
        run, champion = (figure.value if isinstance(figure, Figure) else None for figure in both)
        figures[metric] = {"run": run, "champion": champion}
        own, theirs = both
        if isinstance(own, Figure) and isinstance(theirs, Figure) and own.task == theirs.task:
            compared = own.compared_with(theirs)
            if isinstance(compared, Difference):
                differences[metric] = compared.as_json()
    return figures, differences


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
