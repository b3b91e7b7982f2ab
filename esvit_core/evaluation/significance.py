"""Significance of a difference between two models that classified the same images.

Only the images on which one model is right and the other wrong carry information about the difference. For an accuracy
their two counts are all that the bootstrap and the test need; for a mean over classes, the two counts of each class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

Decision = Literal["better", "worse", "no difference shown"]

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
#: With fewer images on which the models differ, the exact test cannot fall below 5 % (2 / 2**5 = 6 %).
FEWEST_DISCORDANT = 6
#: A difference that this many times the images would not show is too small to collect more images for.
FUTILE = 100
_SEED = 0
# Added to each cell of the table of outcomes before it is resampled. Without it, intervals from few discordant pairs are
# too narrow, and without any they have no width.
_SMOOTHING = 0.5


@dataclass(frozen=True)
class Difference:
    """A difference between two models on the same images.

    Attributes:
        points: first minus second, percentage points.
        low, high: 95 % interval of the difference, percentage points.
        p: p-value of the two-sided test that the models are equally good.
        images: number of images.
        discordant: number of images that exactly one of the models classified correctly.
        images_needed: number of images that would show a difference of this size with 80 % power; None if the models are
            equal on these images.
    """

    points: float
    low: float
    high: float
    p: float
    images: int
    discordant: int
    images_needed: int | None

    @property
    def decision(self) -> Decision:
        """``better`` or ``worse`` if both the interval excludes 0 and p is below 5 %."""
        if self.p < ALPHA and self.low > 0:
            return "better"
        if self.p < ALPHA and self.high < 0:
            return "worse"
        return "no difference shown"

    def as_json(self) -> dict[str, Any]:
        """Return the values, rounded, and the decision."""
        return {
            "points": round(self.points, 4),
            "interval": [round(self.low, 4), round(self.high, 4)],
            "p": float(f"{self.p:.4g}"),
            "images": self.images,
            "discordant": self.discordant,
            "images_needed": self.images_needed,
            "decision": self.decision,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Difference:
        """Return the difference from the values of :meth:`as_json`."""
        low, high = values["interval"]
        return cls(
            points=float(values["points"]),
            low=float(low),
            high=float(high),
            p=float(values["p"]),
            images=int(values["images"]),
            discordant=int(values["discordant"]),
            images_needed=values["images_needed"],
        )


def accuracy_difference(first: np.ndarray, second: np.ndarray, resamples: int = RESAMPLES) -> Difference:
    """Compare the accuracies of two models.

    The interval is that of the paired bootstrap, and the test is McNemar's exact test.

    Args:
        first, second: whether each model classified each image correctly, (M,) bool.
        resamples: number of resamples of the bootstrap.

    Raises:
        ValueError: the arrays are empty or differ in length.
    """
    return _difference(first, second, np.zeros(len(first), np.int64), resamples)


def mean_per_class_difference(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, resamples: int = RESAMPLES
) -> Difference:
    """Compare the mean accuracies over the classes that occur.

    The bootstrap resamples the images of each class. The test flips the sign of each discordant pair at random; with
    classes of equal size it is McNemar's test, by simulation.

    Args:
        first, second: whether each model classified each image correctly, (M,) bool.
        labels: class of each image, (M,).
        resamples: number of resamples of the bootstrap, and of the test.

    Raises:
        ValueError: the arrays are empty or differ in length.
    """
    return _difference(first, second, labels, resamples)


def interval_text(difference: Difference) -> str:
    """Format the 95 % interval of a difference, percentage points."""
    return f"{difference.low:.1f} to {difference.high:.1f}"


def p_text(difference: Difference) -> str:
    """Format the p-value with its sign of equality."""
    return "p < 0.001" if difference.p < 0.001 else f"p = {difference.p:.3f}"


def describe_difference(difference: Difference) -> str:
    """Describe a difference in one line: points, interval, p-value, and number of images."""
    return (
        f"{difference.points:+.2f} points, 95 % interval {interval_text(difference)}, {p_text(difference)}, "
        f"{difference.images:,} images"
    )


def too_few(difference: Difference) -> str:
    """State that the images are too few to show the difference, and how many would; empty if that is not so."""
    if difference.decision != "no difference shown":
        return ""
    images = f"{difference.images:,} images are too few"
    needed, differing = int(float(f"{difference.images_needed or 0:.2g}")), difference.discordant
    if differing < FEWEST_DISCORDANT:
        few = (
            f"{images} to show anything: the two differ on {differing}, and must differ on at least {FEWEST_DISCORDANT}"
        )
        if needed:
            return f"{few}; about {needed:,} images would show a difference of this size"
        least = math.ceil(difference.images * FEWEST_DISCORDANT / differing) if differing else 0
        return few + (f", as on {least:,} images at this rate" if least else "")
    if needed > FUTILE * difference.images:
        return f"{images} to show a difference this small; {FUTILE * difference.images:,} would be, too"
    return f"{images} to show a difference of this size; about {needed:,} would" if needed else ""


def mcnemar_p(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, a binomial test of the discordant pairs.

    Args:
        first_only, second_only: number of images that only the first, and only the second model classified correctly.
    """
    pairs, fewer = first_only + second_only, min(first_only, second_only)
    if not pairs:
        return 1.0
    i = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((pairs - i + 1) / i))]) - pairs * math.log(
        2
    )  # of each count's share
    return min(1.0, 2 * float(np.exp(logs).sum()))


