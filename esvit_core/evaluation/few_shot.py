"""Few-shot classification: logistic regression on the frozen features of few labeled images, repeated with other ones.

A setting is a number of images per class, or a percentage of the labeled training images, which has at least one image of
each class. Each is drawn with five seeds, and the figure is the mean accuracy on all held-out images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esvit_core.config import Config
from esvit_core.evaluation.labels import Task, run_task
from esvit_core.evaluation.results import Result, left_out, measure_once, measured
from esvit_core.evaluation.transfer import logistic_transfer
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.storage import ObjectStore

NAME = "few-shot"
SEEDS = range(5)


def draw_few(labels: np.ndarray, setting: str, seed: int) -> np.ndarray:
    """Draw the training images of a few-shot setting; their indices, sorted.

    The sets of a seed are nested: more images per class are those of fewer and further ones.

    Args:
        labels: classes, (N,).
        setting: images per class, such as ``5``, or a percentage such as ``10%``.
        seed: seed of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    percentage = float(setting[:-1]) if setting.endswith("%") else None
    chosen = []
    for value in np.unique(labels):
        members = order[labels[order] == value]
        count = int(setting) if percentage is None else max(1, round(len(members) * percentage / 100))
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


def evaluate_few_shot(run_uri: str, store: ObjectStore, config: Config) -> Result:
    """Evaluate the settings of ``evaluation.few_shot``; the result is written once to ``evaluation/few-shot.json``."""
    return measure_once(store, run_uri, NAME, lambda: measure_few_shot(run_task(run_uri, store), config))


def measure_few_shot(task: Task | str, config: Config) -> Result:
    """Measure the task for every model in it, on the same draws.

    Returns:
        The result; ``deviation`` is the standard deviation over the seeds, in percentage points.
    """
    settings: Sequence[str] = config.evaluation.few_shot
    headline = f"{NAME}/{settings[-1]}" if settings else NAME
    if not settings:
        return left_out(headline, "evaluation.few_shot is empty")
    if isinstance(task, str):
        return left_out(headline, task)
    figures: dict[str, dict[str, float]] = {model: {} for model in task.splits}
    deviation: dict[str, dict[str, float]] = {model: {} for model in task.splits}
    with ProgressLine(len(task.splits) * len(settings) * len(SEEDS), unit="draws", label="few-shot") as progress:
        for model, (train, val) in task.splits.items():
            for setting in settings:
                found = []
                for seed in SEEDS:
                    few = draw_few(train.labels, setting, seed)
                    outcome = logistic_transfer(
                        train.view[few], train.labels[few], val.view, val.labels, seed=seed, label=None
                    )
                    found.append(outcome.figure)
                    progress.update(1, accuracy=outcome.figure)
                figures[model][f"{NAME}/{setting}"] = float(np.mean(found))
                deviation[model][f"{NAME}/{setting}"] = round(float(np.std(found, ddof=1)), 4)
    notes = [*task.notes, *_small_classes(next(iter(task.splits.values()))[0].labels, settings)]
    return measured(headline, figures, task.classes, notes=notes, deviation=deviation, seeds=len(SEEDS))


def _small_classes(labels: np.ndarray, settings: Sequence[str]) -> list[str]:
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    too_many = [setting for setting in settings if not setting.endswith("%") and int(setting) > smallest]
    if not too_many:
        return []
    return [
        f"few-shot/{', '.join(too_many)}: the smallest class has {smallest:,} training images, all of which are used"
    ]
