"""Transfer to a labeled dataset: L2-regularized logistic regression on frozen features (EsViT, section 4.2; the linear
probe of CLIP: Radford et al., 2021, appendix A.3).

Lambda is the weight of ``|w|^2 / 2`` relative to the sum of the losses, scikit-learn's ``1 / C``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import nn

from esvit_core.config import Config, TransferSet
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.evaluation.features import SPLITS, features_of, load_model, split_datasets
from esvit_core.evaluation.labels import Splits, Task, class_names, missing_labels, task_of
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import MODELS, Result, left_out, measure_once, measured
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.storage import ObjectStore, join_uri

Metric = Literal["accuracy", "mean_per_class"]

_LOWEST_EXPONENT, _DECADES, _STEPS_PER_DECADE = -6, 12, 8
#: Values of lambda that the search can choose: 96 logarithmic steps over 1e-6 ... 1e6.
LAMBDAS = 10.0 ** (_LOWEST_EXPONENT + np.arange(_DECADES * _STEPS_PER_DECADE + 1) / _STEPS_PER_DECADE)
_FIRST_SPACING = 2 * _STEPS_PER_DECADE  # 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6
_FOLDS = 5
# With more training images, a single fold has at least 1,000 images, and lambda is chosen on it alone.
_MAX_IMAGES_FOR_ALL_FOLDS = 5_000
_MAX_ITERATIONS = 1_000
_MORE_ITERATIONS = 10_000  # of a final fit that did not converge
_DEFAULT_LAMBDA = 1.0
# Matrix products with fewer values are faster on one thread: on two busy cores the threads wait for each other,
# which took fifty times as long for 1,400 x 128 features.
_MIN_VALUES_FOR_THREADS = 1 << 23


@dataclass(frozen=True)
class TransferOutcome:
    """Outcome of the regression.

    Attributes:
        figure: metric on the test images, percent.
        strength: chosen lambda.
        validation: metric on the validation folds for every lambda that was tried.
        converged: whether the final fit converged before the iteration limit.
        searched: False if there were too few images for a validation fold, so that lambda is 1.
        correct: whether each test image was classified correctly, (M,) bool.
    """

    figure: float
    strength: float
    validation: dict[float, float]
    converged: bool
    searched: bool
    correct: np.ndarray


def search_lambda(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Search the regularization strength by parametric binary search.

    The search starts with 1e-6, 1e-4, ..., 1e6 and halves the interval around the peak until it has eight steps per
    decade. Among equal scores the strongest regularization is the peak.

    Args:
        score: score of a lambda on validation images; higher is better.

    Returns:
        The best lambda, and the score of every lambda that was tried.
    """
    scores: dict[int, float] = {}

    def peak(candidates: list[int]) -> int:
        for i in candidates:
            if 0 <= i < len(LAMBDAS) and i not in scores:
                scores[i] = score(float(LAMBDAS[i]))
        return max(scores, key=lambda i: (scores[i], i))

    spacing = _FIRST_SPACING
    best = peak(list(range(0, len(LAMBDAS), spacing)))
    while spacing > 1:
        spacing //= 2
        best = peak([best - spacing, best + spacing])
    return float(LAMBDAS[best]), {float(LAMBDAS[i]): scores[i] for i in sorted(scores)}


