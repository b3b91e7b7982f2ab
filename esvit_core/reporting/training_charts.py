"""The charts of a training: loss, diagnostics of student and teacher, schedules and speed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from esvit_core.config import Config
from esvit_core.reporting.charts import Chart, Line, curve


def training_charts(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> list[Chart]:
    """Draw the charts for which the log has figures, the loss first.

    Args:
        log: training log from :func:`esvit_core.runs.log.read_log`.
        resumes: steps from which the training resumed, marked in every chart.
    """
    groups = {
        "Objective": [_loss(log, config, resumes)],
        "Student and teacher": _diagnostics(log, config, resumes),
        "Schedules and speed": _schedules_and_speed(log, resumes),
    }
    return [dataclasses.replace(c, group=group) for group, charts in groups.items() for c in charts if c is not None]


def in_groups(charts: list[Chart]) -> list[tuple[str, list[Chart]]]:
    """Group the charts under their headings, in order."""
    return [(group, list(of_group)) for group, of_group in itertools.groupby(charts, key=lambda chart: chart.group)]


def collapse_warnings(log: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """List the warnings of the diagnostics and the reasons why they stopped the run: steps and texts."""
    return [(line["step"], text) for line in log for kind in ("warn", "stop") for text in line.get(kind, ())]


def _loss(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> Chart | None:
    lines = [Line.of("total", log, "loss")]
    caption = "Cross-entropy between the prototype distributions of teacher and student, nats."
    if config.objective.region:
        lines += [Line.of("view", log, "loss_view"), Line.of("region", log, "loss_region")]
        caption += " The total is the mean of the view task and the region task."
    caption += (
        " It need not decrease throughout: the targets of the teacher get harder as it learns, and its temperature rises "
        "at the start."
    )
    return curve("Loss", caption, lines, name="loss", resumes=resumes, wide=True)


def _diagnostics(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> list[Chart | None]:
    """Draw the figures of :mod:`esvit_core.training.diagnostics`."""

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
            f"Of the teacher, nats. {math.log(K):.2f}: all {K:,} prototypes are used equally. 0: one prototype takes "
            "everything (collapse).",
            "entropy",
            reference=(math.log(K), "uniform"),
        ),
        of_tasks(
            "Divergence from the mean distribution",
            "KL divergence of the teacher's distribution of an image (of a region) from the mean distribution, nats. 0: "
            "all images have the same distribution (collapse).",
            "kl",
        ),
        of_tasks(
            "Divergence of student and teacher",
            "KL divergence of the student's distribution from its target between the two global crops, nats: the part of "
            "the loss that can still be reduced.",
            "student_kl",
        ),
        of_tasks(
            "Prototypes in use",
            f"Prototypes out of {K:,} that are the teacher's first choice somewhere in a batch. A larger batch uses more.",
            "prototypes",
        ),
        of_tasks("Norm of the center", "0 throughout would mean that there is no centering.", "center_norm"),
        single(
            "Spread of the features",
            "Standard deviation of the teacher's unit view features. 0: all are equal. 1: they point in all directions.",
            "feature_std",
        ),
        single(
            "Effective rank of the features",
            "RankMe: effective number of dimensions of the teacher's view features, at most the number of views in a batch.",
            "feature_rank",
        ),
        single(
            "Mutual matches",
            "Share of the student's regions that are the best match of their best match in the other crop, %.",
            "mutual_matches",
            factor=100,
        ),
    ]


def _schedules_and_speed(log: list[dict[str, Any]], resumes: list[int]) -> list[Chart | None]:
    def single(title: str, caption: str, key: str, factor: float = 1.0, from_zero: bool = False) -> Chart | None:
        line = Line.of(title.lower(), log, key, factor)
        return curve(title, caption, [line], name=key.replace("_", "-"), resumes=resumes, from_zero=from_zero)

    return [
        single("Learning rate", "Linear warm-up, then a cosine schedule.", "lr", from_zero=True),
        single("Teacher temperature", "A lower temperature makes the targets sharper.", "teacher_temp"),
        single("Teacher momentum", "Share of the teacher's weights that each step keeps.", "teacher_momentum"),
        single("Gradient norm", "Of the student, before clipping.", "grad_norm", from_zero=True),
        single("Speed", "Images per second, over all processes.", "images_per_second", from_zero=True),
        single(
            "Waiting for data",
            "Share of the time, %. If high, raise `training.workers`.",
            "data_wait",
            factor=100,
            from_zero=True,
        ),
    ]