def images_needed(difference: float, discordant: float) -> int | None:
    """Return the number of images with which McNemar's test shows a difference, with 5 % level and 80 % power.

    Args:
        difference: difference of the accuracies as a fraction; None is returned for 0.
        discordant: fraction of the images that exactly one of the models classifies correctly.

    Source: Connor, 1987, "Sample size for testing differences in proportions for the paired-sample design".
    """
    if not difference:
        return None
    level, power = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)
    root = level * math.sqrt(discordant) + power * math.sqrt(max(0.0, discordant - difference**2))
    return math.ceil((root / difference) ** 2)


def images_for_error(difference: float, error: float, images: int) -> int | None:
    """Return the number of images, with the same mix of classes, that shows a difference with 5 % level and 80 % power.

    Args:
        difference: difference as a fraction; None is returned for 0.
        error: standard error of the difference with ``images`` images.
        images: number of images.
    """
    if not difference:
        return None
    level, power = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)
    return math.ceil(images * ((level + power) * error / difference) ** 2)


def _difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray, resamples: int) -> Difference:
    if not len(first) or not len(first) == len(second) == len(labels):
        raise ValueError(f"expected outcomes of the same images, got {len(first)}, {len(second)} and {len(labels)}")
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    first_only = np.bincount(index, weights=first & ~second).astype(np.int64)  # (C,)
    second_only = np.bincount(index, weights=second & ~first).astype(np.int64)  # (C,)
    share = float(((first_only - second_only) / sizes).mean())
    rng = np.random.default_rng(_SEED)
    drawn = _bootstrap(first_only, second_only, sizes, resamples, rng)
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    pairs = int((first_only + second_only).sum())
    if len(set(sizes)) == 1:  # every image has the same weight
        p = mcnemar_p(int(first_only.sum()), int(second_only.sum()))
        needed = images_needed(share, pairs / len(first))
    else:
        p = _sign_test(first_only, second_only, sizes, resamples, rng)
        needed = images_for_error(share, float(drawn.std()), len(first))
    return Difference(100 * share, 100 * float(low), 100 * float(high), p, len(first), pairs, needed)


def _bootstrap(
    first_only: np.ndarray, second_only: np.ndarray, sizes: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw differences of the mean over C classes with ``sizes`` images each, (resamples,) fractions."""
    classes, extra = len(sizes), _SMOOTHING / len(sizes)
    # Classes with the same counts are drawn together: the sum of multinomial draws is one.
    tables, times = np.unique(np.stack([first_only, second_only, sizes], axis=1), axis=0, return_counts=True)
    total = np.zeros(resamples)
    for (first, second, size), many in zip(tables, times, strict=True):
        cells = np.array([first + extra, second + extra, size - first - second + extra])
        drawn = rng.multinomial(size * many, cells / cells.sum(), size=resamples)
        total += (drawn[:, 0] - drawn[:, 1]) / (size * classes)
    return total


def _sign_test(
    first_only: np.ndarray, second_only: np.ndarray, sizes: np.ndarray, resamples: int, rng: np.random.Generator
) -> float:
    """Return the p-value of the difference of means over classes if each discordant pair is as likely either way."""
    total = np.zeros(resamples)
    for size in np.unique(sizes):  # pairs in classes of the same size have the same weight
        pairs = int((first_only + second_only)[sizes == size].sum())
        total += (2 * rng.binomial(pairs, 0.5, size=resamples) - pairs) / size
    observed = abs(float(((first_only - second_only) / sizes).sum()))
    # The observed signs count as one of the draws, which keeps the test at its level.
    return (1 + int((np.abs(total) >= observed - 1e-12).sum())) / (resamples + 1)
