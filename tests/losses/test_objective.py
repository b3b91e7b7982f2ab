"""The fast objective against the plain formula, its gradients, and what the paper says of it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esvit_core.config import ObjectiveConfig
from esvit_core.kernels import chunked_softmax
from esvit_core.kernels.fused_softmax import TORCH_KERNELS
from esvit_core.losses import Objective, region_loss, view_loss
from esvit_core.losses.reference import plain_region_loss, plain_view_loss
from esvit_core.losses.region import match_crops
from esvit_core.losses.strategy import BLOCKWISE, CHUNKED, LossStrategy
from esvit_core.models import NetworkOutput

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05

sizes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "K": st.integers(2, 40),
        "teacher": st.integers(1, 6),
        "local": st.lists(st.integers(1, 5), max_size=4),  # regions of each local crop: sizes may differ
        "seed": st.integers(0, 2**31),
    }
)


def region_inputs(size: dict, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(size["seed"])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    regions = [size["teacher"], size["teacher"], *size["local"]]
    rows, teacher_rows = size["B"] * sum(regions), 2 * size["B"] * size["teacher"]
    return {
        "student_logits": (0.3 * draw(rows, size["K"])).requires_grad_(),
        "teacher_logits": 0.3 * draw(teacher_rows, size["K"]),
        "student_features": draw(rows, 8),
        "teacher_features": draw(teacher_rows, 8),
        "center": 0.1 * draw(1, size["K"]),
        "student_temp": STUDENT_TEMP,
        "teacher_temp": TEACHER_TEMP,
        "student_regions": regions,
        "teacher_regions": size["teacher"],
    }


def view_inputs(size: dict, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(size["seed"])
    crops = 2 + len(size["local"])
    shape = (crops * size["B"], size["K"])
    return {
        "student_logits": (0.3 * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_(),
        "teacher_logits": 0.3 * torch.randn(2 * size["B"], size["K"], generator=generator, dtype=dtype),
        "center": 0.1 * torch.randn(1, size["K"], generator=generator, dtype=dtype),
        "student_temp": STUDENT_TEMP,
        "teacher_temp": TEACHER_TEMP,
        "n_crops": crops,
    }


def assert_same(fast, plain, inputs: dict) -> None:
    before = {name: value.detach().clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    results = []
    for loss in (fast, plain):
        inputs["student_logits"].grad = None
        value = loss(**inputs)
        (3 * value).backward()
        results.append((value.detach(), inputs["student_logits"].grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was changed"


@pytest.fixture(params=[CHUNKED, BLOCKWISE[TORCH_KERNELS]], ids=["chunked", "blockwise"])
def strategy(request: pytest.FixtureRequest) -> LossStrategy:
    return request.param


per_example = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@per_example
@given(size=sizes)
def test_region_loss_equals_the_plain_formula(strategy: LossStrategy, size: dict) -> None:
    assert_same(partial(region_loss, strategy=strategy), plain_region_loss, region_inputs(size, torch.float64))


@per_example
@given(size=sizes)
def test_view_loss_equals_the_plain_formula(strategy: LossStrategy, size: dict) -> None:
    assert_same(partial(view_loss, strategy=strategy), plain_view_loss, view_inputs(size, torch.float64))


@settings(max_examples=20, deadline=None)
@given(sizes)
def test_mixed_view_loss_equals_the_plain_formula(size):
    inputs = view_inputs(size, torch.float64)
    generator = torch.Generator().manual_seed(size["seed"] + 1)
    B = size["B"]
    mix = torch.rand(inputs["n_crops"], B, B, generator=generator, dtype=torch.float64)
    inputs["mix"] = list(mix / mix.sum(-1, keepdim=True))
    assert_same(view_loss, plain_view_loss, inputs)


def test_images_mixed_with_nothing_have_the_plain_loss():
    inputs = view_inputs({"B": 3, "K": 7, "local": [1, 1], "seed": 5}, torch.float64)
    unmixed = view_loss(**inputs, mix=[torch.eye(3)] * 4)
    torch.testing.assert_close(unmixed, view_loss(**inputs))


@pytest.mark.parametrize("chunk", [1, 20, 1 << 19])
def test_chunking_does_not_show(monkeypatch, chunk):
    monkeypatch.setitem(chunked_softmax.CHUNK_VALUES, "cpu", chunk)
    size = {"B": 2, "K": 10, "teacher": 4, "local": [3, 1], "seed": 0}
    assert_same(region_loss, plain_region_loss, region_inputs(size, torch.float64))


def test_gradients_by_finite_differences(strategy: LossStrategy) -> None:
    inputs = region_inputs({"B": 2, "K": 5, "teacher": 2, "local": [1, 2], "seed": 1}, torch.float64)
    logits = inputs.pop("student_logits")
    assert torch.autograd.gradcheck(lambda x: region_loss(x, **inputs, strategy=strategy), logits)
    inputs = view_inputs({"B": 2, "K": 5, "local": [1], "seed": 1}, torch.float64)
    logits = inputs.pop("student_logits")
    assert torch.autograd.gradcheck(lambda x: view_loss(x, **inputs, strategy=strategy), logits)


def test_bfloat16_logits_are_computed_in_float32(strategy: LossStrategy) -> None:
    inputs = region_inputs({"B": 2, "K": 32, "teacher": 4, "local": [2, 2], "seed": 2}, torch.float32)
    for name in ("student_logits", "teacher_logits"):
        inputs[name] = inputs[name].detach().bfloat16()
    inputs["student_logits"].requires_grad_()
    loss = region_loss(**inputs, strategy=strategy)
    loss.backward()
    assert loss.dtype == torch.float32
    assert inputs["student_logits"].grad.dtype == torch.bfloat16
    wide = inputs | {name: inputs[name].detach().float() for name in ("student_logits", "teacher_logits")}
    torch.testing.assert_close(loss.detach(), plain_region_loss(**wide), rtol=1e-5, atol=0)


def test_a_region_matches_the_most_similar_one():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 9, 16, generator=generator)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    student = 5 * teacher.gather(1, order[..., None].expand(-1, -1, 16))  # length does not count
    (to_second,), (to_first,) = (
        match.view(2, 9, 1).unbind(-1)
        for match in match_crops(student.flatten(0, 1).repeat(2, 1), teacher.flatten(0, 1).repeat(2, 1), [9, 9], 9)
    )
    first_row = 9 * torch.arange(2)[:, None]
    assert torch.equal(to_first, order + first_row) and torch.equal(to_second, order + first_row + 18)


def test_equal_uniform_outputs_cost_the_entropy_of_the_prototypes():
    size = {"B": 2, "K": 16, "teacher": 3, "local": [2], "seed": 0}
    inputs = region_inputs(size, torch.float64)
    flat = inputs | {name: torch.zeros_like(inputs[name]) for name in ("student_logits", "teacher_logits", "center")}
    assert region_loss(**flat).item() == pytest.approx(math.log(16))


def outputs(region: bool) -> tuple[NetworkOutput, NetworkOutput]:
    generator = torch.Generator().manual_seed(0)
    K, B, counts = 12, 2, [4, 4, 1]

    def draw(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator)

    student = NetworkOutput(
        draw(3 * B, K).requires_grad_(),
        draw(B * sum(counts), K).requires_grad_() if region else None,
        draw(B * sum(counts), 6) if region else None,
        counts,
    )
    rows = 8 * B
    teacher = NetworkOutput(
        draw(2 * B, K), draw(rows, K) if region else None, draw(rows, 6) if region else None, counts[:2]
    )
    return student, teacher


def test_objective_is_half_of_each_task_and_then_moves_the_centers():
    objective = Objective(ObjectiveConfig(region=True, center_momentum=0.9), 12)
    student, teacher = outputs(region=True)
    terms = objective(student, teacher, TEACHER_TEMP)
    zero = torch.zeros(1, 12)
    view = plain_view_loss(student.view_logits, teacher.view_logits, zero, STUDENT_TEMP, TEACHER_TEMP, 3)
    region = plain_region_loss(
        *(student.region_logits, teacher.region_logits, student.region_features, teacher.region_features),
        *(zero, STUDENT_TEMP, TEACHER_TEMP, [4, 4, 1], 4),
    )
    torch.testing.assert_close(terms.view, view.detach())
    torch.testing.assert_close(terms.region, region.detach())
    torch.testing.assert_close(terms.total, (view + region) / 2)
    torch.testing.assert_close(objective.center_view.value, 0.1 * teacher.view_logits.mean(0, keepdim=True))
    torch.testing.assert_close(objective.center_region.value, 0.1 * teacher.region_logits.mean(0, keepdim=True))


def test_view_only_objective_has_no_region_state():
    objective = Objective(ObjectiveConfig(region=False), 12)
    terms = objective(*outputs(region=False), TEACHER_TEMP)
    assert terms.region is None
    assert terms.total.item() == terms.view.item()
    assert list(objective.state_dict()) == ["center_view.value"]


def test_mixing_is_refused_with_the_region_task():
    objective = Objective(ObjectiveConfig(region=True), 12)
    with pytest.raises(ValueError, match="view task only"):
        objective(*outputs(region=True), TEACHER_TEMP, mix=[torch.eye(2)] * 3)
