"""The signs of a collapsed teacher, made on purpose."""

import math

import pytest
import torch

from esvit_core.monitoring.collapse import CollapseWatch, Diagnostics, TeacherStatistics

K = 32


def diagnose(logits: torch.Tensor, features: torch.Tensor, regions: torch.Tensor | None = None) -> Diagnostics:
    centre = torch.zeros(1, K)
    return TeacherStatistics(logits, features, regions, centre, None if regions is None else centre, 0.05).diagnostics()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def healthy() -> Diagnostics:
    logits = torch.rand(64, K, generator=generator())
    features = torch.randn(64, 16, generator=generator())
    return diagnose(logits, features, logits.repeat(9, 1))


def collapsed(kind: str) -> Diagnostics:
    features = torch.randn(64, 16, generator=generator())
    noise = 1e-4 * torch.randn(64, K, generator=generator())
    if kind == "one prototype":
        return diagnose(torch.eye(K)[:1].repeat(64, 1) + noise, features)
    if kind == "uniform distribution":
        return diagnose(noise, features)
    return diagnose(torch.rand(64, K, generator=generator()), torch.ones(64, 16) + 1e-5 * features)


def test_figures_of_outputs_with_known_ones() -> None:
    logits = torch.eye(K).repeat(2, 1)  # each prototype gets two pictures of its own
    found = diagnose(logits, torch.eye(4).repeat(16, 1))
    assert found.entropy_view == pytest.approx(math.log(K), abs=1e-4)
    assert found.kl_view == pytest.approx(math.log(K), abs=1e-2)
    assert found.entropy_region is None and "entropy_region" not in found.figures()
    assert found.feature_std == pytest.approx(math.sqrt(1 - 1 / 4))


def test_the_mean_of_the_processes_is_that_of_the_whole_batch() -> None:
    logits, features = torch.rand(64, K, generator=generator()), torch.randn(64, 16, generator=generator())
    whole = diagnose(logits, features)
    centre = torch.zeros(1, K)
    halves = [TeacherStatistics(logits[h], features[h], None, centre, None, 0.05) for h in (slice(32), slice(32, 64))]
    halves[0].vector = (halves[0].vector + halves[1].vector) / 2
    assert halves[0].diagnostics().figures() == pytest.approx(whole.figures(), rel=1e-5)


@pytest.mark.parametrize("kind", ["one prototype", "uniform distribution", "same feature"])
def test_a_collapse_that_lasts_is_named_with_advice(kind: str) -> None:
    watch = CollapseWatch(patience=30)
    assert [watch.observe(step, collapsed(kind)) for step in (10, 20, 30)] == [None] * 3
    reason = watch.observe(40, collapsed(kind))
    assert reason is not None and kind in reason and "from step 10 to 40" in reason
    assert "optimizer.lr" in reason


def test_a_moment_of_health_starts_the_patience_anew() -> None:
    watch = CollapseWatch(patience=20)
    for step, found in enumerate([collapsed("one prototype"), healthy(), collapsed("one prototype")]):
        assert watch.observe(10 * step, found) is None
    assert watch.observe(30, collapsed("one prototype")) is None
    assert watch.observe(40, collapsed("one prototype")) is not None


def test_patience_survives_a_restart() -> None:
    before, after = CollapseWatch(patience=20), CollapseWatch(patience=20)
    before.observe(10, collapsed("same feature"))
    after.load_state_dict(before.state_dict())
    assert after.observe(30, collapsed("same feature")) is not None
