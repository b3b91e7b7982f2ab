"""Transfer to a labeled dataset: L2-regularized logistic regression on frozen features (EsViT, section 4.2; the linear
probe of CLIP: Radford et al., 2021, appendix A.3).

Lambda is the weight of ``|w|^2 / 2`` relative to the sum of the losses, scikit-learn's ``1 / C``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esvit_core.config import Config, TransferSet
from esvit_core.data.ingest.transfer_set import several_labels_uri
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.evaluation.features import SPLITS, split_datasets
from esvit_core.evaluation.imported_features import NO_NETWORK, has_network
from esvit_core.evaluation.labels import Task, class_names, missing_labels, task_of, unusable_features
from esvit_core.evaluation.logistic_regression import LogisticProblem
from esvit_core.evaluation.outcomes import held_out_digest, keep_outcomes, pack_outcomes, pack_rankings
from esvit_core.evaluation.results import Result, left_out, measure_once, measured
from esvit_core.evaluation.stored_features import transfer_features
from esvit_core.evaluation.transfer_metrics import OF_CLASSES, Metric, metric_of
from esvit_core.evaluation.validation import folds_to_use, validation_folds
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.storage import NotFound, ObjectStore, join_uri

_LOWEST_EXPONENT, _DECADES, _STEPS_PER_DECADE = -6, 12, 8
#: Values of lambda that the search can choose: 96 logarithmic steps over 1e-6 ... 1e6.
LAMBDAS = 10.0 ** (_LOWEST_EXPONENT + np.arange(_DECADES * _STEPS_PER_DECADE + 1) / _STEPS_PER_DECADE)
_FIRST_SPACING = 2 * _STEPS_PER_DECADE  # 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6
_MAX_ITERATIONS = 1_000
_MORE_ITERATIONS = 10_000  # of the final fit
# Largest gradient at the end of a fit, in the search and in the final fit. With scikit-learn's default of 1e-4 a weakly
# regularized fit stops far from its optimum, and the search would compare where fits happen to stop.
_SEARCH_TOLERANCE, _FINAL_TOLERANCE = 1e-5, 1e-7
_SEARCH_DECREASE = 1e-7
_DEFAULT_LAMBDA = 1.0


@dataclass(frozen=True)
class TransferOutcome:
    """Outcome of the regression.

    Attributes:
        figure: metric on the test images, percent.
        strength: chosen lambda.
        validation: metric on the validation folds for every lambda that was tried.
        converged: whether the final fit converged before the iteration limit.
        searched: False if there were too few images for a validation fold, so that lambda is 1.
        correct: whether each test image was classified correctly, (M,) bool; None if the metric is not a share of correct
            images.
        truth, scores: labels and logits of the test images as the metric takes them, (M, C), if it ranks the images.
    """

    figure: float
    strength: float
    validation: dict[float, float]
    converged: bool
    searched: bool
    correct: np.ndarray | None
    truth: np.ndarray | None = None
    scores: np.ndarray | None = None


def search_lambda(score: Callable[[list[float]], list[float]]) -> tuple[float, dict[float, float]]:
    """Search the regularization strength by parametric binary search.

    The search starts with 1e-6, 1e-4, ..., 1e6 and halves the interval around the peak until it has eight steps per
    decade. Where two near each other share the best score, the peak is between them. Of equal scores the strongest
    regularization is chosen.

    Args:
        score: returns the scores of several lambdas on validation images; higher is better.

    Returns:
        The best lambda, and the score of every lambda that was tried.
    """
    scores: dict[int, float] = {}

    def try_out(candidates: Iterable[int]) -> None:
        new = [i for i in candidates if 0 <= i < len(LAMBDAS) and i not in scores]
        if new:
            scores.update(zip(new, score([float(LAMBDAS[i]) for i in new]), strict=True))

    spacing = _FIRST_SPACING
    try_out(range(0, len(LAMBDAS), spacing))
    while spacing > 1:
        best = max(scores, key=lambda i: (scores[i], i))
        equal = [i for i in scores if scores[i] == scores[best] and 0 <= best - i <= 2 * spacing]
        spacing //= 2
        middle = (min(equal) + best) // 2
        if len(equal) != 2:  # a single peak, or a plateau
            try_out((best - spacing, best + spacing))
        elif middle in scores:
            try_out((middle - spacing, middle + spacing))
        else:
            try_out((middle, best + spacing))
    best = max(scores, key=lambda i: (scores[i], i))
    return float(LAMBDAS[best]), {float(LAMBDAS[i]): scores[i] for i in sorted(scores)}


def logistic_transfer(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    metric: Metric = "accuracy",
    seed: int = 0,
    label: str | None = "transfer",
) -> TransferOutcome:
    """Choose lambda by cross-validation on the training set, refit on all of it, and measure on the test set.

    Up to 5,000 training images, every image is in one of five validation folds, and the score of a lambda is the metric of
    the predictions on all folds together. With more images only the first fold is used, a validation split as in CLIP's
    protocol. Neither depends on the test set.

    Args:
        train, test: features, (N, D) and (M, D).
        train_labels, test_labels: classes, (N,) and (M,); or, for ``map_11_point``, 1, 0 (ignored by the metric) or -1 of
            each image and class, (N, C) and (M, C).
        metric: metric of the search and of the result.
        seed: seed of the folds, see :func:`esvit_core.evaluation.validation.validation_folds`.
        label: first word of the progress lines; None: there are none.
    """
    if metric == "map_11_point" and train_labels.ndim == 1:
        train_labels, test_labels = _one_against_all(train_labels, test_labels)
    regression = _Regression(train, train_labels, metric, seed)
    strength = _DEFAULT_LAMBDA
    scores: dict[float, float] = {}
    if regression.folds:
        line = ProgressLine(None, unit="regularization strengths", label=label) if label else nullcontext()
        with line as progress:

            def score(candidates: list[float]) -> list[float]:
                values = regression.score(candidates)
                if progress is not None:
                    for value in values:
                        progress.update(1, validation=value)
                return values

            strength, scores = search_lambda(score)
    logits, converged = regression.test_logits(strength, test)
    answers = regression.answers(logits)
    truth = regression.truth(test_labels)
    figure = metric_of(metric, truth, answers)
    of_images = (answers == test_labels,) if metric in OF_CLASSES else (None, truth, answers)
    return TransferOutcome(figure, strength, scores, converged, bool(scores), *of_images)


class _Regression:
    """The regressions of one training set, each of which starts from that with the nearest lambda."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, metric: Metric, seed: int) -> None:
        self._labels, self._metric = labels, metric
        self.folds = folds_to_use(validation_folds(labels, seed))
        if labels.ndim == 2:
            self._classes, targets = None, labels == 1
        else:
            self._classes, targets = np.unique(labels, return_inverse=True)
        self._problem = LogisticProblem(features, targets)
        self._found: dict[float, Tensor] = {}  # parameters of the fit to each fold, by lambda

    def score(self, strengths: list[float]) -> list[float]:
        """Return the metric of the predictions on all folds together, for each lambda; all are fitted at once."""
        count = len(self.folds)
        used = np.tile(~np.stack(self.folds, 1), len(strengths))
        start = torch.cat([self._nearest(strength) for strength in strengths], 1) if self._found else None
        fits = self._problem.fit(
            np.repeat(strengths, count), used, start, _SEARCH_TOLERANCE, _MAX_ITERATIONS, _SEARCH_DECREASE
        )
        truth = self.truth(np.concatenate([self._labels[held_out] for held_out in self.folds]))
        values = []
        for number, strength in enumerate(strengths):
            self._found[strength] = fits.parameters[:, number * count : (number + 1) * count]
            logits = [
                self._problem.decisions(fits, number * count + i)[held_out] for i, held_out in enumerate(self.folds)
            ]
            values.append(metric_of(self._metric, truth, self.answers(np.concatenate(logits))))
        return values

    def test_logits(self, strength: float, test: np.ndarray) -> tuple[np.ndarray, bool]:
        """Fit to all images; return the logits of the test images, and whether the fit has converged."""
        start = self._nearest(strength)[:, :1] if self._found else None
        fits = self._problem.fit(np.array([strength]), None, start, _FINAL_TOLERANCE, _MORE_ITERATIONS)
        weights, biases = self._problem.coefficients(fits, 0)
        return test.astype(np.float64) @ weights + biases, bool(fits.converged[0])

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """Return what the metric takes: classes or logits."""
        if self._metric not in OF_CLASSES or self._classes is None:
            return logits
        return self._classes[self._problem.classes_of(logits)]

    def truth(self, labels: np.ndarray) -> np.ndarray:
        """Return labels as the metric takes them."""
        if self._metric == "roc_auc" and self._classes is not None:
            return (labels == self._classes[-1]).astype(np.int64)
        return labels

    def _nearest(self, strength: float) -> Tensor:
        return self._found[min(self._found, key=lambda known: abs(np.log(known / strength)))]


