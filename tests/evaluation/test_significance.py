"""The interval and the test of a paired difference: exact where a formula exists, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from esvit_core.evaluation.significance import (
    Difference,
    accuracy_difference,
    images_needed,
    mcnemar_p,
    mean_per_class_difference,
    too_few,
)


def outcomes(first_only: int, second_only: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of two models on ``images`` images, of which they agree on all others."""
    both = images - first_only - second_only
    first = np.repeat([True, False, True], [first_only, second_only, both])
    second = np.repeat([False, True, True], [first_only, second_only, both])
    return first, second


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (6, 0), (0, 6), (7, 7), (31, 14), (640, 560)])
def test_the_p_value_is_that_of_the_exact_binomial_test(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_p(first, second) == pytest.approx(expected, rel=1e-9)


def test_the_counts_of_many_images_do_not_underflow():
    assert mcnemar_p(40_000, 41_000) == pytest.approx(binomtest(40_000, 81_000).pvalue, rel=1e-6)
    assert mcnemar_p(0, 5_000) == 0.0 or mcnemar_p(0, 5_000) < 1e-300


def test_a_clear_gain_is_better_and_reversed_it_is_worse():
    first, second = outcomes(60, 25, 400)
    gain, loss = accuracy_difference(first, second), accuracy_difference(second, first)
    assert gain.points == pytest.approx(8.75) and loss.points == pytest.approx(-8.75)
    assert 0 < gain.low < 8.75 < gain.high and loss.high < 0
    assert (gain.decision, loss.decision) == ("better", "worse")
    assert gain.p == loss.p and (gain.images, gain.discordant) == (400, 85)


def test_a_difference_that_may_be_chance_is_not_shown():
    found = accuracy_difference(*outcomes(30, 20, 300))
    assert found.low < 0 < found.high and found.p > 0.05 and found.decision == "no difference shown"
    assert found.images_needed is not None and found.images_needed > 300


def test_too_few_discordant_images_show_nothing():
    found = accuracy_difference(*outcomes(5, 0, 11))
    assert found.low > 0 and found.p == pytest.approx(0.0625) and found.decision == "no difference shown"


@pytest.mark.parametrize(
    ("first", "second", "images", "text"),
    [
        (
            1,
            1,
            22,
            "22 images are too few to show anything: the two differ on 2, and must differ on at least 6, as on 66 images at this rate",
        ),
        (0, 0, 22, "22 images are too few to show anything: the two differ on 0, and must differ on at least 6"),
        (20, 20, 400, ""),
        (101, 100, 800, "800 images are too few to show a difference this small; 80,000 would be, too"),
    ],
)
def test_equal_figures_of_few_images_are_no_evidence(first, second, images, text):
    assert too_few(accuracy_difference(*outcomes(first, second, images))) == text


def test_equal_outcomes_have_an_interval_around_zero():
    found = accuracy_difference(*outcomes(0, 0, 50))
    assert found.low < 0 < found.high and found.points == 0 and found.p == 1 and found.images_needed is None


def test_the_result_does_not_depend_on_chance():
    first, second = outcomes(31, 14, 200)
    assert accuracy_difference(first, second) == accuracy_difference(first, second)


def test_outcomes_of_other_images_are_refused():
    with pytest.raises(ValueError, match="the same images"):
        accuracy_difference(np.ones(3, bool), np.ones(4, bool))


def test_the_interval_is_that_of_resampled_images():
    rng = np.random.default_rng(0)
    first, second = outcomes(60, 25, 400)
    chosen = rng.integers(0, 400, (4000, 400))
    drawn = 100 * (first[chosen].mean(1) - second[chosen].mean(1))
    found = accuracy_difference(first, second)
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.4)


