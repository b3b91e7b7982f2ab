"""Linear probe: a linear classifier on frozen features (EsViT, section 4; ``eval_linear.py`` of the published code).

It differs from the published protocol in one point: it trains on features of the evaluation transform, computed once,
whereas the published code draws a new random crop and flip of every image in every epoch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from esvit_core.config import Config, LinearConfig
from esvit_core.evaluation.labels import Task, run_task
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import Result, left_out, measure_once, measured
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.storage import ObjectStore

_REFERENCE_BATCH = 256  # batch size that the configured learning rate refers to
_CONFUSION_CLASSES = 100  # maximum number of classes of a confusion matrix
_MIN_VALUES_FOR_THREADS = 1 << 20  # of a batch


@dataclass(frozen=True)
class ProbeOutcome:
    """Outcome of a probe.

    Attributes:
        last: accuracy after the last epoch, percent.
        best: accuracy of the best epoch, chosen on the same test images, percent; the published code prints it.
        best_epoch: the best epoch, from 1.
        top5: top-5 accuracy after the last epoch, percent.
        predictions: class of each test image after the last epoch, (M,).
    """

    last: float
    best: float
    best_epoch: int
    top5: float
    predictions: np.ndarray


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    config: LinearConfig,
    seed: int = 0,
    label: str = "linear probe",
) -> ProbeOutcome:
    """Train a linear classifier with SGD (momentum 0.9, no weight decay, cosine schedule to 0 by epoch).

    The learning rate is ``config.lr * batch / 256``; features are not standardized.

    Args:
        train, test: features, (N, D) and (M, D) float32.
        train_labels, test_labels: classes from 0, (N,) and (M,).
        classes: number of classes C.
        config: batch size, learning rate and epochs.
        seed: seed of the weights (normal, 0.01) and of the order of the images; there is no other randomness.
        label: first word of the progress lines.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    probe = nn.Linear(train.shape[1], classes)
    nn.init.normal_(probe.weight, std=0.01, generator=generator)
    nn.init.zeros_(probe.bias)
    probe.to(device)
    x, y = torch.as_tensor(train).to(device), torch.as_tensor(train_labels).to(device)
    x_test, truth = torch.as_tensor(test).to(device), torch.as_tensor(test_labels).to(device)
    batch = min(config.batch_size, len(x))
    optimizer = torch.optim.SGD(probe.parameters(), lr=config.lr * batch / _REFERENCE_BATCH, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs, eta_min=0)
    best, best_epoch, ranking = -1.0, 0, torch.empty(0)
    with _threads_for(batch * train.shape[1]), ProgressLine(config.epochs, unit="epochs", label=label) as progress:
        for epoch in range(1, config.epochs + 1):
            for chosen in torch.randperm(len(x), generator=generator).to(device).split(batch):
                loss = F.cross_entropy(probe(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                ranking = probe(x_test).topk(min(5, classes)).indices  # (M, 5)
            last = _percent(ranking[:, 0] == truth)
            if last > best:
                best, best_epoch = last, epoch
            progress.update(1, loss=loss.item(), accuracy=last)
    top5 = _percent((ranking == truth[:, None]).any(1))
    return ProbeOutcome(last, best, best_epoch, top5, ranking[:, 0].cpu().numpy())


def evaluate_linear(run_uri: str, store: ObjectStore, config: Config) -> Result:
    """Evaluate a linear probe of both backbones on the averages of their last blocks.

    The result is written once to ``evaluation/linear.json``: ``linear`` is the accuracy after the last epoch, which does
    not depend on the test images; ``linear/best`` is that of the best epoch, the figure of the published code.
    ``confusion`` counts the predictions of the trained backbone (rows: true class, columns: predicted).
    """
    return measure_once(store, run_uri, "linear", lambda: measure_linear(run_task(run_uri, store), config))


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> list[list[int]]:
    """Count the predictions (columns) of each true class (rows), (C, C)."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes).tolist()


def measure_linear(task: Task | str, config: Config) -> Result:
    """Measure the task for every model in it."""
    if isinstance(task, str):
        return left_out("linear", task)
    classes = len(task.classes)
    outcomes = {
        model: linear_probe(
            train.blocks,
            train.labels,
            val.blocks,
            val.labels,
            classes,
            config.evaluation.linear,
            config.seed,
            label=f"linear probe of the {model} backbone",
        )
        for model, (train, val) in task.splits.items()
    }
    more = {}
    if classes <= _CONFUSION_CLASSES and "trained" in outcomes:
        truth = task.splits["trained"][1].labels
        more["confusion"] = confusion_matrix(truth, outcomes["trained"].predictions, classes)
    result = measured(
        "linear",
        {model: {"linear": o.last, "linear/best": o.best} for model, o in outcomes.items()},
        task.classes,
        notes=task.notes,
        top5={model: {"linear": round(o.top5, 4)} for model, o in outcomes.items()},
        best_epoch={model: o.best_epoch for model, o in outcomes.items()},
        **more,
    )
    # The best epoch was chosen on the test images, so a test of its figure would mean nothing.
    correct = {model: {"linear": o.predictions == task.splits[model][1].labels} for model, o in outcomes.items()}
    return keep_outcomes(result, pack_outcomes(task.held_out, correct))


@contextlib.contextmanager
def _threads_for(values: int) -> Iterator[None]:
    """Use one thread for steps on few values, in which the threads of a busy machine mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if values < _MIN_VALUES_FOR_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _percent(correct: torch.Tensor) -> float:
    return int(correct.sum()) * 100 / len(correct)
