"""Weighted k-NN against a reference that loops over images and neighbors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.evaluation.knn import rank_classes, ranking_accuracy, weighted_knn


def brute_force(train, train_labels, test, test_labels, k, temperature):
    """Top-1 and top-5, one image and one neighbor at a time, in double precision."""
    classes = max(*train_labels, *test_labels) + 1
    top1 = top5 = 0
    for query, truth in zip(test, test_labels, strict=True):
        cosines = [float(query @ row / (np.linalg.norm(query) * np.linalg.norm(row))) for row in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[train_labels[i]] += math.exp(cosines[i] / temperature)
        ranking = sorted(range(classes), key=lambda c: -votes[c])
        top1 += ranking[0] == truth
        top5 += truth in ranking[:5]
    return 100 * top1 / len(test), 100 * top5 / len(test)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bank=st.integers(1, 40),
    queries=st.integers(1, 15),
    classes=st.integers(1, 8),
    k=st.integers(1, 50),
    temperature=st.sampled_from([0.05, 0.07, 1.0]),
)
def test_knn_agrees_with_brute_force(seed, bank, queries, classes, k, temperature):
    rng = np.random.default_rng(seed)
    train, test = (rng.standard_normal((n, 6)).astype(np.float32) for n in (bank, queries))
    labels, truth = (rng.integers(0, classes, n) for n in (bank, queries))
    found = weighted_knn(train, labels, test, truth, k, temperature)
    assert found == pytest.approx(brute_force(train, labels, test, truth, k, temperature))


def test_several_k_at_once_are_those_one_by_one():
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((50, 4)), rng.standard_normal((20, 4))
    labels, truth = rng.integers(0, 7, 50), rng.integers(0, 7, 20)
    together = rank_classes(train, labels, test, (3, 20, 500), 0.07, classes=7)
    for k, ranking in together.items():
        assert ranking_accuracy(ranking, truth) == weighted_knn(train, labels, test, truth, k, 0.07)


def test_blocks_do_not_change_the_ranking(monkeypatch):
    rng = np.random.default_rng(1)
    train, test, labels = rng.standard_normal((30, 4)), rng.standard_normal((17, 4)), rng.integers(0, 6, 30)
    whole = rank_classes(train, labels, test, (5,), 0.07, classes=6)[5]
    monkeypatch.setattr("esvit_core.evaluation.knn._QUERIES", 4)
    monkeypatch.setattr("esvit_core.evaluation.knn._BANK", 7)  # the last block has fewer than k
    assert torch.equal(rank_classes(train, labels, test, (5,), 0.07, classes=6)[5], whole)


def test_a_bank_smaller_than_k_votes_as_a_whole():
    train, labels = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    assert weighted_knn(train, labels, train, labels, k=200) == weighted_knn(train, labels, train, labels, k=3)


def test_with_two_classes_every_image_is_in_the_top_five():
    rng = np.random.default_rng(2)
    train, labels = rng.standard_normal((20, 4)), rng.integers(0, 2, 20)
    assert weighted_knn(train, labels, train, labels, k=3)[1] == 100.0


def test_a_very_low_temperature_is_the_nearest_neighbour():
    rng = np.random.default_rng(3)
    train, labels = rng.standard_normal((40, 5)), rng.integers(0, 4, 40)
    test, truth = rng.standard_normal((30, 5)), rng.integers(0, 4, 30)
    assert weighted_knn(train, labels, test, truth, 20, 1e-4)[0] == weighted_knn(train, labels, test, truth, 1)[0]


def test_lengths_of_features_do_not_matter():
    rng = np.random.default_rng(4)
    train, labels = rng.standard_normal((40, 5)), rng.integers(0, 4, 40)
    test, truth = rng.standard_normal((30, 5)), rng.integers(0, 4, 30)
    scaled = train * rng.uniform(0.1, 10, (40, 1))
    assert weighted_knn(scaled, labels, 7 * test, truth, 5) == weighted_knn(train, labels, test, truth, 5)


def test_nothing_to_vote_is_reported():
    with pytest.raises(ValueError, match="0 and 3"):
        weighted_knn(np.zeros((0, 2)), np.zeros(0, int), np.ones((3, 2)), np.zeros(3, int), 1)