def logistic_transfer(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    metric: Metric = "accuracy",
    seed: int = 0,
    label: str = "transfer",
) -> TransferOutcome:
    """Choose lambda by cross-validation on the training set, refit on all of it, and measure on the test set.

    Up to 5,000 training images, every image is in one of five validation folds, and the score of a lambda is the metric of
    the predictions on all folds together. With more images only the first fold is used, a validation split as in CLIP's
    protocol. Neither depends on the test set.

    Args:
        train, test: features, (N, D) and (M, D).
        train_labels, test_labels: classes, (N,) and (M,).
        metric: metric of the search and of the result.
        seed: seed of the folds, see :func:`validation_folds`.
        label: first word of the progress lines.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    folds = _folds_to_use(validation_folds(train_labels, seed))
    strength = _DEFAULT_LAMBDA
    scores: dict[float, float] = {}
    if folds:
        truth = np.concatenate([train_labels[held_out] for held_out in folds])
        with ProgressLine(None, unit="regularization strengths", label=label) as progress:

            def score(candidate: float) -> float:
                predicted = [
                    _fit(train[~held_out], train_labels[~held_out], candidate).predict(train[held_out])
                    for held_out in folds
                ]
                value = metric_of(metric, truth, np.concatenate(predicted))
                progress.update(1, validation=value)
                return value

            strength, scores = search_lambda(score)
    model = _fit(train, train_labels, strength, _MORE_ITERATIONS)
    predicted = model.predict(test)
    figure = metric_of(metric, test_labels, predicted)
    converged = bool(model.n_iter_.max() < _MORE_ITERATIONS)
    return TransferOutcome(figure, strength, scores, converged, bool(scores), predicted == test_labels)


def validation_folds(labels: np.ndarray, seed: int, folds: int = _FOLDS) -> np.ndarray:
    """Distribute the images of each class evenly over the folds at random; fold of each image, (N,).

    The only image of a class is in no fold (-1), so that every fit sees every class.
    """
    rng = np.random.default_rng(seed)
    fold = np.full(len(labels), -1)
    start = 0
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        if len(members) > 1:
            fold[members] = (start + np.arange(len(members))) % folds
            start += len(members)  # so that the folds of many small classes have the same size
    return fold


def _folds_to_use(fold: np.ndarray) -> list[np.ndarray]:
    """Return a mask of the validation images of each fold that is used, (N,) bool."""
    number = _FOLDS if len(fold) <= _MAX_IMAGES_FOR_ALL_FOLDS else 1
    masks = [fold == i for i in range(number)]
    return [mask for mask in masks if mask.any()]


def metric_of(metric: Metric, truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute accuracy, or mean accuracy over the classes that occur; percent."""
    correct = truth == predicted
    if metric == "accuracy":
        return int(correct.sum()) * 100 / len(correct)
    _, index, count = np.unique(truth, return_inverse=True, return_counts=True)
    return float((np.bincount(index, weights=correct) / count).mean() * 100)


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
    return measure_once(
        store,
        run_uri,
        f"transfer-{set_name}",
        lambda: evaluate_task(transfer_task(run_uri, store, config, set_name), chosen, config.seed),
    )


def evaluate_task(task: Task | str, chosen: TransferSet, seed: int) -> Result:
    """Measure the task for every model in it."""
    key = f"transfer/{chosen.name}"
    if isinstance(task, str):
        return left_out(key, task) | {"metric": chosen.metric}
    outcomes = {
        model: logistic_transfer(
            train.view,
            train.labels,
            val.view,
            val.labels,
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
    ) | {"lambda": {model: o.strength for model, o in outcomes.items()}}
    correct = {model: {key: o.correct} for model, o in outcomes.items()}
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
    if reason := missing_labels(train_labels, val_labels, names):
        return reason
    splits: dict[str, Splits] = {}
    for model in networks or MODELS:
        backbone = networks[model] if networks else load_model(run_uri, model, store)
        train, val = (
            features_of(
                backbone, datasets[split], config, label=f"{set_name}: features of the {model} backbone, {split}"
            )
            for split in SPLITS
        )
        splits[model] = (train, val)
    return task_of(splits, manifest)


def _fit(x: np.ndarray, labels: np.ndarray, strength: float, iterations: int = _MAX_ITERATIONS) -> LogisticRegression:
    model = LogisticRegression(C=1 / strength, solver="lbfgs", max_iter=iterations)
    threads = 1 if x.size < _MIN_VALUES_FOR_THREADS else None
    with warnings.catch_warnings(), threadpool_limits(threads):
        # With weak regularization separable features have no finite optimum; the convergence of the final fit is checked.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, labels)
