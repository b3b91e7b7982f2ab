"""The grid of the linear probe: what it tries, and that its probes are those that would be trained one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esvit_core.config import Config, LinearConfig
from esvit_core.evaluation import validation
from esvit_core.evaluation.features import Features
from esvit_core.evaluation.labels import Task
from esvit_core.evaluation.linear_grid import LEARNING_RATES, choose_probe, has_class_token, probe_features
from esvit_core.evaluation.linear_probe import linear_probe, measure_linear
from esvit_core.evaluation.validation import validation_folds


def blobs(seed: int, count: int, classes: int = 4, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    centers = np.random.default_rng(99).standard_normal((classes, dim)) * 3
    labels = np.arange(count) % classes
    noise = np.random.default_rng(seed).standard_normal((count, dim))
    return (centers[labels] + noise).astype(np.float32), labels


def test_a_probe_of_the_grid_is_the_probe_that_is_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(0, 60)
    monkeypatch.setattr(validation, "MAX_IMAGES_FOR_ALL_FOLDS", 59)  # one fold
    choice = choose_probe({"all": x}, y, 4, epochs=5, batch_size=1000, seed=3, label="grid")
    assert choice is not None
    held_out = validation_folds(y, 3) == 0
    for rate in (1e-3, 5e-2):
        # Alone, the batch is that of the remaining images; the learning rate refers to all of them.
        alone = LinearConfig(epochs=5, lr=rate * 60 / (~held_out).sum(), batch_size=1000)
        outcome = linear_probe(x[~held_out], y[~held_out], x[held_out], y[held_out], 4, alone, seed=3)
        assert choice.validation["all"][rate] == pytest.approx(outcome.last)


def test_the_best_combination_is_chosen_and_of_equal_ones_the_smallest() -> None:
    x, y = blobs(0, 200)
    noise = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    choice = choose_probe({"noise": noise, "good": x}, y, 4, epochs=10, batch_size=64, seed=0, label="grid")
    assert choice is not None and choice.feature == "good"
    best = max(score for scores in choice.validation.values() for score in scores.values())
    equal = [rate for rate in LEARNING_RATES if choice.validation["good"][rate] == best]
    assert choice.rate == equal[0]
    twice = choose_probe({"first": x, "second": x}, y, 4, epochs=10, batch_size=64, seed=0, label="grid")
    assert twice is not None and twice.feature == "first"


def test_a_class_token_is_recognized_and_tried_with_and_without_the_average() -> None:
    rng = np.random.default_rng(0)
    tokens, average = rng.standard_normal((5, 4, 3)).astype(np.float32), rng.standard_normal((5, 3)).astype(np.float32)
    blocks = np.concatenate([tokens.reshape(5, 12), average], 1)
    assert has_class_token(tokens[:, 3], blocks) and not has_class_token(average, blocks)
    features = probe_features(tokens[:, 3], blocks, class_token=True)
    assert [value.shape[1] for value in features.values()] == [3, 6, 12, 15]
    assert np.array_equal(features["last block and average"], blocks[:, 9:])
    assert list(probe_features(average, blocks, class_token=False)) == ["last block", "last blocks"]


def task(seed: int, single: bool = False) -> Task:
    def features(seed: int, count: int) -> Features:
        x, y = blobs(seed, count)
        return Features(x, np.concatenate([x, x], 1), y)

    return Task({"trained": (features(seed, 4 if single else 80), features(1, 40))}, list("abcd"), [], "images")


def test_the_result_names_the_choice_and_does_not_depend_on_the_test_images() -> None:
    config = Config.from_mapping({"evaluation": {"linear": {"epochs": 5, "batch_size": 32}}})
    result = measure_linear(task(0), config)
    assert result["protocol"] == "grid" and list(result["results"]["trained"]) == ["linear"]
    chosen = result["chosen"]["trained"]
    assert chosen["lr"] in LEARNING_RATES and chosen["feature"] in result["validation"]["trained"]
    train, val = task(0).splits["trained"]
    other = Task({"trained": (train, Features(-val.view, -val.blocks, val.labels))}, list("abcd"), [], "images")
    assert measure_linear(other, config)["chosen"] == result["chosen"]


def test_one_image_per_class_is_not_validated() -> None:
    config = Config.from_mapping({"evaluation": {"linear": {"epochs": 2}}})
    result = measure_linear(task(0, single=True), config)
    assert "chosen" not in result and result["notes"] == [
        "every class has a single training image, so the learning rate was not chosen and is 0.001"
    ]


def test_the_published_protocol_trains_on_the_features_of_each_epoch() -> None:
    config = Config.from_mapping({"evaluation": {"linear": {"epochs": 3, "batch_size": 32, "protocol": "published"}}})
    asked = []

    def of_epoch(epoch: int) -> np.ndarray:
        asked.append(epoch)
        return task(epoch).splits["trained"][0].blocks

    result = measure_linear(task(0), config, {"trained": of_epoch})
    assert asked == [0, 1, 2] and result["protocol"] == "published"
    assert result["results"]["trained"]["linear/best"] >= result["results"]["trained"]["linear"]
    train, val = task(2).splits["trained"]
    torch.manual_seed(0)
    alone = linear_probe(
        train.blocks,
        train.labels,
        val.blocks,
        val.labels,
        4,
        config.evaluation.linear,
        config.seed,
        features_of_epoch=lambda epoch: task(epoch).splits["trained"][0].blocks,
    )
    assert alone.last == result["results"]["trained"]["linear"]
