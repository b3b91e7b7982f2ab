"""The objective against the published implementation: losses, gradients, centers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esvit_core.config import ObjectiveConfig
from esvit_core.losses import Objective
from esvit_core.models import NetworkOutput
from esvit_core.training.optim.schedules import teacher_temperature

K, B, CROPS = 32, 3, [6, 6, 2, 2]
TEMPERATURES = teacher_temperature(0.04, 0.07, 10, 20)


def outputs(golden) -> tuple[NetworkOutput, NetworkOutput]:
    student = NetworkOutput(
        golden.tensor("s_view", 12, K).requires_grad_(),
        golden.tensor("s_region", 48, K).requires_grad_(),
        golden.tensor("s_feat", 48, 16),
        CROPS,
    )
    teacher = NetworkOutput(
        golden.tensor("t_view", 6, K), golden.tensor("t_region", 36, K), golden.tensor("t_feat", 36, 16), CROPS[:2]
    )
    return student, teacher


def objective(golden, region: bool) -> Objective:
    made = Objective(ObjectiveConfig(region=region), K)
    made.center_view.value.copy_(0.1 * golden.tensor("center", 1, K))
    if region:
        made.center_region.value.copy_(0.1 * golden.tensor("center_grid", 1, K))
    return made


def cases(golden, task: str) -> set[str]:
    return {name.split("/")[1] for name in golden.arrays("losses") if name.startswith(f"{task}/")}


def compare(found: dict[str, torch.Tensor], expected: dict[str, np.ndarray], case: str, record) -> None:
    assert {f"{case}/{name}" for name in found} == {name for name in expected if name.startswith(f"{case}/")}
    largest = {name: np.abs(value.detach().numpy() - expected[f"{case}/{name}"]).max() for name, value in found.items()}
    record(case, largest)
    assert max(largest.values()) <= 1e-5


def named_losses(test):
    test.golden_file = "losses"
    return test


@named_losses
def test_view_loss(golden, golden_file, record):
    expected = golden.arrays(golden_file)
    for case in sorted(cases(golden, "view")):
        epoch, kind = case.removeprefix("e").split("_")
        student, teacher = outputs(golden)
        made = objective(golden, region=False)
        mix = None
        if kind == "mix":
            mix = [torch.softmax(golden.tensor(f"mix/{v}", B, B), -1) for v in range(len(CROPS))]
        terms = made(student, teacher, TEMPERATURES[int(epoch)], mix)
        terms.total.backward()
        found = {"loss": terms.total, "grad": student.view_logits.grad, "center": made.center_view.value}
        compare(found, expected, f"view/{case}", record)


@named_losses
def test_view_and_region_loss(golden, golden_file, record):
    expected = golden.arrays(golden_file)
    for case in sorted(cases(golden, "region")):
        student, teacher = outputs(golden)
        made = objective(golden, region=True)
        terms = made(student, teacher, TEMPERATURES[int(case.removeprefix("e").split("_")[0])])
        terms.total.backward()
        found = {
            "loss": terms.total,
            "grad_view": student.view_logits.grad,
            "grad_region": student.region_logits.grad,
            "center": made.center_view.value,
            "center_grid": made.center_region.value,
        }
        compare(found, expected, f"region/{case}", record)
        assert terms.total.item() == pytest.approx(0.5 * terms.view.item() + 0.5 * terms.region.item())
