"""The rule of the promotion: whether a figure beats another one, and why (``promotion.rule``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esvit_core.config import Config
from esvit_core.evaluation.significance import Difference, describe_difference, too_few
from esvit_core.registry.metric_figures import Figure

_TOLERANCE = 1e-9  # percentage points; in binary floating point 33.1 - 33.0 is slightly less than 0.1
_NO_INTERVAL = "so there is no interval; with promotion.rule margin the points alone decide"


@dataclass(frozen=True)
class Judgement:
    """The outcome of the rule.

    Attributes:
        promoted: whether the backbone becomes the champion.
        reason: the reason in one sentence, with the interval and the number of images where there is one.
        difference: difference of the deciding figure; None if it has no interval.
    """

    promoted: bool
    reason: str
    difference: Difference | None = None


def judge_first(figure: Figure, config: Config) -> Judgement:
    """Decide whether a backbone becomes the first champion: it has to beat its own baseline."""
    compared, difference, comparison = _compare(figure, figure.of_baseline(), "the baseline")
    rule = config.promotion.rule
    if rule == "always":
        return Judgement(True, f"first champion, promotion.rule is always: {comparison}", difference)
    if figure.value <= figure.baseline:
        return Judgement(False, f"no better than the baseline: {comparison}", difference)
    if rule == "significant" and (missing := _not_shown(compared)):
        return Judgement(False, f"not shown to be better than the baseline: {comparison}; {missing}", difference)
    return Judgement(True, f"first champion: {comparison}", difference)


def judge_against(
    figure: Figure, champion: Figure | str, name: str, sets: Sequence[tuple[Figure, Figure]], config: Config
) -> Judgement:
    """Decide whether a backbone replaces the champion.

    Args:
        figure: the run's figure of ``promotion.metric``.
        champion: that of the champion, or the reason why it has none.
        name: address of the champion's run, for the reason.
        sets: figures of the run and of the champion on each transfer set that both were measured on.
    """
    rule, margin = config.promotion.rule, config.promotion.margin
    if isinstance(champion, str) or champion.task != figure.task:
        other = (
            champion
            if isinstance(champion, str)
            else "it was measured on other classes; name another promotion.pointer for another task"
        )
        if rule == "always":
            return Judgement(True, f"promotion.rule is always; not compared with the champion {name}: {other}")
        return Judgement(False, f"cannot be compared with the champion {name}: {other}")
    compared, difference, comparison = _compare(figure, champion, f"the champion {name}")
    if rule == "always":
        return Judgement(True, f"promotion.rule is always: {comparison}", difference)
    if figure.value <= champion.value:
        return Judgement(False, f"no better: {comparison}", difference)
    if rule == "significant" and (missing := _not_shown(compared)):
        return Judgement(False, f"not shown to be better: {comparison}; {missing}", difference)
    if not beats(figure.value, champion.value, margin):
        return Judgement(False, f"not better by {margin:g}: {comparison}", difference)
    if losses := _losses(sets, config):
        return Judgement(False, f"better: {comparison}; but {losses}", difference)
    return Judgement(True, f"better: {comparison}" + (f", margin {margin:g}" if margin else ""), difference)


def beats(value: float, champion: float, margin: float) -> bool:
    """Whether ``value`` is higher than the champion's by at least ``margin``; an equal value is not better."""
    return value > champion and value - champion >= margin - _TOLERANCE


def _not_shown(compared: Difference | str) -> str:
    """Say what is missing to show that a difference is better; empty if it is shown."""
    if isinstance(compared, str):
        return f"{compared}, {_NO_INTERVAL}"
    if compared.decision == "better":
        return ""
    return too_few(compared) or "the figures do not agree with the outcomes of the single images"


def _compare(figure: Figure, other: Figure, owner: str) -> tuple[Difference | str, Difference | None, str]:
    """Return the difference or the reason why it has no interval, the difference if it has one, and both in words."""
    compared = figure.compared_with(other)
    difference = compared if isinstance(compared, Difference) else None
    interval = f": {describe_difference(difference)}" if difference else ""
    return compared, difference, f"{figure.metric} {figure.value:.2f} against {other.value:.2f} of {owner}{interval}"


def _losses(sets: Sequence[tuple[Figure, Figure]], config: Config) -> str:
    """Describe the transfer sets that lose more than ``promotion.max_loss``; empty if there are none."""
    allowed, losses = config.promotion.max_loss, []
    if allowed is None:
        return ""
    for own, champion in sets:
        loss = champion.value - own.value
        if loss <= allowed + _TOLERANCE:
            continue
        compared = own.compared_with(champion)
        if config.promotion.rule == "margin":
            losses.append(f"{own.metric} fell by {loss:.2f} points to {own.value:.2f}")
        elif isinstance(compared, Difference) and compared.decision == "worse":
            losses.append(f"{own.metric} fell to {own.value:.2f}: {describe_difference(compared)}")
    return f"{' and '.join(losses)}, more than the allowed {allowed:g}" if losses else ""
