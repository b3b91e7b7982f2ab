"""The search of lambda, the validation split, the metrics, and logistic regression as a whole."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from esvit_core.config import TransferSet
from esvit_core.evaluation import transfer, validation
from esvit_core.evaluation.features import Features
from esvit_core.evaluation.labels import Task
from esvit_core.evaluation.transfer import LAMBDAS, evaluate_task, logistic_transfer, search_lambda
from esvit_core.evaluation.validation import validation_folds


def test_the_grid_is_96_logarithmic_steps():
    assert len(LAMBDAS) == 97
    assert LAMBDAS[0] == pytest.approx(1e-6) and LAMBDAS[-1] == pytest.approx(1e6)
    assert np.diff(np.log10(LAMBDAS)) == pytest.approx(1 / 8)


@given(peak=st.floats(-7, 7), width=st.floats(0.1, 10))
def test_the_search_finds_what_exhaustive_search_finds(peak, width):
    def score(strengths):
        return [-abs(np.log10(strength) - peak) / width for strength in strengths]

    best, tried = search_lambda(score)
    assert score([best])[0] == pytest.approx(max(score(LAMBDAS)))
    assert len(tried) <= 7 + 4 * 2


def test_the_search_starts_with_every_second_decade():
    order = []
    search_lambda(lambda strengths: order.extend(strengths) or [0.0] * len(strengths))
    assert order[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])


def test_no_strength_is_tried_twice():
    order = []
    search_lambda(lambda strengths: order.extend(strengths) or [-abs(np.log10(s)) for s in strengths])
    assert len(order) == len(set(order))


def test_of_equal_scores_the_stronger_regularisation_wins():
    best, _ = search_lambda(lambda strengths: [float(strength <= 10) for strength in strengths])
    assert best == pytest.approx(10)


def test_the_search_goes_on_between_two_equal_scores():
    """As of the validation scores of the samples' pixels, whose best lies between the equal scores of 1 and 10."""
    scores = {-1: 47.9, -0.5: 48.6, 0: 49.15, 0.25: 49.5, 0.375: 49.55, 0.5: 49.1, 0.75: 49.25, 1: 49.15, 1.5: 47.7}

    def score(strengths):
        exponents = np.log10(strengths)
        return np.interp(exponents, [-6, *scores, 6], [41, *scores.values(), 24]).round(2).tolist()

    best, tried = search_lambda(score)
    assert np.log10(best) == pytest.approx(0.375) and len(tried) <= 7 + 4 * 2


@given(st.lists(st.integers(0, 3), min_size=97, max_size=97))
def test_the_search_never_takes_more_than_fifteen_fits(values):
    best, tried = search_lambda(lambda strengths: [values[int(np.abs(LAMBDAS - s).argmin())] for s in strengths])
    assert len(tried) <= 7 + 4 * 2
    assert best == max(strength for strength, value in tried.items() if value == max(tried.values()))


def test_every_fold_holds_a_fifth_of_each_class_but_never_its_only_image():
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    fold = validation_folds(labels, seed=0)
    for value, sizes in ((0, [10] * 5), (1, [2] * 5)):
        assert np.bincount(fold[labels == value]).tolist() == sizes
    assert sorted(np.bincount(fold[labels == 2], minlength=5)) == [0, 0, 0, 1, 1]
    assert fold[labels == 3].tolist() == [-1]
    assert (validation_folds(labels, seed=0) == fold).all()
    assert (validation_folds(labels, seed=1) != fold).any()


