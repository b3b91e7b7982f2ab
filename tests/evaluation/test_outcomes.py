"""Outcomes of single images are kept with the result, and only the same images are compared."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esvit_core.evaluation.outcomes import compare_outcomes, keep_outcomes, pack_outcomes, unpack_correct
from esvit_core.evaluation.results import measured
from esvit_core.evaluation.significance import Difference, accuracy_difference, mean_per_class_difference

RNG = np.random.default_rng(0)
LABELS = np.repeat([0, 1, 2], [500, 300, 11])
TRAINED, BASELINE = RNG.random(811) < 0.7, RNG.random(811) < 0.5


def result(held_out: str = "ab", labels: np.ndarray | None = None, **correct: np.ndarray) -> dict:
    models = correct or {"trained": TRAINED, "baseline": BASELINE}
    kept = {model: {"knn/20": each} for model, each in models.items()}
    figures = {model: {"knn/20": 100 * each.mean()} for model, each in models.items()}
    return json.loads(json.dumps(keep_outcomes(measured("knn/20", figures, []), pack_outcomes(held_out, kept, labels))))


def test_a_bit_per_image_survives_json():
    outcomes = result()["outcomes"]
    for model, correct in (("trained", TRAINED), ("baseline", BASELINE)):
        assert np.array_equal(unpack_correct(outcomes, model, "knn/20"), correct)
        assert len(outcomes["correct"][model]["knn/20"]) < 811 / 5
    assert (
        unpack_correct(outcomes, "trained", "knn/7") is None and unpack_correct(outcomes, "champion", "knn/20") is None
    )


def test_the_difference_from_the_baseline_is_in_the_result():
    kept = result()["differences"]["knn/20"]
    assert kept == accuracy_difference(TRAINED, BASELINE).as_json() and kept["decision"] == "better"


def test_a_mean_over_classes_is_compared_as_such():
    kept = result(labels=LABELS)["differences"]["knn/20"]
    assert kept == mean_per_class_difference(TRAINED, BASELINE, LABELS).as_json()


def test_models_of_two_runs_are_compared_on_the_same_images():
    first, second = result(trained=TRAINED), result(champion=BASELINE)
    found = compare_outcomes("knn/20", first, "trained", second, "champion")
    assert isinstance(found, Difference) and found == accuracy_difference(TRAINED, BASELINE)
    assert "differences" not in first


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (result("cd", champion=BASELINE), "different held-out images"),
        (result(champion=BASELINE[:-1]), "different held-out images"),
        (result(baseline=BASELINE), "not kept"),
        (measured("knn/20", {"champion": {"knn/20": 1.0}}, []), "not kept"),
    ],
)
def test_without_outcomes_of_the_same_images_the_reason_is_given(other, reason):
    found = compare_outcomes("knn/20", result(), "trained", other, "champion")
    assert isinstance(found, str) and reason in found
