"""The search of lambda, the validation split, the metrics, and logistic regression as a whole."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.evaluation.transfer import LAMBDAS, logistic_transfer, metric_of, search_lambda, validation_split


def test_the_grid_is_96_logarithmic_steps():
    assert len(LAMBDAS) == 97
    assert LAMBDAS[0] == pytest.approx(1e-6) and LAMBDAS[-1] == pytest.approx(1e6)
    assert np.diff(np.log10(LAMBDAS)) == pytest.approx(1 / 8)


@given(peak=st.floats(-7, 7), width=st.floats(0.1, 10))
def test_the_search_finds_what_exhaustive_search_finds(peak, width):
    def score(strength):
        return -abs(np.log10(strength) - peak) / width

    best, tried = search_lambda(score)
    assert score(best) == pytest.approx(max(score(s) for s in LAMBDAS))
    assert len(tried) <= 7 + 4 * 2


def test_the_search_starts_with_every_second_decade():
    order = []
    search_lambda(lambda strength: order.append(strength) or 0.0)
    assert order[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])


def test_no_strength_is_tried_twice():
    order = []
    search_lambda(lambda strength: order.append(strength) or -abs(np.log10(strength)))
    assert len(order) == len(set(order))


def test_of_equal_scores_the_stronger_regularisation_wins():
    best, _ = search_lambda(lambda strength: float(strength <= 10))
    assert best == pytest.approx(10)


def test_validation_takes_a_fifth_of_each_class_but_never_its_last_image():
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    chosen = validation_split(labels, seed=0)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [10, 2, 1, 0]
    assert (validation_split(labels, seed=0) == chosen).all()
    assert (validation_split(labels, seed=1) != chosen).any()


def test_metrics():
    truth, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    assert metric_of("accuracy", truth, predicted) == 75
    assert metric_of("mean_per_class", truth, predicted) == 50


def test_mean_per_class_skips_classes_without_test_images():
    assert metric_of("mean_per_class", np.array([3, 3, 7]), np.array([3, 0, 7])) == 75


def blobs(seed: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    centers = np.random.default_rng(99).standard_normal((classes, 6)) * 2
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return (centers[labels] + rng.standard_normal((count, 6))).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_separable_classes_transfer(classes):
    outcome = logistic_transfer(*blobs(0, 150, classes), *blobs(1, 80, classes))
    assert outcome.figure > 90
    assert outcome.searched and outcome.converged
    assert outcome.strength in outcome.validation


def test_the_chosen_strength_is_the_best_on_validation():
    outcome = logistic_transfer(*blobs(0, 90, 3), *blobs(1, 30, 3), metric="mean_per_class")
    assert outcome.validation[outcome.strength] == max(outcome.validation.values())


def test_one_image_a_class_is_fitted_without_a_search():
    x, labels = np.eye(3, dtype=np.float32), np.arange(3)
    outcome = logistic_transfer(x, labels, x, labels)
    assert outcome.figure == 100
    assert not outcome.searched and outcome.strength == 1


def test_the_outcome_depends_on_the_seed_only():
    data = (*blobs(0, 60, 4), *blobs(1, 40, 4))
    first, second = (asdict(logistic_transfer(*data, seed=3)) for _ in range(2))
    assert np.array_equal(first.pop("correct"), second.pop("correct"))
    assert first == second
