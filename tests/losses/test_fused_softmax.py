"""The two passes over rows of prototypes: the compiled form equals the formula, and torch's form where none is had."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.kernels import fused_softmax

compiled = pytest.mark.skipif(fused_softmax.library() is None, reason="no C compiler")
TEMPS = {"student": 0.1, "teacher": 0.04}


def problem(groups: list[tuple[int, int]], K: int, dtype: torch.dtype, size: float, seed: int) -> dict[str, object]:
    """Groups of (rows, matches of each), with a row before, between and after them that belongs to none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    places, start = [], 1
    for n, _ in groups:
        places.append(slice(start, start + n))
        start += n + 1
    return {
        "logits": (size * draw(start, K)).to(dtype),
        "places": places,
        "matches": [torch.randint(0, 5, shape, generator=generator) for shape in groups],
        "targets": torch.softmax(10 * draw(5, K), -1),
        "scale": draw(start),
    }


def expected(given: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies and gradients in float64, by the formula; NaN where no row is asked for."""
    z = given["logits"].double() / TEMPS["student"]
    values, gradients = torch.full((len(z),), torch.nan).double(), torch.full_like(z, torch.nan)
    for place, matches in zip(given["places"], given["matches"], strict=True):
        target = given["targets"].double()[matches].mean(1)
        values[place] = -(target * z[place].log_softmax(-1)).sum(-1)
        gradients[place] = given["scale"][place, None].double() * (z[place].softmax(-1) - target)
    return values, gradients


def compared(given: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = given["logits"]
    values, out = torch.full((len(logits),), torch.nan), torch.full_like(logits, torch.nan)
    arguments = (logits, given["places"], given["matches"], given["targets"], TEMPS["student"], given["scale"])
    fused_softmax.soft_cross_entropy(*arguments, values, out)
    alone, made = torch.full_like(values, torch.nan), logits.clone()
    fused_softmax.soft_cross_entropy(*arguments, alone, None)
    torch.testing.assert_close(alone, values, rtol=0, atol=0, equal_nan=True)
    fused_softmax.soft_cross_entropy(made, *arguments[1:], alone, made)  # in place
    for place in given["places"]:
        assert torch.equal(made[place], out[place])
    return values, out


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=4),
    K=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    size=st.sampled_from([0.3, 30.0]),  # the second leaves one prototype all the weight
    seed=st.integers(0, 2**31),
)
def test_cross_entropy_and_gradient_are_those_of_the_formula(groups, K, dtype, size, seed) -> None:
    given = problem(groups, K, dtype, size, seed)
    if dtype == torch.float64:
        given["targets"] = given["targets"].double()
    values, gradients = compared(given)
    right, right_gradients = expected(given)
    torch.testing.assert_close(values.double(), right, rtol=2e-6, atol=2e-5 * size, equal_nan=True)
    tolerance = {"rtol": 1e-2, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5 * size}
    torch.testing.assert_close(gradients.double(), right_gradients, **tolerance, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    K=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([0.3, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_distributions_are_those_of_the_formula(n, K, dtype, size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(40, K, generator=generator)).to(dtype)
    center, chosen = torch.randn(1, K, generator=generator), torch.randint(0, 40, (n,), generator=generator)
    out = torch.full((n, K), torch.nan)
    fused_softmax.teacher_softmax(logits, chosen, center, TEMPS["teacher"], out)
    right = ((logits[chosen].double() - center) / TEMPS["teacher"]).softmax(-1)
    torch.testing.assert_close(out.double(), right, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(out.sum(-1), torch.ones(n), rtol=1e-5, atol=0)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_form_is_taken_and_agrees_with_torch(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem([(30, 1), (50, 2)], 4099, dtype, 1.0, 0)
    calls = []
    monkeypatch.setattr(
        fused_softmax, "call", lambda name, jobs, call=fused_softmax.call: calls.append(name) or call(name, jobs)
    )
    with_compiler = compared(given)
    assert calls == ["soft_cross_entropy"] * 3
    monkeypatch.setattr(fused_softmax, "library", lambda: None)
    without = compared(given)
    assert len(calls) == 3
    torch.testing.assert_close(with_compiler[0], without[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    one_unit = {"rtol": 2**-7, "atol": 1e-7} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(with_compiler[1], without[1], **one_unit, equal_nan=True)


@compiled
def test_the_number_of_threads_changes_no_bit() -> None:
    given, threads, results = problem([(30, 1), (50, 2)], 4099, torch.float32, 1.0, 0), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(compared(given))
    finally:
        torch.set_num_threads(threads)
    for values, gradients in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradients, results[0][1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_logit_shows_in_the_loss(value: float, dtype: torch.dtype) -> None:
    given = problem([(3, 1)], 50, dtype, 1.0, 0)
    given["logits"][2, 7] = value
    values, gradients = compared_once(given)
    assert not values[2].isfinite() and not gradients[2].isfinite().all()
    assert values[[1, 3]].isfinite().all() and gradients[[1, 3]].isfinite().all()
    out = torch.empty(1, 50)
    fused_softmax.teacher_softmax(given["logits"], torch.tensor([2]), torch.zeros(1, 50), 0.04, out)
    assert not out.isfinite().all()


def compared_once(given: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, values = given["logits"], torch.zeros(len(given["logits"]))
    out = torch.zeros_like(logits)
    rest = (given["targets"], TEMPS["student"], given["scale"], values, out)
    fused_softmax.soft_cross_entropy(logits, given["places"], given["matches"], *rest)
    return values, out
