"""Significance of a difference in a metric that is no share of correct images: a mean of values of the images, mean average
precision, or the area under the ROC curve.

Both models are measured on the same images, and every resample of the bootstrap draws the same images for both.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from esvit_core.evaluation.significance import ALPHA, RESAMPLES, Difference, images_for_error
from esvit_core.evaluation.transfer_metrics import Metric, metric_of

#: A resample of a ranking costs a pass over all images and classes.
RANKING_RESAMPLES = 2_000
_SEED = 0
_BLOCK_VALUES = 1 << 20  # drawn images at a time


def mean_difference(first: np.ndarray, second: np.ndarray, resamples: int = RESAMPLES) -> Difference:
    """Compare the means of a value that each image has, such as the average precision of a query.

    Args:
        first, second: values of each image with each model, (M,), fractions.
        resamples: number of resamples of the bootstrap.

    Raises:
        ValueError: the arrays are empty or differ in length.
    """
    _check(first, second)
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    drawn = np.concatenate([differences[images].mean(1) for images in _resample(len(differences), resamples)])
    return _difference(float(differences.mean()), drawn, len(differences), int((differences != 0).sum()))


def ranking_difference(
    metric: Metric, truth: np.ndarray, first: np.ndarray, second: np.ndarray, resamples: int = RANKING_RESAMPLES
) -> Difference:
    """Compare two models by a metric of the order in which they rank the images.

    Args:
        metric: ``map_11_point`` or ``roc_auc``.
        truth: labels as :func:`esvit_core.evaluation.transfer_metrics.metric_of` takes them, (M, C) or (M,).
        first, second: scores of each model, or their ranks, (M, C); one column for ``roc_auc``.
        resamples: number of resamples of the bootstrap.

    Raises:
        ValueError: the arrays are empty or differ in length.
    """
    _check(first, second)
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)  # ranks are unsigned
    share = _area_shares if metric == "roc_auc" else _precision_shares
    parts = []
    for images in _resample(len(first), resamples):
        counts = _counts(images)  # (R, M)
        parts.append(share(truth, first, counts) - share(truth, second, counts))
    drawn = np.concatenate(parts)
    observed = (metric_of(metric, truth, first) - metric_of(metric, truth, second)) / 100
    return _difference(observed, drawn[np.isfinite(drawn)], len(first), int((first != second).any(1).sum()))


def ranks(scores: np.ndarray) -> np.ndarray:
    """Return the rank of each image in each column, from 0 for the lowest score; equal scores share a rank, (M, C)."""
    return np.stack([np.unique(column, return_inverse=True)[1] for column in scores.T], 1)


def _difference(observed: float, drawn: np.ndarray, images: int, differ: int) -> Difference:
    """Return the difference with the percentile interval and the p-value of the bootstrap; both decide alike."""
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2]) if len(drawn) else (-1.0, 1.0)
    opposite = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (1 + opposite) / (len(drawn) + 1))
    needed = images_for_error(observed, float(drawn.std()) if len(drawn) else 0.0, images)
    return Difference(100 * observed, 100 * float(low), 100 * float(high), p, images, differ, needed)


def _check(first: np.ndarray, second: np.ndarray) -> None:
    if not len(first) or np.shape(first) != np.shape(second):
        raise ValueError(f"expected values of the same images, got {np.shape(first)} and {np.shape(second)}")


def _resample(images: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield the images of resamples in blocks, (R, M)."""
    rng = np.random.default_rng(_SEED)
    block = max(1, _BLOCK_VALUES // images)
    for start in range(0, resamples, block):
        yield rng.integers(0, images, (min(block, resamples - start), images))


def _counts(images: np.ndarray) -> np.ndarray:
    """Return how often each image was drawn, (R, M) float64."""
    rows, size = images.shape
    flat = images + np.arange(rows)[:, None] * size
    return np.bincount(flat.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def _precision_shares(truth: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the 11-point mAP of each resample, (R,) fractions; NaN without any positive image."""
    found = []
    for column in range(truth.shape[1]):
        known = np.flatnonzero(truth[:, column])
        order = known[np.argsort(-scores[known, column], kind="stable")]
        weights = counts[:, order]
        hits = np.cumsum(weights * (truth[order, column] == 1), 1)
        precision = hits / np.maximum(np.cumsum(weights, 1), 1)
        # The highest precision at this recall or a higher one; beyond the last image it is 0.
        best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        best = np.concatenate([best, np.zeros((len(best), 1))], 1)
        total = hits[:, -1:] if hits.shape[1] else np.zeros((len(best), 1))
        points = [(hits < total * (step / 10) - 1e-9).sum(1) for step in range(11)]
        average = np.mean([np.take_along_axis(best, point[:, None], 1)[:, 0] for point in points], 0)
        found.append(np.where(total[:, 0] > 0, average, np.nan))
    values = np.stack(found, 1)
    occur = np.isfinite(values)
    mean = np.where(occur, values, 0).sum(1) / np.maximum(occur.sum(1), 1)
    return np.where(occur.any(1), mean, np.nan)


def _area_shares(truth: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each resample, (R,) fractions; NaN without both classes."""
    scores = scores[:, -1]
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))
    weights, positive = counts[:, order], truth[order] == 1
    above = np.add.reduceat(weights * positive, starts, 1)  # (R, distinct scores)
    below = np.add.reduceat(weights * ~positive, starts, 1)
    pairs = above.sum(1) * below.sum(1)
    ordered = (above * (np.cumsum(below, 1) - below / 2)).sum(1)
    return np.where(pairs > 0, ordered / np.maximum(pairs, 1), np.nan)
