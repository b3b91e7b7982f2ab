"""Few-shot classification and retrieval on made features."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from esvit_core.config import Config
from esvit_core.config.evaluation_settings import EvaluationConfig
from esvit_core.evaluation.features import Features
from esvit_core.evaluation.few_shot import draw_few, measure_few_shot
from esvit_core.evaluation.labels import Task
from esvit_core.evaluation.retrieval import measure_retrieval, rank_gallery


def features(seed: int, count: int, noise: float = 3.0) -> Features:
    centers = np.random.default_rng(99).standard_normal((3, 6)) * 3
    labels = np.arange(count) % 3
    x = (centers[labels] + noise * np.random.default_rng(seed).standard_normal((count, 6))).astype(np.float32)
    return Features(x, x, labels)


def task(train: int = 60) -> Task:
    splits = {"trained": (features(0, train), features(1, 30)), "baseline": (features(0, train, 9), features(1, 30, 9))}
    return Task(splits, ["a", "b", "c"], [], "images")


def test_a_draw_has_the_asked_number_of_each_class_and_at_least_one() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    assert np.bincount(labels[draw_few(labels, "5", 0)]).tolist() == [5, 5, 3]
    assert np.bincount(labels[draw_few(labels, "10%", 0)]).tolist() == [10, 4, 1]
    assert set(draw_few(labels, "2", 1)) < set(draw_few(labels, "5", 1))
    assert set(draw_few(labels, "2", 1)) != set(draw_few(labels, "2", 2))


def test_more_labels_help_and_the_spread_over_the_seeds_is_stated() -> None:
    config = Config.from_mapping({"evaluation": {"few_shot": ["1", "10%", "20"]}})
    result = measure_few_shot(task(), config)
    trained, baseline = result["results"]["trained"], result["results"]["baseline"]
    assert result["headline"] == "few-shot/20" and result["seeds"] == 5
    assert trained["few-shot/1"] < trained["few-shot/20"] and trained["few-shot/20"] > baseline["few-shot/20"]
    assert result["deviation"]["trained"]["few-shot/1"] > 0


def test_a_class_with_too_few_images_is_noted() -> None:
    config = Config.from_mapping({"evaluation": {"few_shot": ["20"]}})
    (note,) = measure_few_shot(task(train=30), config)["notes"]
    assert note == "few-shot/20: the smallest class has 10 training images, all of which are used"


@pytest.mark.parametrize("wrong", ["0", "101%", "many", "-1", "0%"])
def test_an_impossible_number_of_images_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="few_shot"):
        EvaluationConfig(few_shot=(wrong,))


def test_average_precision_of_a_ranking_worked_out_by_hand() -> None:
    angles = np.array([0.1, 0.2, 0.3, 0.4])
    gallery = np.stack([np.cos(angles), np.sin(angles)], 1)
    precision, first = rank_gallery(gallery, np.array([1, 0, 1, 0]), np.array([[1.0, 0.0]]), np.array([0]))
    assert precision[0] == pytest.approx((1 / 2 + 2 / 4) / 2) and first[0] == 1


def test_retrieval_is_tested_on_the_same_queries() -> None:
    result = measure_retrieval(task())
    figures = result["results"]["trained"]
    assert figures["retrieval/r@1"] <= figures["retrieval/r@5"] <= figures["retrieval/r@10"]
    assert figures["retrieval/map"] > result["results"]["baseline"]["retrieval/map"]
    assert set(result["differences"]) == {"retrieval/map", "retrieval/r@1", "retrieval/r@5", "retrieval/r@10"}
