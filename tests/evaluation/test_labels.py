"""Missing or few labels are explained."""

from __future__ import annotations

import numpy as np

from esvit_core.evaluation.features import Features
from esvit_core.evaluation.labels import class_names, label_notes, missing_labels, unusable_features

NONE = np.full(4, -1)


def test_labels_on_both_sides_can_be_measured():
    assert missing_labels(np.array([0, 1]), np.array([1])) is None


def test_each_gap_has_its_reason():
    two, one = np.array([0, 1, 1]), np.array([2, 2])
    assert "no labels" in missing_labels(NONE, NONE)
    assert "belong to one class" in missing_labels(one, two)
    assert "no images are held out" in missing_labels(two, np.zeros(0, int))
    assert "held-out images have no labels" in missing_labels(two, NONE)
    assert "no training images" in missing_labels(np.zeros(0, int), two)


def test_classes_missing_on_one_side_are_named():
    notes = label_notes(np.array([0, 0, 1, 1, 2]), np.array([0, 3, -1]), ["ant", "bee", "cat", "dog"])
    assert notes == [
        "2 classes without held-out images, so not measured: bee, cat",
        "1 class without training images, so always wrong: dog",
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
