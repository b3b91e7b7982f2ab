"""Splits and classes from folder names."""

from __future__ import annotations

import unicodedata

import pytest

from esvit_core.data.ingest.layout import detect_layout
from esvit_core.errors import UserError


def where(*names: str) -> list[tuple[str | None, str | None]]:
    return [(assignment.split, assignment.label) for assignment in detect_layout(names, "source").assignments]


def test_class_folders():
    assert where("cat/1.jpg", "dog/2.jpg") == [(None, "cat"), (None, "dog")]
    assert detect_layout(["dog/2.jpg", "cat/1.jpg"], "source").classes == ["cat", "dog"]


def test_a_flat_folder_has_no_classes():
    assert where("1.jpg", "2.jpg") == [(None, None)] * 2


def test_images_beside_class_folders_have_no_class():
    assert where("1.jpg", "cat/2.jpg", "dog/3.jpg") == [(None, None), (None, "cat"), (None, "dog")]


def test_folders_below_a_class_belong_to_it():
    assert where("cat/a/b/1.jpg", "dog/2.jpg") == [(None, "cat"), (None, "dog")]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "test"])
def test_split_folders(val):
    names = ["train/cat/1.jpg", f"{val}/cat/2.jpg", "train/dog/3.jpg"]
    assert where(*names) == [("train", "cat"), ("val", "cat"), ("train", "dog")]


def test_with_all_three_the_test_split_is_kept_apart():
    assert where("train/a/1.jpg", "val/a/2.jpg", "test/a/3.jpg") == [("train", "a"), ("val", "a"), ("test", "a")]


def test_split_folders_without_classes():
    assert where("train/1.jpg", "val/2.jpg") == [("train", None), ("val", None)]


def test_a_train_folder_alone_is_a_split():
    assert where("train/a/1.jpg", "train/b/2.jpg") == [("train", "a"), ("train", "b")]


def test_train_may_be_a_class_among_others():
    assert where("car/1.jpg", "train/2.jpg", "bus/3.jpg") == [(None, "car"), (None, "train"), (None, "bus")]


def test_a_single_top_folder_is_ignored():
    assert where("set/v1/cat/1.jpg", "set/v1/dog/2.jpg") == [(None, "cat"), (None, "dog")]
    assert where("set/train/cat/1.jpg", "set/val/cat/2.jpg") == [("train", "cat"), ("val", "cat")]
    assert where("set/1.jpg", "set/2.jpg") == [(None, None)] * 2


def test_a_readme_does_not_influence_the_layout():
    assert where("README.md", "set/cat/1.jpg", "set/LICENSE.txt", "set/dog/2.jpg")[1::2] == [
        (None, "cat"),
        (None, "dog"),
    ]
    assert detect_layout(["notes/a.txt", "cat/1.jpg", "dog/1.jpg"], "source").classes == ["cat", "dog"]


def test_keys_do_not_depend_on_the_top_folder():
    keys = [
        [p.key for p in detect_layout([f"{top}cat/1.jpg", f"{top}dog/2.jpg"], "s").assignments]
        for top in ("", "set/v2/")
    ]
    assert keys[0] == keys[1] == ["cat/1.jpg", "dog/2.jpg"]


def test_composed_and_decomposed_letters_are_the_same_class():
    names = [unicodedata.normalize(form, "Bäume/1.jpg") for form in ("NFC", "NFD")]
    assert detect_layout([*names, "x/2.jpg"], "source").classes == ["Bäume", "x"]


def test_images_outside_the_split_folders_have_a_problem():
    assignments = detect_layout(["train/a/1.jpg", "val/a/2.jpg", "stray.jpg", "other/3.jpg"], "source").assignments
    assert [bool(p.problem) for p in assignments] == [False, False, True, True]


def test_split_folders_without_train_are_a_user_error():
    with pytest.raises(UserError, match="no train/"):
        detect_layout(["val/a/1.jpg", "test/a/2.jpg"], "source")
