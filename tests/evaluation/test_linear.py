"""The linear probe separates linear classes and depends only on the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esvit_core.config import LinearConfig
from esvit_core.evaluation.linear_probe import confusion_matrix, linear_probe

QUICK = LinearConfig(epochs=20, lr=0.5, batch_size=64)


def blobs(seed: int, count: int, classes: int = 4, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    centers = np.random.default_rng(99).standard_normal((classes, dim)) * 3
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return (centers[labels] + rng.standard_normal((count, dim))).astype(np.float32), labels


def test_separable_classes_are_learned():
    outcome = linear_probe(*blobs(0, 300), *blobs(1, 100), classes=4, config=QUICK)
    assert outcome.last > 95
    assert outcome.best >= outcome.last
    assert outcome.top5 == 100.0
    assert (outcome.predictions == blobs(1, 100)[1]).mean() * 100 == pytest.approx(outcome.last)


def test_the_outcome_depends_on_the_seed_only():
    data = (*blobs(0, 200), *blobs(1, 80))
    torch.manual_seed(1)
    first = linear_probe(*data, classes=4, config=QUICK, seed=5)
    torch.manual_seed(2)
    again = linear_probe(*data, classes=4, config=QUICK, seed=5)
    assert (first.last, first.best, first.best_epoch) == (again.last, again.best, again.best_epoch)
    assert (first.predictions == again.predictions).all()


def test_steps_are_those_of_the_published_recipe():
    """One image a step over two epochs: SGD with momentum 0.9, lr scaled by batch / 256, cosine by epoch."""
    x, y = np.array([[1.0, 2.0]], np.float32), np.array([1])
    config = LinearConfig(epochs=2, lr=25.6, batch_size=1024)
    weight, bias = torch.empty(2, 2).normal_(std=0.01, generator=torch.Generator().manual_seed(3)), torch.zeros(2)
    weight_speed, bias_speed = torch.zeros(2, 2), torch.zeros(2)
    for lr in (25.6 / 256, 25.6 / 256 / 2):  # (1 + cos(pi / 2)) / 2 in the second of two epochs
        weight.requires_grad_(), bias.requires_grad_()
        loss = F.cross_entropy(F.linear(torch.as_tensor(x), weight, bias), torch.as_tensor(y))
        weight_slope, bias_slope = torch.autograd.grad(loss, (weight, bias))
        weight_speed, bias_speed = 0.9 * weight_speed + weight_slope, 0.9 * bias_speed + bias_slope
        weight, bias = (weight - lr * weight_speed).detach(), (bias - lr * bias_speed).detach()
    test = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    expected = F.linear(torch.as_tensor(test), weight, bias).argmax(1).numpy()
    outcome = linear_probe(x, y, test, np.zeros(50, int), classes=2, config=config, seed=3)
    assert (outcome.predictions == expected).all()


def test_confusion_counts_rows_by_truth():
    table = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert table == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