@given(counts=st.lists(st.integers(1, 9), min_size=2, max_size=12), seed=st.integers(0, 9))
def test_every_fit_of_the_search_sees_every_class(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    fold = validation_folds(labels, seed)
    for number in range(5):
        assert set(labels[fold != number]) == set(labels)
    sizes = np.bincount(fold[fold >= 0], minlength=5)
    assert sizes.max() - sizes.min() <= 1


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


def test_the_test_images_do_not_influence_the_choice():
    train, labels = blobs(0, 90, 3)
    test, truth = blobs(1, 30, 3)
    chosen = logistic_transfer(train, labels, test, truth)
    wrong = logistic_transfer(train, labels, test[::-1] * 5, (truth + 1) % 3)
    assert (chosen.strength, chosen.validation) == (wrong.strength, wrong.validation)


def test_every_image_of_a_small_set_validates_and_a_fifth_of_a_large_one(monkeypatch):
    train, labels = blobs(0, 97, 3)
    hundredth = 100 / 97
    small = logistic_transfer(train, labels, train, labels)
    assert all(value / hundredth == pytest.approx(round(value / hundredth)) for value in small.validation.values())
    monkeypatch.setattr(validation, "MAX_IMAGES_FOR_ALL_FOLDS", 96)
    fifth = 100 / (validation_folds(labels, 0) == 0).sum()
    large = logistic_transfer(train, labels, train, labels)
    assert all(value / fifth == pytest.approx(round(value / fifth)) for value in large.validation.values())


def test_a_fit_that_does_not_converge_is_named(monkeypatch):
    def features(seed, count):
        x, labels = blobs(seed, count, 3)
        return Features(x, x, labels)

    task = Task({"trained": (features(0, 60), features(1, 20))}, ["a", "b", "c"], [], "images")
    result = evaluate_task(task, TransferSet(name="blobs", source="unused"), seed=0)
    assert result["unconverged"] == {} and result["notes"] == []
    monkeypatch.setattr(transfer, "_MORE_ITERATIONS", 0)
    result = evaluate_task(task, TransferSet(name="blobs", source="unused"), seed=0)
    assert result["unconverged"] == {"transfer/blobs": ["trained"]}
    assert result["notes"] == ["trained: the fit did not converge in 0 iterations"]


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


def test_a_round_of_the_search_is_fitted_at_once(monkeypatch):
    rounds = []
    fit = transfer.LogisticProblem.fit

    def counted(self, strengths, used=None, *rest):
        rounds.append((len(strengths), used is not None))
        return fit(self, strengths, used, *rest)

    monkeypatch.setattr(transfer.LogisticProblem, "fit", counted)
    outcome = logistic_transfer(*blobs(0, 90, 3), *blobs(1, 30, 3))
    assert rounds[0] == (7 * 5, True) and rounds[-1] == (1, False)
    assert sum(count for count, in_folds in rounds if in_folds) == 5 * len(outcome.validation) <= 5 * 16


def test_the_search_finds_the_score_of_the_sweep_with_scikit_learn():
    x, labels = blobs(0, 60, 3)
    x += np.random.default_rng(7).standard_normal(x.shape) * 3
    outcome = logistic_transfer(x, labels, x, labels)
    fold = validation_folds(labels, 0)
    scores = []
    for strength in LAMBDAS[::4]:
        predicted = np.empty_like(labels)
        for number in range(5):
            model = LogisticRegression(C=1 / strength, max_iter=1_000).fit(x[fold != number], labels[fold != number])
            predicted[fold == number] = model.predict(x[fold == number])
        scores.append(100 * (predicted == labels).mean())
    assert max(outcome.validation.values()) >= max(scores) - 100 / 60


def test_the_area_under_the_curve_and_the_average_precision_rank_the_test_images():
    two, five = (*blobs(0, 80, 2), *blobs(1, 60, 2)), (*blobs(0, 100, 5), *blobs(1, 60, 5))
    auc = logistic_transfer(*two, metric="roc_auc")
    assert auc.figure > 95 and auc.correct is None
    precision = logistic_transfer(*five, metric="map_11_point")
    assert precision.figure > 90 and precision.correct is None


def test_the_area_under_the_curve_of_more_than_two_classes_is_left_out():
    x, labels = blobs(0, 60, 3)
    task = Task({"trained": (Features(x, x, labels),) * 2}, ["a", "b", "c"], [], "images")
    result = evaluate_task(task, TransferSet(name="blobs", source="unused", metric="roc_auc"), seed=0)
    assert result["status"] == "left_out" and "needs two classes, the set has 3" in result["reason"]