def _one_against_all(train_labels: np.ndarray, test_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 for the class of each image and -1 for the others."""
    classes = np.unique(train_labels)
    first, second = (np.where(labels[:, None] == classes, 1, -1) for labels in (train_labels, test_labels))
    return first, second


def evaluate_transfer(run_uri: str, store: ObjectStore, config: Config, set_name: str) -> Result:
    """Evaluate the transfer of both backbones' view features to a dataset prepared at ``transfer/<set>`` of the run.

    The result is written once to ``evaluation/transfer-<set>.json``, with the ``metric`` and the ``lambda`` of each model.

    Raises:
        UserError: the configuration has no dataset of that name.
    """
    chosen = next((s for s in config.evaluation.transfer if s.name == set_name), None)
    if chosen is None:
        names = ", ".join(s.name for s in config.evaluation.transfer) or "none"
        raise UserError(f"transfer set {set_name}: not in evaluation.transfer; the configuration has {names}")

    def measure() -> Result:
        task = transfer_task(run_uri, store, config, set_name) if has_network(store, run_uri) else NO_NETWORK
        return evaluate_task(task, chosen, config.seed)

    return measure_once(store, run_uri, f"transfer-{set_name}", measure)


def evaluate_task(task: Task | str, chosen: TransferSet, seed: int) -> Result:
    """Measure the task for every model in it."""
    key = f"transfer/{chosen.name}"
    if isinstance(task, str):
        return left_out(key, task) | {"metric": chosen.metric}
    if chosen.metric == "roc_auc" and len(task.classes) != 2:
        reason = f"the metric roc_auc needs two classes, the set has {len(task.classes):,}; choose another metric"
        return left_out(key, reason) | {"metric": chosen.metric}
    if task.several_labels is not None and chosen.metric != "map_11_point":
        reason = f"its images have several labels, and {chosen.metric} needs one per image; use the metric map_11_point"
        return left_out(key, reason) | {"metric": chosen.metric}
    outcomes = {
        model: logistic_transfer(
            train.view,
            train.labels if task.several_labels is None else task.several_labels[0],
            val.view,
            val.labels if task.several_labels is None else task.several_labels[1],
            chosen.metric,
            seed,
            label=f"transfer to {chosen.name} of the {model} backbone",
        )
        for model, (train, val) in task.splits.items()
    }
    notes = list(task.notes)
    if not all(o.searched for o in outcomes.values()):
        notes.append("every class has a single training image, so lambda was not searched and is 1")
    unconverged = [model for model, o in outcomes.items() if not o.converged]
    notes += [f"{model}: the fit did not converge in {_MORE_ITERATIONS:,} iterations" for model in unconverged]
    train, val = next(iter(task.splits.values()))
    result = measured(
        key,
        {model: {key: o.figure} for model, o in outcomes.items()},
        task.classes,
        notes=notes,
        metric=chosen.metric,
        samples={"train": len(train), "val": len(val)},
        unconverged={key: unconverged} if unconverged else {},
    ) | {
        "lambda": {model: o.strength for model, o in outcomes.items()},
        "validation": {
            model: {f"{strength:.6g}": round(score, 4) for strength, score in o.validation.items()}
            for model, o in outcomes.items()
            if o.validation
        },
    }
    correct = {model: {key: o.correct} for model, o in outcomes.items() if o.correct is not None}
    if not correct:
        scores = {model: {key: o.scores} for model, o in outcomes.items() if o.scores is not None}
        truth = next(o.truth for o in outcomes.values() if o.truth is not None)
        return keep_outcomes(result, pack_rankings(task.held_out, chosen.metric, truth, scores))
    labels = val.labels if chosen.metric == "mean_per_class" else None
    return keep_outcomes(result, pack_outcomes(task.held_out, correct, labels))


def transfer_task(
    run_uri: str, store: ObjectStore, config: Config, set_name: str, networks: Mapping[str, nn.Module] | None = None
) -> Task | str:
    """Return the task of a dataset with the features of ``networks`` (None: the run's), or the reason why there is none."""
    prefix = join_uri(run_uri, "transfer", set_name)
    datasets = split_datasets(store, prefix)
    train_labels, val_labels = (
        datasets[split].labels if split in datasets else np.zeros(0, np.int64) for split in SPLITS
    )
    manifest = Manifest.read(store, prefix)
    names = class_names(manifest.classes, train_labels, val_labels)
    several = _several_labels(store, prefix)
    if several is None and (reason := missing_labels(train_labels, val_labels, names)):
        return reason
    splits = transfer_features(run_uri, store, config, set_name, networks)
    if several is None:
        return task_of(splits, manifest)
    for model, parts in splits.items():
        if reason := unusable_features(model, *parts):
            return reason
    train_targets, val_targets = (
        np.array([several["labels"][datasets[split].name(i).rpartition("/")[2]] for i in range(len(datasets[split]))])
        for split in SPLITS
    )
    return Task(splits, several["classes"], [], held_out_digest(manifest), (train_targets, val_targets))


def _several_labels(store: ObjectStore, prefix: str) -> dict[str, Any] | None:
    """Return the classes, and the labels of each image by its name, of a set with several labels per image."""
    try:
        found: dict[str, Any] = store.get_json(several_labels_uri(prefix))
    except NotFound:
        return None
    return found
