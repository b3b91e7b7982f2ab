"""The charts of a training: is it learning, is the teacher healthy, what did the schedules do, how fast was it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from esvit_core.config import Config
from esvit_core.reporting.charts import Chart, Line, curve


def training_charts(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> list[Chart]:
    """Those of the charts that the log has figures for, the loss first.

    Args:
        log: as :func:`esvit_core.runs.log.read_log` returns it.
        resumes: steps from which the training went on, marked in every chart.
    """
    groups = {
        "Objective": [_loss(log, config, resumes)],
        "Student and teacher": _diagnostics(log, config, resumes),
        "Schedules and speed": _course(log, resumes),
    }
    return [dataclasses.replace(c, group=group) for group, charts in groups.items() for c in charts if c is not None]


def in_groups(charts: list[Chart]) -> list[tuple[str, list[Chart]]]:
    """The charts by what they are shown with, in their order."""
    return [(group, list(of_group)) for group, of_group in itertools.groupby(charts, key=lambda chart: chart.group)]


def told_signs(log: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """What the diagnostics warned of and why they stopped the run: steps and texts."""
    return [(line["step"], text) for line in log for kind in ("warn", "stop") for text in line.get(kind, ())]


def _loss(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> Chart | None:
    lines = [Line.of("total", log, "loss")]
    caption = "Cross-entropy between the teacher's and the student's prototypes, nats."
    if config.objective.region:
        lines += [Line.of("view", log, "loss_view"), Line.of("region", log, "loss_region")]
        caption += " The total is half the view task and half the region task."
    caption += (
        " It need not fall all the way: the teacher's targets get harder as it learns, and at the start its temperature "
        "rises."
    )
    return curve("Loss", caption, lines, name="loss", resumes=resumes, wide=True)


def _diagnostics(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> list[Chart | None]:
    """What the figures are: :mod:`esvit_core.training.diagnostics`."""

    def of_tasks(title: str, caption: str, key: str, **more: Any) -> Chart | None:
        lines = [Line.of(task, log, f"{key}_{task}") for task in ("view", "region")]
        return curve(title, caption, lines, name=key.replace("_", "-"), resumes=resumes, from_zero=True, **more)

    def single(title: str, caption: str, key: str, factor: float = 1.0) -> Chart | None:
        line = Line.of(title.lower(), log, key, factor)
        return curve(title, caption, [line], name=key.replace("_", "-"), resumes=resumes, from_zero=True)

    K = config.head.out_dim
    return [
        of_tasks(
            "Entropy of the mean distribution",
            f"Of the teacher, nats: {math.log(K):.2f} when all {K:,} prototypes are used alike, 0 when one takes "
            "everything (a collapse).",
            "entropy",
            reference=(math.log(K), "all alike"),
        ),
        of_tasks(
            "What an image tells",
            "Divergence of the teacher's distribution of an image (of a region) from the mean one, nats. 0 would mean "
            "that it says the same of all.",
            "kl",
        ),
        of_tasks(
            "Student behind teacher",
            "Divergence of the student's distribution from its target between the two global crops, nats: what of the "
            "loss it can still win.",
            "student_kl",
        ),
        of_tasks(
            "Prototypes in use",
            f"Of {K:,}, those that are the teacher's first choice somewhere in a batch. A larger batch shows more.",
            "prototypes",
        ),
        of_tasks("Norm of the center", "0 throughout would mean no centering.", "center_norm"),
        single(
            "Spread of the features",
            "Of the teacher's unit view features: 0 if all images look alike to it, 1 if they point in all directions.",
            "feature_std",
        ),
        single(
            "Effective rank of the features",
            "RankMe: over how many directions the teacher's view features are spread, at most as many as a batch has views.",
            "feature_rank",
        ),
        single(
            "Mutual matches",
            "Share of the student's regions that are the best match of their own best match in the other crop, %.",
            "mutual_matches",
            factor=100,
        ),
    ]


def _course(log: list[dict[str, Any]], resumes: list[int]) -> list[Chart | None]:
    def single(title: str, caption: str, key: str, factor: float = 1.0, from_zero: bool = False) -> Chart | None:
        line = Line.of(title.lower(), log, key, factor)
        return curve(title, caption, [line], name=key.replace("_", "-"), resumes=resumes, from_zero=from_zero)

    return [
        single("Learning rate", "Warm-up, then a cosine.", "lr", from_zero=True),
        single("Teacher temperature", "The lower, the sharper its targets.", "teacher_temp"),
        single("Teacher momentum", "How much of the teacher stays at each step.", "teacher_momentum"),
        single("Gradient norm", "Of the student, before clipping.", "grad_norm", from_zero=True),
        single("Speed", "Images a second, over all processes.", "images_per_second", from_zero=True),
        single(
            "Waiting for data",
            "Share of the time, %. High means: more workers.",
            "data_wait",
            factor=100,
            from_zero=True,
        ),
    ]
