"""The charts of a training: is it learning, is the teacher healthy, what did the schedules do, how fast was it."""

from __future__ import annotations

import math
from typing import Any

from esvit_core.config import Config
from esvit_core.reporting.charts import Chart, Line, curve


def training_charts(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> list[Chart]:
    """Those of the charts that the log has figures for, the loss first.

    Args:
        log: as :func:`esvit_core.monitoring.log.read_log` returns it.
        resumes: steps from which the training went on, marked in every chart.
    """
    charts = [_loss(log, config, resumes), *_teacher(log, config, resumes), *_course(log, resumes)]
    return [chart for chart in charts if chart is not None]


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


def _teacher(log: list[dict[str, Any]], config: Config, resumes: list[int]) -> list[Chart | None]:
    uniform = math.log(config.head.out_dim)
    return [
        curve(
            "Prototypes in use",
            f"Entropy of the teacher's mean distribution, nats: {uniform:.2f} when all {config.head.out_dim:,} prototypes "
            "are used alike, 0 when one takes everything (a collapse).",
            [Line.of("view", log, "entropy_view"), Line.of("region", log, "entropy_region")],
            name="entropy",
            resumes=resumes,
            reference=(uniform, "all alike"),
            from_zero=True,
        ),
        curve(
            "What a picture tells",
            "Divergence of a picture's distribution from the mean one, nats. 0 would mean that the teacher says the same "
            "of every picture.",
            [Line.of("view", log, "kl_view"), Line.of("region", log, "kl_region")],
            name="kl",
            resumes=resumes,
            from_zero=True,
        ),
        curve(
            "Spread of the features",
            "Of the teacher's unit view features: 0 if all pictures look alike to it, 1 if they point in all directions.",
            [Line.of("feature std", log, "feature_std")],
            name="spread",
            resumes=resumes,
            from_zero=True,
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
        single("Speed", "Pictures a second, over all processes.", "images_per_second", from_zero=True),
        single(
            "Waiting for data",
            "Share of the time, %. High means: more workers.",
            "data_wait",
            factor=100,
            from_zero=True,
        ),
    ]
