"""The metrics of the transfer sets."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from esvit_core.evaluation.transfer_metrics import eleven_point_map, metric_of, roc_auc


def test_accuracy_and_its_mean_over_classes():
    truth, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    assert metric_of("accuracy", truth, predicted) == 75
    assert metric_of("mean_per_class", truth, predicted) == 50


def test_mean_per_class_skips_classes_without_test_images():
    assert metric_of("mean_per_class", np.array([3, 3, 7]), np.array([3, 0, 7])) == 75


def test_eleven_point_average_precision_of_a_ranking_worked_out_by_hand():
    # Positives at ranks 1 and 4 of five: precision 1 up to recall 0.5 (six of the eleven points), then 2 / 4.
    truth = np.array([[1], [-1], [-1], [1], [-1]])
    assert eleven_point_map(truth, np.arange(5, 0, -1)[:, None]) == pytest.approx(100 * (6 * 1 + 5 * 0.5) / 11)


def test_difficult_images_are_ignored_and_classes_without_positives_left_out():
    truth = np.array([[1, -1], [0, -1], [-1, -1]])
    assert eleven_point_map(truth, np.array([[1.0, 0], [3.0, 0], [0.0, 0]])) == pytest.approx(100)


def test_the_area_under_the_roc_curve_is_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 2, 200), rng.integers(0, 9, 200).astype(float)
    assert roc_auc(truth, scores) == pytest.approx(100 * roc_auc_score(truth, scores))
