"""The fused softmax kernels compute their formulas, in C and in torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.kernels import library
from esvit_core.kernels.fused_softmax import C_KERNELS, TORCH_KERNELS, SoftmaxKernels, select_softmax_kernels

needs_c = pytest.mark.skipif(library() is None, reason="no C compiler")
KERNELS = [C_KERNELS, TORCH_KERNELS] if library() else [TORCH_KERNELS]
TEMPS = {"student": 0.1, "teacher": 0.04}


def problem(groups: list[tuple[int, int]], K: int, dtype: torch.dtype, size: float, seed: int) -> dict[str, object]:
    """Groups of (rows, matches of each), with a row before, between and after them that belongs to no group."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    slices, start = [], 1
    for n, _ in groups:
        slices.append(slice(start, start + n))
        start += n + 1
    return {
        "logits": (size * draw(start, K)).to(dtype),
        "slices": slices,
        "matches": [torch.randint(0, 5, shape, generator=generator) for shape in groups],
        "targets": torch.softmax(10 * draw(5, K), -1),
        "scale": draw(start),
    }


def expected(given: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies and gradients in float64 by the formula; NaN for rows of no group."""
    z = given["logits"].double() / TEMPS["student"]
    values, gradients = torch.full((len(z),), torch.nan).double(), torch.full_like(z, torch.nan)
    for place, matches in zip(given["slices"], given["matches"], strict=True):
        target = given["targets"].double()[matches].mean(1)
        values[place] = -(target * z[place].log_softmax(-1)).sum(-1)
        gradients[place] = given["scale"][place, None].double() * (z[place].softmax(-1) - target)
    return values, gradients


def compared(given: dict[str, object], kernels: SoftmaxKernels) -> tuple[torch.Tensor, torch.Tensor]:
    logits = given["logits"]
    values, out = torch.full((len(logits),), torch.nan), torch.full_like(logits, torch.nan)
    arguments = (logits, given["slices"], given["matches"], given["targets"], TEMPS["student"], given["scale"])
    kernels.soft_cross_entropy(*arguments, values, out)
    alone, made = torch.full_like(values, torch.nan), logits.clone()
    kernels.soft_cross_entropy(*arguments, alone, None)
    torch.testing.assert_close(alone, values, rtol=0, atol=0, equal_nan=True)
    kernels.soft_cross_entropy(made, *arguments[1:], alone, made)  # in place
    for place in given["slices"]:
        assert torch.equal(made[place], out[place])
    return values, out


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=4),
    K=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    kernels=st.sampled_from(KERNELS),
    size=st.sampled_from([0.3, 30.0]),  # the second leaves one prototype all the weight
    seed=st.integers(0, 2**31),
)
def test_cross_entropy_and_gradient_are_those_of_the_formula(groups, K, dtype, kernels, size, seed) -> None:
    given = problem(groups, K, dtype, size, seed)
    if dtype == torch.float64:
        kernels = TORCH_KERNELS
        given["targets"] = given["targets"].double()
    values, gradients = compared(given, kernels)
    right, right_gradients = expected(given)
    torch.testing.assert_close(values.double(), right, rtol=2e-6, atol=2e-5 * size, equal_nan=True)
    tolerance = {"rtol": 1e-2, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5 * size}
    torch.testing.assert_close(gradients.double(), right_gradients, **tolerance, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    K=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kernels=st.sampled_from(KERNELS),
    size=st.sampled_from([0.3, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_distributions_are_those_of_the_formula(n, K, dtype, kernels, size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(40, K, generator=generator)).to(dtype)
    center, chosen = torch.randn(1, K, generator=generator), torch.randint(0, 40, (n,), generator=generator)
    out = torch.full((n, K), torch.nan)
    kernels.teacher_softmax(logits, chosen, center, TEMPS["teacher"], out)
    right = ((logits[chosen].double() - center) / TEMPS["teacher"]).softmax(-1)
    torch.testing.assert_close(out.double(), right, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(out.sum(-1), torch.ones(n), rtol=1e-5, atol=0)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_c_kernels_are_selected_and_agree_with_torch(dtype) -> None:
    assert select_softmax_kernels() is C_KERNELS
    given = problem([(30, 1), (50, 2)], 4099, dtype, 1.0, 0)
    with_compiler, without = (compared(given, kernels) for kernels in (C_KERNELS, TORCH_KERNELS))
    torch.testing.assert_close(with_compiler[0], without[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    one_unit = {"rtol": 2**-7, "atol": 1e-7} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(with_compiler[1], without[1], **one_unit, equal_nan=True)


@needs_c
def test_the_number_of_threads_changes_no_bit() -> None:
    given, threads, results = problem([(30, 1), (50, 2)], 4099, torch.float32, 1.0, 0), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(compared(given, C_KERNELS))
    finally:
        torch.set_num_threads(threads)
    for values, gradients in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradients, results[0][1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_logit_shows_in_the_loss(value: float, dtype: torch.dtype, kernels: SoftmaxKernels) -> None:
    given = problem([(3, 1)], 50, dtype, 1.0, 0)
    given["logits"][2, 7] = value
    values, gradients = compared_once(given, kernels)
    assert not values[2].isfinite() and not gradients[2].isfinite().all()
    assert values[[1, 3]].isfinite().all() and gradients[[1, 3]].isfinite().all()
    out = torch.empty(1, 50)
    kernels.teacher_softmax(given["logits"], torch.tensor([2]), torch.zeros(1, 50), 0.04, out)
    assert not out.isfinite().all()


def compared_once(given: dict[str, object], kernels: SoftmaxKernels) -> tuple[torch.Tensor, torch.Tensor]:
    logits, values = given["logits"], torch.zeros(len(given["logits"]))
    out = torch.zeros_like(logits)
    rest = (given["targets"], TEMPS["student"], given["scale"], values, out)
    kernels.soft_cross_entropy(logits, given["slices"], given["matches"], *rest)
    return values, out


@needs_c
def test_the_c_kernels_refuse_other_tensors() -> None:
    given = problem([(3, 1)], 50, torch.float64, 1.0, 0)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        compared_once(given, C_KERNELS)
    with pytest.raises(ValueError, match="contiguous"):
        C_KERNELS.teacher_softmax(torch.ones(50, 8).T, torch.tensor([2]), torch.zeros(1, 50), 0.04, torch.empty(1, 50))


def test_without_a_compiler_the_torch_kernels_are_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esvit_core.kernels.fused_softmax.library", lambda: None)
    assert select_softmax_kernels() is TORCH_KERNELS
