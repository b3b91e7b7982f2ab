"""The choice of images and splits: by name, evenly distributed, and stable when images are added."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esvit_core.data.ingest import split
from esvit_core.data.ingest.split import choose_images, hash_fraction, hold_out, order_by_hash, storage_order

names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60, unique=True)


def held_names(keys: list[str], labels: list[str | None], fraction: float) -> set[str]:
    return {keys[i] for i in hold_out(keys, labels, fraction)}


def test_hash_fractions_are_even_and_independent_between_purposes():
    first = [hash_fraction("a", str(i)) for i in range(4000)]
    second = [hash_fraction("b", str(i)) for i in range(4000)]
    assert abs(sum(x < 0.1 for x in first) - 400) < 80
    assert abs(sum(x < 0.5 and y < 0.5 for x, y in zip(first, second, strict=True)) - 1000) < 150


@given(names, st.integers(1, 60))
def test_adding_images_moves_at_most_the_one_that_a_small_class_had_to_hold_out(keys, cut):
    before, after = keys[:cut], keys
    labels: list[str | None] = ["x"] * len(keys)
    moved = {k for k in before if (k in held_names(before, labels[:cut], 0.3)) != (k in held_names(after, labels, 0.3))}
    assert len(moved) <= 1


def test_adding_images_to_large_classes_moves_none():
    keys = [f"{label}/{i}" for label in "abc" for i in range(60)]
    more = [*keys, *(f"{label}/new{i}" for label in "abcd" for i in range(30))]
    before = held_names(keys, [k[0] for k in keys], 0.2)
    assert before == held_names(more, [k[0] for k in more], 0.2) & set(keys)


def test_every_class_of_two_or_more_has_images_in_both_splits():
    keys = [f"{label}/{i}" for label in range(50) for i in range(2 + label % 5)]
    labels: list[str | None] = [k.split("/")[0] for k in keys]
    held = hold_out(keys, labels, 0.1)
    sides = Counter((labels[i], i in held) for i in range(len(keys)))
    assert all(sides[str(label), True] and sides[str(label), False] for label in range(50))


def test_a_single_image_is_trained_on():
    assert hold_out(["one"], ["x"], 0.9) == set()


def test_the_share_is_about_the_requested_one_in_every_class():
    keys = [f"{label}/{i}" for label in range(4) for i in range(500)]
    held = Counter(keys[i].split("/")[0] for i in hold_out(keys, [k.split("/")[0] for k in keys], 0.2))
    assert all(abs(count - 100) < 40 for count in held.values())  # 4.5 standard deviations


def test_a_fraction_of_zero_holds_out_nothing():
    assert hold_out(["a", "b"], [None, None], 0) == set()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 100))
def test_chosen_classes_are_as_balanced_as_possible(sizes, count):
    keys = [f"{label}/{i}" for label, size in enumerate(sizes) for i in range(size)]
    groups = [("", k.split("/")[0]) for k in keys]
    taken = Counter(groups[i][1] for i in choose_images(keys, groups, count))
    assert sum(taken.values()) == min(count, len(keys))
    level = max(taken.values())
    for label, size in enumerate(sizes):
        assert taken[str(label)] >= min(size, level - 1)


def test_splits_keep_their_proportions():
    keys = [str(i) for i in range(600)]
    groups = [("train" if i < 500 else "val", str(i % 10)) for i in range(600)]
    taken = Counter(groups[i][0] for i in choose_images(keys, groups, 60))
    assert taken == {"train": 50, "val": 10}


@given(names)
def test_order_and_choice_do_not_depend_on_the_order_of_listing(keys):
    backwards = keys[::-1]
    groups = [("", "")] * len(keys)
    assert [keys[i] for i in storage_order(keys)] == [backwards[i] for i in storage_order(backwards)]
    assert {keys[i] for i in choose_images(keys, groups, 5)} == {
        backwards[i] for i in choose_images(backwards, groups, 5)
    }


def coarse(purpose: str, key: str) -> float:
    """Return a hash of which many are equal, or begin alike, up to the largest possible."""
    return (0.0, 0.25, 0.25 + 2**-53, 0.5, 1 - 2**-53, 1.0)[len(key) % 6]


@pytest.mark.parametrize("hashed", [hash_fraction, coarse])
@given(data=st.data(), keys=st.lists(st.text(st.characters(exclude_categories=()), max_size=8), max_size=80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_is_that_of_the_hashes_and_then_of_the_names(monkeypatch, hashed, data, keys):
    monkeypatch.setattr(split, "hash_fraction", hashed)
    monkeypatch.setattr(split, "CHUNK", 7)
    simple = sorted(range(len(keys)), key=lambda i: (hashed("x", keys[i]), keys[i], i))
    assert order_by_hash("x", keys).tolist() == simple
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))), dtype=bool)
    assert order_by_hash("x", keys, chosen).tolist() == [i for i in simple if chosen[i]]


@given(st.lists(st.tuples(st.text(max_size=3), st.sampled_from([None, "a", "b", "c"]))), st.floats(0, 1))
def test_the_images_to_hold_out_are_those_with_the_smallest_hashes_of_each_class(images, fraction):
    keys, labels = [key for key, _ in images], [label for _, label in images]
    held: set[int] = set()
    for label in set(labels) if fraction else ():
        members = [i for i in range(len(keys)) if labels[i] == label]
        members.sort(key=lambda i: (hash_fraction("hold out", keys[i]), keys[i], i))
        count = sum(hash_fraction("hold out", keys[i]) < fraction for i in members)
        held |= {*members[: min(max(count, 1), len(members) - 1)]}
    assert hold_out(keys, labels, fraction) == held


@given(
    st.lists(st.tuples(st.text(max_size=3), st.sampled_from([("", "a"), ("", "b"), ("val", "a")]))), st.integers(0, 9)
)
def test_the_images_to_choose_are_those_with_the_smallest_hashes_of_each_class(images, count):
    keys, groups = [key for key, _ in images], [group for _, group in images]
    chosen = choose_images(keys, groups, count).tolist()
    assert chosen == sorted(chosen) and len(chosen) == min(count, len(keys))
    for group in set(groups):
        members = [i for i in range(len(keys)) if groups[i] == group]
        members.sort(key=lambda i: (hash_fraction("choose", keys[i]), keys[i], i))
        taken = [i for i in chosen if groups[i] == group]
        assert {*taken} == {*members[: len(taken)]}
