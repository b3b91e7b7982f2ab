"""Mixup and CutMix with timm, at the same point of the step as in the published code; a function of seed and step."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from timm.data import Mixup

from esvit_core.config import MixupConfig
from esvit_core.data.loading.mixup import mix_crops
from esvit_core.data.loading.randomness import seeded

B = 4


def crops() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, 3, size, size, generator=generator) for size in (12, 12, 6, 6, 6)]


def published(images: list[torch.Tensor], num_mixup_views: int, **arguments: object) -> tuple[list, list, list]:
    """The published step: the teacher's list is made first, then timm mixes in place."""
    mixup_fn = Mixup(label_smoothing=0.0, num_classes=B, **arguments)
    teacher_input = images[:2]
    student_input, targets_mixup, mixed = [], [], 0
    for samples in images:
        if mixed < num_mixup_views:
            samples, targets = mixup_fn(samples, torch.arange(B))
            mixed += 1
        else:
            targets = torch.eye(B)
        student_input.append(samples)
        targets_mixup.append(targets)
    return student_input, teacher_input, targets_mixup


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("views", [10, 3])
def test_crops_and_shares_match_the_published_code(mode, views):
    for step in range(6):  # mixup in some, CutMix in others
        ours = mix_crops(crops(), MixupConfig(use=True, crops=views, mode=mode), seed=3, step=step)
        with seeded((3, 2, step)):
            theirs = published(crops(), views, mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode=mode)
        for found, expected in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, found, expected))


def test_the_teacher_sees_mixed_images_unless_clean_teacher_is_set():
    original = crops()
    mixed = mix_crops(crops(), MixupConfig(use=True), seed=0, step=0)
    assert all(map(torch.equal, mixed.teacher, mixed.student[:2]))
    assert not any(map(torch.equal, mixed.teacher, original[:2]))
    clean = mix_crops(crops(), MixupConfig(use=True, clean_teacher=True), seed=0, step=0)
    assert all(map(torch.equal, clean.teacher, original[:2]))
    assert all(map(torch.equal, clean.student, mixed.student))


def test_shares_describe_the_mix():
    original = crops()
    mixed = mix_crops(crops(), MixupConfig(use=True, cutmix_alpha=0), seed=1, step=5)
    for before, after, share in zip(original, mixed.student, mixed.shares, strict=True):
        torch.testing.assert_close(share.sum(1), torch.ones(B))
        torch.testing.assert_close(after, torch.einsum("ij,jchw->ichw", share, before))


def test_mixing_is_a_function_of_seed_and_step_and_keeps_the_global_random_state():
    config = MixupConfig(use=True)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = mix_crops(crops(), config, seed=0, step=7)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    np.random.seed(99)
    again = mix_crops(crops(), config, seed=0, step=7)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    for seed, step in ((0, 8), (1, 7)):
        other = mix_crops(crops(), config, seed, step)
        assert not torch.equal(other.shares[0], first.shares[0])


def test_the_last_of_an_odd_number_is_not_mixed():
    original = [crop[:3] for crop in crops()]
    mixed = mix_crops([crop[:3].clone() for crop in crops()], MixupConfig(use=True), seed=1, step=5)
    assert mixed.shares is not None
    for before, after, share in zip(original, mixed.student, mixed.shares, strict=True):
        assert torch.equal(after[2], before[2]) and not torch.equal(after[:2], before[:2])
        assert share[2].tolist() == share[:, 2].tolist() == [0, 0, 1]
    alone = mix_crops([crop[:1].clone() for crop in crops()], MixupConfig(use=True), seed=1, step=5)
    assert all(torch.equal(a, b[:1]) for a, b in zip(alone.student, original, strict=True))


def test_a_recipe_that_does_not_mix_changes_nothing():
    mixed = mix_crops(crops(), MixupConfig(), seed=0, step=0)
    assert mixed.shares is None
    assert all(map(torch.equal, mixed.student, crops()))
    assert all(map(torch.equal, mixed.teacher, crops()[:2]))