def test_the_interval_of_a_mean_over_classes_is_that_of_images_resampled_in_each_class():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [200, 60, 30])
    first, second = rng.random(290) < 0.7, rng.random(290) < 0.5
    drawn = np.zeros(4000)
    for value in range(3):
        members = np.flatnonzero(labels == value)
        chosen = members[rng.integers(0, len(members), (4000, len(members)))]
        drawn += 100 * (first[chosen].mean(1) - second[chosen].mean(1)) / 3
    found = mean_per_class_difference(first, second, labels)
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.8)


def test_classes_of_equal_size_weigh_every_image_alike():
    first, second = outcomes(30, 12, 300)
    order = np.random.default_rng(0).permutation(300)
    labels = np.arange(300) % 3
    per_class = mean_per_class_difference(first[order], second[order], labels)
    plain = accuracy_difference(first, second)
    assert (per_class.p, per_class.images_needed) == (plain.p, plain.images_needed)
    assert per_class.points == pytest.approx(plain.points)


def test_a_mean_over_classes_counts_a_small_class_as_much_as_a_large_one():
    labels = np.repeat([0, 1], [900, 20])
    first = np.concatenate([np.arange(900) < 690, np.arange(20) < 18])
    second = np.concatenate([np.arange(900) < 700, np.arange(20) < 6])
    assert accuracy_difference(first, second).points > 0  # 12 images gained, 10 lost
    found = mean_per_class_difference(first, second, labels)
    assert found.points == pytest.approx((60 - 100 / 90) / 2) and found.decision == "better"


def test_as_many_images_as_stated_show_the_difference_in_four_of_five_cases():
    share, discordant = 0.05, 0.2
    images = images_needed(share, discordant)
    assert images is not None
    rng = np.random.default_rng(0)
    cells = [(discordant + share) / 2, (discordant - share) / 2, 1 - discordant]
    shown = [mcnemar_p(first, second) < 0.05 for first, second, _ in rng.multinomial(images, cells, size=1000)]
    assert 0.74 < np.mean(shown) < 0.86


def cases(count: int, gain: bool):
    """Yield outcomes of two models on made images, and the true difference in points."""
    rng = np.random.default_rng(5)
    for _ in range(count):
        images = int(rng.integers(50, 2000))
        discordant = rng.uniform(0.03, 0.5)
        share = rng.uniform(0.2, 0.8) if gain else 0.5
        cells = [discordant * share, discordant * (1 - share), 1 - discordant]
        first, second, _ = rng.multinomial(images, cells)
        yield outcomes(first, second, images), 100 * (cells[0] - cells[1])


def test_the_interval_contains_the_true_difference_in_95_of_100_cases():
    held = 0
    for (first, second), true in cases(2000, gain=True):
        found = accuracy_difference(first, second, resamples=1000)
        held += found.low <= true <= found.high
    assert 0.93 <= held / 2000 <= 0.97


def test_equal_models_are_rarely_said_to_differ():
    decisions = [
        accuracy_difference(first, second, resamples=200).decision for (first, second), _ in cases(2000, gain=False)
    ]
    assert decisions.count("better") / 2000 <= 0.05
    assert (2000 - decisions.count("no difference shown")) / 2000 <= 0.05


def test_equal_models_are_rarely_said_to_differ_in_their_mean_over_classes():
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(5), [100, 60, 40, 20, 10])
    differ = 0
    for _ in range(400):
        first, second = rng.random(len(labels)) < 0.6, rng.random(len(labels)) < 0.6
        differ += mean_per_class_difference(first, second, labels, resamples=500).decision != "no difference shown"
    assert differ / 400 <= 0.08  # 5 %, and three standard errors of 400 cases


def test_a_difference_is_kept_as_json():
    found = accuracy_difference(*outcomes(31, 14, 200))
    kept = found.as_json()
    assert kept["decision"] == "better" and kept["images"] == 200 and len(kept["interval"]) == 2
    again = Difference.from_json(kept)
    assert again.decision == found.decision and again.points == pytest.approx(found.points, abs=1e-4)
