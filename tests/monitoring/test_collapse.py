"""Each collapse, forced in a tiny network in real training, is detected and named; healthy runs are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from esvit_core.config import Config, DiagnosticsConfig
from esvit_core.losses.objective import Objective
from esvit_core.models.multicrop import MultiCropNetwork, build_student_teacher
from esvit_core.training.collapse import CollapseDetector, CollapseSign
from esvit_core.training.diagnostics import BatchStatistics
from esvit_core.training.optim.optimizer import update_teacher_

K, B, STEPS, PATIENCE = 64, 32, 40, 20
TINY: dict[str, Any] = {
    "augment": {
        "global_crops": {"size": 16, "number": 2, "scale": (0.4, 1.0)},
        "local_crops": {"size": 8, "number": 0, "scale": (0.05, 0.4)},
    },
    "model": {
        "arch": "swin",
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 2,
    },
    "head": {"out_dim": K, "hidden_dim": 32, "bottleneck_dim": 16},
}
Figures = dict[str, float]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for so small a network
    yield
    torch.set_num_threads(threads)


def trained(
    lr: float, spoil: Callable[[MultiCropNetwork], None] | None = None, **objective: float
) -> Iterator[tuple[int, Figures]]:
    """The diagnostics of each step of a training on coloured noise."""
    config = Config.from_mapping({**TINY, "objective": objective})
    student, teacher = build_student_teacher(config)
    if spoil:
        spoil(student)
        spoil(teacher)
    loss, optimizer = Objective(config.objective, K), torch.optim.AdamW(student.parameters(), lr)
    draw, temp = torch.Generator().manual_seed(0), config.objective.teacher_temp
    for step in range(1, STEPS + 1):
        images = F.interpolate(torch.randn(B, 3, 4, 4, generator=draw), 16, mode="bicubic")
        crops = [images + 0.3 * torch.randn(B, 3, 16, 16, generator=draw) for _ in range(2)]
        with torch.no_grad():
            teacher_out = teacher(crops)
        student_out = student(crops)
        optimizer.zero_grad()
        loss(student_out, teacher_out, temp).total.backward()
        optimizer.step()
        yield step, BatchStatistics(student_out, teacher_out, loss, temp).diagnostics().figures()
        update_teacher_(student, teacher, 0.9)


def new_detector(**diagnostics: Any) -> CollapseDetector:
    return CollapseDetector(DiagnosticsConfig(**{"warn_after": 10, **diagnostics}), PATIENCE, K)


def first(kind: str, run: Iterator[tuple[int, Figures]]) -> CollapseSign | None:
    """The first sign of the kind that a watch sees in the run."""
    detector = new_detector()
    return next((sign for step, figures in run for sign in detector.observe(step, figures) if sign.kind == kind), None)


def constant_output(network: MultiCropNetwork) -> None:
    """Nothing of the image passes the last norm, and its weights are not trained."""
    norm = network.backbone.norm
    torch.nn.init.zeros_(norm.weight).requires_grad_(False)
    torch.nn.init.ones_(norm.bias)


COLLAPSES: dict[str, tuple[dict[str, Any], str, str]] = {
    "constant output": (
        {"lr": 1e-3, "spoil": constant_output, "teacher_temp": 0.04},
        "the same feature for every image",
        "lower optimizer.lr, or raise optimizer.teacher_momentum",
    ),
    "uniform output": (
        {"lr": 1e-3, "teacher_temp": 100.0},
        "the uniform distribution for every image",
        "lower objective.teacher_temp",
    ),
    "no centering": (
        {"lr": 3e-3, "teacher_temp": 0.02, "center_momentum": 1.0},
        "one prototype for every image, without centering",
        "lower objective.center_momentum",
    ),
}


@pytest.mark.parametrize("collapse", COLLAPSES)
def test_a_forced_collapse_warns_then_stops_with_its_name_and_advice(collapse: str) -> None:
    settings, name, advice = COLLAPSES[collapse]
    figures = list(trained(**settings))
    warning, stop = first("warn", iter(figures)), first("stop", iter(figures))
    assert warning is not None and stop is not None and warning.step < stop.step
    for sign in (warning, stop):
        assert sign.meaning == name and advice in str(sign)
        assert f"from step {sign.since} to {sign.step} ({sign.figure} " in str(sign)
    assert stop.step - stop.since == PATIENCE


def test_a_healthy_training_causes_no_sign() -> None:
    assert first("warn", trained(lr=1e-4, teacher_temp=0.04)) is None


def test_the_demo_causes_no_sign() -> None:
    """Figures of a run of the demo recipe, every 20th step."""
    lines = json.loads((Path(__file__).parent / "demo_log.json").read_text(encoding="utf-8"))
    detector = CollapseDetector(DiagnosticsConfig(warn_after=0), stop_after=0, prototypes=256)  # no patience at all
    assert len(lines) > 30 and all("student_kl_region" in line for line in lines)
    assert [sign for line in lines for sign in detector.observe(line["step"], line)] == []


HEALTHY = {"entropy_view": 3.0, "kl_view": 1.0, "feature_std": 0.8, "prototypes_view": 20, "center_norm_view": 0.1}


def test_a_recovery_resets_the_patience() -> None:
    detector, low = new_detector(), {**HEALTHY, "entropy_view": 0.1}
    for step, figures in ((10, low), (20, HEALTHY), (30, low), (40, low)):
        assert [s for s in detector.observe(step, figures) if s.kind == "stop"] == []
    (stop,) = detector.observe(50, low)
    assert (stop.kind, stop.since, stop.step) == ("stop", 30, 50)


def test_a_sign_is_reported_once_per_episode() -> None:
    detector, low = new_detector(kl_warn=0.5), {**HEALTHY, "kl_view": 0.4}
    reported = [step for step in range(10, 100, 10) if detector.observe(step, low)]
    assert reported == [20]
    assert detector.observe(100, HEALTHY) == []
    reported = [step for step in range(110, 200, 10) if detector.observe(step, low)]
    assert reported == [120]


def test_a_sign_that_another_explains_is_left_out() -> None:
    detector = new_detector()
    everything_low = {"entropy_view": 0.1, "kl_view": 0.0, "feature_std": 0.001}
    signs = [sign for step in (0, 10, 20) for sign in detector.observe(step, everything_low)]
    assert [(s.kind, s.figure) for s in signs] == [("warn", "feature_std"), ("stop", "feature_std")]
    signs = [sign for step in (30, 40) for sign in detector.observe(step, {**everything_low, "feature_std": 0.5})]
    assert [(s.kind, s.figure) for s in signs] == [("stop", "entropy_view"), ("warn", "entropy_view")]


def test_a_bound_of_none_is_never_reached_and_bounds_can_be_set() -> None:
    detector = new_detector(entropy_warn=None, entropy_stop=None, feature_rank_warn=5.0)
    figures = {**HEALTHY, "entropy_view": 0.1, "feature_rank": 4.0}
    signs = [sign for step in (0, 10, 20, 30) for sign in detector.observe(step, figures)]
    assert [str(sign) for sign in signs] == [
        "features of few dimensions from step 0 to 10 (feature_rank 4, expected at least 5); "
        "lower optimizer.lr or optimizer.weight_decay_end"
    ]


def test_the_same_distribution_is_not_called_uniform() -> None:
    detector = new_detector()
    signs = [sign for step in (0, 10) for sign in detector.observe(step, {**HEALTHY, "kl_view": 0.0})]
    assert [sign.meaning for sign in signs] == ["the same distribution for every image"]


def test_episodes_survive_a_restart() -> None:
    before, after, low = new_detector(), new_detector(), {**HEALTHY, "feature_std": 0.001}
    reported = [sign for step in (10, 20) for sign in before.observe(step, low)]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    reported += after.observe(30, low)
    assert [(s.kind, s.since, s.step) for s in reported] == [("warn", 10, 20), ("stop", 10, 30)]
