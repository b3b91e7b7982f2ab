"""The metrics of the transfer sets, percent."""

from __future__ import annotations

from typing import Literal

import numpy as np

Metric = Literal["accuracy", "mean_per_class", "map_11_point", "roc_auc"]

#: Metrics of predicted classes; the others need the logits.
OF_CLASSES: tuple[Metric, ...] = ("accuracy", "mean_per_class")


def metric_of(metric: Metric, truth: np.ndarray, predicted: np.ndarray) -> float:
    """Compute a metric, percent.

    Args:
        metric: ``accuracy``; ``mean_per_class``, its mean over the classes that occur; ``map_11_point``, see
            :func:`eleven_point_map`; or ``roc_auc``, the area under the ROC curve of class 1 against class 0.
        truth: classes, (M,); of ``map_11_point`` 1, 0 (ignored) or -1 of each image and class, (M, C).
        predicted: classes, (M,); of ``map_11_point`` and ``roc_auc`` logits, (M, C) and (M, 1).
    """
    if metric == "map_11_point":
        return eleven_point_map(truth, predicted)
    if metric == "roc_auc":
        return roc_auc(truth, predicted[:, -1])
    correct = truth == predicted
    if metric == "accuracy":
        return int(correct.sum()) * 100 / len(correct)
    _, index, count = np.unique(truth, return_inverse=True, return_counts=True)
    return float((np.bincount(index, weights=correct) / count).mean() * 100)


def eleven_point_map(truth: np.ndarray, scores: np.ndarray) -> float:
    """Compute the mean over the classes of PASCAL VOC 2007's average precision, percent.

    The average precision of a class is the mean, over the recalls 0, 0.1, ..., 1, of the highest precision at that recall or
    a higher one. Classes without a positive image are left out.

    Args:
        truth: 1: the class is in the image; -1: it is not; 0: difficult, and ignored; (M, C).
        scores: higher for images that more likely contain the class, (M, C).

    Source: Everingham et al., 2010, section 3.4.1.
    """
    found = [_eleven_point(truth[:, c], scores[:, c]) for c in range(truth.shape[1]) if (truth[:, c] == 1).any()]
    return 100 * float(np.mean(found)) if found else float("nan")


def roc_auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Compute the area under the ROC curve, percent: the share of pairs of both classes that are in order; ties count half.

    Args:
        truth: classes 0 and 1, (M,).
        scores: higher for class 1, (M,).
    """
    positive = truth == 1
    pairs = int(positive.sum()) * int((~positive).sum())
    if not pairs:
        return float("nan")
    _, index, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[index]  # ties share the mean of their ranks
    above = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return 100 * float(above) / pairs


def _eleven_point(truth: np.ndarray, scores: np.ndarray) -> float:
    known = truth != 0
    order = np.argsort(-scores[known], kind="stable")
    hits = (truth[known] == 1)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    recall = np.cumsum(hits) / hits.sum()
    best = np.maximum.accumulate(precision[::-1])[::-1]  # highest precision at this recall or a higher one
    # The smallest number of images with each recall; rounding must not move a recall of exactly 0.3 to the next one.
    first = np.searchsorted(recall, np.arange(11) / 10 - 1e-9)
    return float(np.mean([best[i] if i < len(best) else 0.0 for i in first]))
