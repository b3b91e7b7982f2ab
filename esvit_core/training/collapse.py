"""Detect that self-distillation collapses, and how.

The objective has trivial solutions (EsViT, section 3; DINO, section 5.3 studies them): the backbone gives every image
the same feature, the teacher gives every image the same prototype, or the teacher gives every image the uniform
distribution. Centering counteracts the second, sharpening the third. In each case the loss goes flat and the features
are worthless, hours before anybody looks. So the run checks its diagnostics, warns, and stops with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from esvit_core.config import DiagnosticsConfig

UNIFORM_SHARE = 0.95  # of log K: a mean distribution with a higher entropy counts as uniform


@dataclass(frozen=True)
class CollapseSign:
    """A diagnostic that has been below its bound for too long.

    Attributes:
        kind: whether to warn or to stop the run.
        figure: name of the diagnostic in the log.
        meaning: what its low value means.
        since: first step at which it was below the bound.
        step: current step.
        value, bound: current value of the diagnostic, and its bound.
        advice: settings to change.
    """

    kind: Literal["warn", "stop"]
    figure: str
    meaning: str
    since: int
    step: int
    value: float
    bound: float
    advice: str

    def __str__(self) -> str:
        """Return reason and advice in one line."""
        return (
            f"{self.meaning} from step {self.since} to {self.step} "
            f"({self.figure} {self.value:.3g}, expected at least {self.bound:g}); {self.advice}"
        )


@dataclass(frozen=True)
class _Indicator:
    figure: str  # name in Diagnostics
    bounds: str  # name in DiagnosticsConfig, without _warn and _stop
    meaning: str
    advice: str
    causes: tuple[str, ...] = ()  # diagnostics whose low value explains this one


def _task_indicators(task: str, unit: str) -> tuple[_Indicator, ...]:
    sharper = "lower objective.teacher_temp and objective.warmup_teacher_temp, or lower optimizer.lr"
    flatter = "raise objective.teacher_temp and objective.warmup_teacher_temp, lower objective.center_momentum or optimizer.lr"
    constant, concentrated = "feature_std", f"entropy_{task}"
    return (
        _Indicator(f"entropy_{task}", "entropy", f"one prototype for every {unit}", flatter, (constant,)),
        _Indicator(
            f"kl_{task}",
            "kl",
            f"the same distribution for every {unit}",
            sharper,
            (constant, concentrated),
        ),
        _Indicator(
            f"prototypes_{task}",
            "prototypes",
            f"few prototypes are a {unit}'s first choice",
            flatter,
            (constant, concentrated, f"kl_{task}"),
        ),
    )


_INDICATORS = (
    _Indicator(
        "feature_std",
        "feature_std",
        "the same feature for every image",
        "lower optimizer.lr, or raise optimizer.teacher_momentum",
    ),
    *_task_indicators("view", "image"),
    *_task_indicators("region", "region"),
    _Indicator(
        "feature_rank",
        "feature_rank",
        "features of few dimensions",
        "lower optimizer.lr or optimizer.weight_decay_end",
        ("feature_std",),
    ),
    _Indicator(
        "mutual_matches",
        "mutual_matches",
        "regions that are no region's best match",
        "raise the smallest augment.global_crops.scale, or set objective.region=false",
        ("feature_std",),
    ),
)


class CollapseDetector:
    """Detects a collapse from diagnostics that stay below their bounds at every measurement for many steps.

    Args:
        config: the bounds, and the number of steps below a bound after which the detector warns.
        stop_after: number of steps below a bound after which the run stops (``training.collapse_patience``).
        prototypes: K.
    """

    def __init__(self, config: DiagnosticsConfig, stop_after: int, prototypes: int) -> None:
        self._config = config
        self._patience = {"warn": config.warn_after, "stop": stop_after}
        self._uniform = UNIFORM_SHARE * math.log(prototypes)
        # By kind and diagnostic: the first step below the bound, and the episodes that have been reported.
        self._since: dict[str, int] = {}
        self._reported: set[str] = set()

    def observe(self, step: int, figures: Mapping[str, float]) -> list[CollapseSign]:
        """Add the diagnostics of ``step``, by their names in the log.

        Returns:
            New signs, those that stop the run first. A sign is reported once, and again only after its diagnostic has
            recovered in between. Signs that another sign explains are left out.
        """
        return [*self._signs("stop", step, figures), *self._signs("warn", step, figures)]

    def _signs(self, kind: Literal["warn", "stop"], step: int, figures: Mapping[str, float]) -> list[CollapseSign]:
        low = {i.figure: i for i in _INDICATORS if self._is_low(i, kind, figures)}
        for episode in {f"{kind} {i.figure}" for i in _INDICATORS if i.figure not in low}:
            self._since.pop(episode, None)
            self._reported.discard(episode)
        signs = []
        for figure, indicator in low.items():
            episode = f"{kind} {figure}"
            since = self._since.setdefault(episode, step)
            explained = any(cause in low for cause in indicator.causes)
            if explained or episode in self._reported or step - since < self._patience[kind]:
                continue
            self._reported.add(episode)
            meaning, advice = self._explain(indicator, figures)
            bound = getattr(self._config, f"{indicator.bounds}_{kind}")
            signs.append(CollapseSign(kind, figure, meaning, since, step, figures[figure], bound, advice))
        return signs

    def _is_low(self, indicator: _Indicator, kind: Literal["warn", "stop"], figures: Mapping[str, float]) -> bool:
        bound: float | None = getattr(self._config, f"{indicator.bounds}_{kind}")
        return bound is not None and figures.get(indicator.figure, math.inf) < bound

    def _explain(self, indicator: _Indicator, figures: Mapping[str, float]) -> tuple[str, str]:
        """Return what the low value means and what to change; other diagnostics make the explanation more precise."""
        task = indicator.figure.rpartition("_")[2]
        if indicator.bounds == "entropy" and figures.get(f"center_norm_{task}") == 0:
            return (
                f"{indicator.meaning}, without centering",
                "lower objective.center_momentum, which keeps the center at zero",
            )
        if indicator.bounds == "kl" and figures.get(f"entropy_{task}", 0.0) > self._uniform:
            return indicator.meaning.replace("same", "uniform"), indicator.advice
        return indicator.meaning, indicator.advice

    def state_dict(self) -> dict[str, Any]:
        return {"since": dict(self._since), "reported": sorted(self._reported)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since, self._reported = dict(state["since"]), set(state["reported"])
