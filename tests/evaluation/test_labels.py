"""Missing or few labels are explained."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from esvit_core.config import Config
from esvit_core.evaluation.features import Features
from esvit_core.evaluation.knn import measure_knn
from esvit_core.evaluation.labels import class_names, label_notes, missing_labels, task_of, unusable_features

NONE = np.full(4, -1)


NAMES = ["ant", "bee", "cat", "dog"]


def test_labels_on_both_sides_can_be_measured():
    assert missing_labels(np.array([0, 1]), np.array([1]), NAMES) is None


def test_each_gap_has_its_reason():
    two, one = np.array([0, 1, 1]), np.array([2, 2])
    assert "no labels" in missing_labels(NONE, NONE, NAMES)
    assert "belong to one class" in missing_labels(one, two, NAMES)
    assert "no images are held out" in missing_labels(two, np.zeros(0, int), NAMES)
    assert "held-out images have no labels" in missing_labels(two, NONE, NAMES)
    assert "no training images" in missing_labels(np.zeros(0, int), two, NAMES)


def test_a_held_out_class_that_training_lacks_is_a_reason_not_a_low_figure():
    reason = missing_labels(np.array([0, 1, -1]), np.array([0, 2, 2, -1]), NAMES)
    assert reason.startswith("cat, a class of held-out images, has no training images; ")
    reason = missing_labels(np.array([0, 1]), np.array([0, 2, 3]), NAMES)
    assert reason.startswith("2 classes of held-out images have no training images: cat, dog; ")


def test_no_class_in_common_is_a_reason_not_a_zero():
    reason = missing_labels(np.array([0, 1]), np.array([3, 2, -1]), NAMES)
    assert reason.startswith(
        "the held-out images (cat, dog) have no class in common with the training images (ant, bee)"
    )


def test_a_measurement_without_a_common_class_is_left_out_with_the_reason():
    rng = np.random.default_rng(0)

    def features(*labels):
        view = rng.standard_normal((len(labels), 4)).astype(np.float32)
        return Features(view, view, np.array(labels))

    task = task_of({"trained": (features(0, 0, 1, 1), features(2, 3))}, SimpleNamespace(classes=NAMES))
    result = measure_knn(task, Config())
    assert (result["status"], result["results"]) == ("left_out", {}) and "no class in common" in result["reason"]


def test_limits_of_a_figure_are_named():
    notes = label_notes(np.array([0, 0, 1, 1, 2]), np.array([0, -1]), NAMES)
    assert notes == [
        "2 classes without held-out images, so not measured: bee, cat",
        "1 class with a single training image: cat",
        "1 image without a label not used",
    ]


def test_long_lists_are_cut():
    names = [f"c{i}" for i in range(9)]
    (note,) = label_notes(np.repeat(np.arange(9), 2), np.array([0]), names)
    assert note.endswith("c1, c2, c3, c4, c5 and 3 more")


def test_classes_without_a_name_get_their_number():
    assert class_names(["ant"], np.array([0, 2])) == ["ant", "1", "2"]


def features(view: np.ndarray, blocks: np.ndarray | None = None) -> Features:
    return Features(view, view if blocks is None else blocks, np.zeros(len(view), int))


def test_features_that_cannot_be_classified_have_a_reason():
    good = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    broken = good.copy()
    broken[2:4, 1] = np.nan, np.inf
    assert unusable_features("trained", features(good), features(good)) is None
    assert unusable_features("trained", features(good), features(good, broken)) == (
        "the trained backbone gives NaN or infinite features for 2 of 6 held-out images"
    )
    collapsed = np.float32(3) + np.float32(2.4e-7) * (np.arange(18).reshape(6, 3) % 2).astype(np.float32)
    for same in (np.full_like(good, 3), collapsed, np.zeros_like(good)):
        assert unusable_features("baseline", features(same), features(good)) == (
            "the baseline backbone gives all 6 training images the same features"
        )
    assert unusable_features("trained", features(good * 1e-4), features(good)) is None


def test_the_features_of_one_image_are_not_all_the_same():
    assert unusable_features("trained", features(np.ones((1, 3))), features(np.ones((2, 3)))) is None
