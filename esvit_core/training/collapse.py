"""The ways in which self-distillation collapses, and the decision that a run is on one of them.

The objective has trivial solutions (EsViT, section 3; DINO, section 5.3 studies them): the backbone gives every
image the same feature, or the teacher every image the same prototype, or every image the uniform distribution.
Centring works against the second, sharpening against the third. All of them end the same way, the loss flat and the
features worthless, hours before anybody looks: so the run watches its diagnostics, warns, and stops with the name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from esvit_core.config import DiagnosticsConfig

UNIFORM_SHARE = 0.95  # of log K: a mean distribution with more entropy uses all prototypes alike


@dataclass(frozen=True)
class Sign:
    """A figure that has been too low for too long.

    Attributes:
        kind: what follows from it.
        figure: its name in the log.
        what: it means.
        since, step: the first step at which it was too low, and the present one.
        value, bound: of the figure.
        advice: settings to change.
    """

    kind: Literal["warn", "stop"]
    figure: str
    what: str
    since: int
    step: int
    value: float
    bound: float
    advice: str

    def __str__(self) -> str:
        """Reason and advice in one line."""
        return (
            f"{self.what} from step {self.since} to {self.step} "
            f"({self.figure} {self.value:.3g}, expected at least {self.bound:g}); {self.advice}"
        )


@dataclass(frozen=True)
class _Watched:
    figure: str  # as Diagnostics calls it
    bounds: str  # as DiagnosticsConfig calls them, without _warn and _stop
    what: str
    advice: str
    causes: tuple[str, ...] = ()  # figures that explain this one when they are too low themselves


def _of_task(task: str, thing: str) -> tuple[_Watched, ...]:
    sharper = "lower objective.teacher_temp and objective.warmup_teacher_temp, or lower optimizer.lr"
    flatter = "raise objective.teacher_temp and objective.warmup_teacher_temp, lower objective.center_momentum or optimizer.lr"
    constant, concentrated = "feature_std", f"entropy_{task}"
    return (
        _Watched(f"entropy_{task}", "entropy", f"one prototype for every {thing}", flatter, (constant,)),
        _Watched(
            f"kl_{task}",
            "kl",
            f"the same distribution for every {thing}",
            sharper,
            (constant, concentrated),
        ),
        _Watched(
            f"prototypes_{task}",
            "prototypes",
            f"few prototypes are a {thing}'s first choice",
            flatter,
            (constant, concentrated, f"kl_{task}"),
        ),
    )


_WATCHED = (
    _Watched(
        "feature_std",
        "feature_std",
        "the same feature for every image",
        "lower optimizer.lr, or raise optimizer.teacher_momentum",
    ),
    *_of_task("view", "image"),
    *_of_task("region", "region"),
    _Watched(
        "feature_rank",
        "feature_rank",
        "features of few dimensions",
        "lower optimizer.lr or optimizer.weight_decay_end",
        ("feature_std",),
    ),
    _Watched(
        "mutual_matches",
        "mutual_matches",
        "regions that are no region's best match",
        "raise the smallest augment.global_crops.scale, or set objective.region=false",
        ("feature_std",),
    ),
)


class CollapseWatch:
    """Tells a collapse from a bad moment: only a figure that is too low at every measurement for a while counts.

    Args:
        config: the bounds, and for how many steps a figure may be below them before the watch warns.
        stop_after: the same before it stops the run (``training.collapse_patience``).
        prototypes: K.
    """

    def __init__(self, config: DiagnosticsConfig, stop_after: int, prototypes: int) -> None:
        self._config = config
        self._patience = {"warn": config.warn_after, "stop": stop_after}
        self._uniform = UNIFORM_SHARE * math.log(prototypes)
        # By kind and figure: the first step of the episode below the bound, and whether it has been told.
        self._since: dict[str, int] = {}
        self._told: set[str] = set()

    def observe(self, step: int, figures: Mapping[str, float]) -> list[Sign]:
        """Note the diagnostics of ``step``, by their names in the log.

        Returns:
            The signs that are new, reasons to stop first: each once, until its figure has recovered and sinks again.
            What another sign explains is left out.
        """
        return [*self._signs("stop", step, figures), *self._signs("warn", step, figures)]

    def _signs(self, kind: Literal["warn", "stop"], step: int, figures: Mapping[str, float]) -> list[Sign]:
        low = {w.figure: w for w in _WATCHED if self._is_low(w, kind, figures)}
        for episode in {f"{kind} {w.figure}" for w in _WATCHED if w.figure not in low}:
            self._since.pop(episode, None)
            self._told.discard(episode)
        signs = []
        for figure, watched in low.items():
            episode = f"{kind} {figure}"
            since = self._since.setdefault(episode, step)
            explained = any(cause in low for cause in watched.causes)
            if explained or episode in self._told or step - since < self._patience[kind]:
                continue
            self._told.add(episode)
            what, advice = self._meaning(watched, figures)
            bound = getattr(self._config, f"{watched.bounds}_{kind}")
            signs.append(Sign(kind, figure, what, since, step, figures[figure], bound, advice))
        return signs

    def _is_low(self, watched: _Watched, kind: Literal["warn", "stop"], figures: Mapping[str, float]) -> bool:
        bound: float | None = getattr(self._config, f"{watched.bounds}_{kind}")
        return bound is not None and figures.get(watched.figure, math.inf) < bound

    def _meaning(self, watched: _Watched, figures: Mapping[str, float]) -> tuple[str, str]:
        """What the low figure means, and what to change; other figures tell it more exactly than it does alone."""
        task = watched.figure.rpartition("_")[2]
        if watched.bounds == "entropy" and figures.get(f"center_norm_{task}") == 0:
            return (
                f"{watched.what}, without centering",
                "lower objective.center_momentum, which keeps the center at zero",
            )
        if watched.bounds == "kl" and figures.get(f"entropy_{task}", 0.0) > self._uniform:
            return watched.what.replace("same", "uniform"), watched.advice
        return watched.what, watched.advice

    def state_dict(self) -> dict[str, Any]:
        return {"since": dict(self._since), "told": sorted(self._told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # A checkpoint of version 0.1.0 has the episodes of sentences: they begin anew.
        self._since, self._told = dict(state.get("since", {})), set(state.get("told", ()))
