"""Intervals of mAP, ROC AUC and means of values: they agree with resampling images, and cover the truth as often as stated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esvit_core.evaluation.metric_difference import mean_difference, ranking_difference, ranks
from esvit_core.evaluation.outcomes import as_model, compare_outcomes, keep_outcomes, pack_outcomes, pack_rankings
from esvit_core.evaluation.results import measured
from esvit_core.evaluation.significance import Difference
from esvit_core.evaluation.transfer_metrics import eleven_point_map, metric_of


def pets(images: int, skill: float, other: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two classes, and the scores of two models that share half of their noise."""
    rng = np.random.default_rng(seed)
    truth = np.arange(images) % 2
    shared = rng.normal(size=images)
    first, second = ((strength * truth + shared + rng.normal(size=images))[:, None] for strength in (skill, other))
    return truth, first, second


def scenes(images: int, skill: float, other: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Several labels per image, some of them difficult, and the scores of two models."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([-1, 0, 1], size=(images, 4), p=[0.6, 0.1, 0.3])
    first, second = (strength * truth + rng.normal(size=truth.shape) for strength in (skill, other))
    return truth, first, second


@pytest.mark.parametrize(("metric", "made"), [("roc_auc", pets), ("map_11_point", scenes)])
def test_the_interval_is_that_of_resampled_images(metric, made):
    truth, first, second = made(300, 1.5, 0.7)
    found = ranking_difference(metric, truth, first, second)
    assert found.points == pytest.approx(metric_of(metric, truth, first) - metric_of(metric, truth, second))
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(1_000):
        images = rng.integers(0, 300, 300)
        drawn.append(metric_of(metric, truth[images], first[images]) - metric_of(metric, truth[images], second[images]))
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.2 * np.std(drawn) + 0.1)
    assert found.decision == "better" and found.p < 0.05
    opposite = ranking_difference(metric, truth, second, first)
    assert opposite.decision == "worse" and opposite.points == -found.points


@pytest.mark.parametrize(("metric", "made"), [("roc_auc", pets), ("map_11_point", scenes)])
def test_equal_models_differ_nowhere_and_need_no_images(metric, made):
    truth, first, _ = made(60, 1.0, 1.0)
    found = ranking_difference(metric, truth, first, first)
    assert (found.points, found.low, found.high, found.p, found.discordant) == (0, 0, 0, 1, 0)
    assert found.images_needed is None and found.decision == "no difference shown"


def test_the_interval_of_the_area_covers_the_truth_in_19_of_20_samples():
    truth, first, second = pets(200_000, 1.2, 1.2)
    expected = metric_of("roc_auc", truth, first) - metric_of("roc_auc", truth, second)
    assert abs(expected) < 0.3
    covered = shown = 0
    for seed in range(400):
        sample = pets(120, 1.2, 1.2, seed)
        found = ranking_difference("roc_auc", *sample, resamples=400)
        covered += found.low <= 0 <= found.high
        shown += found.decision != "no difference shown"
    assert 0.92 <= covered / 400 <= 0.98 and shown / 400 <= 0.08


def test_a_mean_of_values_has_the_interval_of_its_standard_error():
    rng = np.random.default_rng(0)
    first, second = rng.random(2_000), rng.random(2_000) * 0.9
    found = mean_difference(first, second)
    differences = first - second
    error = differences.std() / np.sqrt(2_000)
    assert found.points == pytest.approx(100 * differences.mean())
    assert [found.low, found.high] == pytest.approx(
        100 * (differences.mean() + np.array([-1.96, 1.96]) * error), abs=10 * error
    )


def test_values_of_other_images_are_refused():
    with pytest.raises(ValueError, match="same images"):
        mean_difference(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="same images"):
        ranking_difference("roc_auc", np.zeros(0), np.zeros((0, 1)), np.zeros((0, 1)))


def test_ranks_keep_ties_and_the_metric():
    truth, first, _ = scenes(70, 1.0, 1.0)
    first = first.round(1)
    assert eleven_point_map(truth, ranks(first).astype(np.int64)) == eleven_point_map(truth, first)
    assert ranks(np.array([[0.5], [0.5], [0.1]])).tolist() == [[1], [1], [0]]


@pytest.mark.parametrize(("metric", "made"), [("roc_auc", pets), ("map_11_point", scenes)])
def test_kept_rankings_are_compared_with_the_baseline_and_across_runs(metric, made):
    truth, first, second = made(200, 1.5, 0.5)
    key = "transfer/pets"
    scores = {"trained": {key: first}, "baseline": {key: second}}
    figures = {model: {key: metric_of(metric, truth, each[key])} for model, each in scores.items()}
    packed = pack_rankings("ab", metric, truth, scores)
    result = json.loads(json.dumps(keep_outcomes(measured(key, figures, []), packed)))
    direct = ranking_difference(metric, truth, first, second)
    assert result["differences"][key] == direct.as_json()
    champion = {"outcomes": as_model(result["outcomes"], "baseline", "champion")}
    assert compare_outcomes(key, result, "trained", champion, "champion") == direct
    missing = compare_outcomes(key, result, "trained", champion, "baseline")
    assert isinstance(missing, str) and "not kept" in missing


def test_a_mean_of_values_is_compared_beside_shares_of_correct_images():
    rng = np.random.default_rng(0)
    precision = {"trained": rng.random(90).astype(np.float32), "baseline": rng.random(90).astype(np.float32)}
    first = {model: values > 0.5 for model, values in precision.items()}
    packed = pack_outcomes(
        "ab",
        {model: {"retrieval/r@1": each} for model, each in first.items()},
        values={model: {"retrieval/map": each} for model, each in precision.items()},
    )
    result = keep_outcomes(measured("retrieval/map", {}, []), packed)
    assert set(result["differences"]) == {"retrieval/map", "retrieval/r@1"}
    kept = Difference.from_json(result["differences"]["retrieval/map"])
    assert kept.points == pytest.approx(100 * (precision["trained"].mean() - precision["baseline"].mean()), abs=1e-3)
