"""The Triton kernels of the objective, run by Triton's interpreter on a CPU, agree with the torch implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.kernels import triton_support
from esvit_core.kernels.chunked_softmax import teacher_distribution
from esvit_core.losses import cross_entropy

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled here, not interpreted", allow_module_level=True)

from esvit_core.kernels import cross_entropy_triton as kernels


@settings(max_examples=12, deadline=None)
@given(
    K=st.sampled_from([2, 7, 16, 33]),
    groups=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_kernels_agree_with_torch(K, groups, dtype, seed) -> None:
    """``groups``: rows and matches of each, which differ from group to group as those of crops do."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(count for count, _ in groups)
    student = torch.randn(rows, K, generator=generator).to(dtype)
    teacher = torch.randn(4, K, generator=generator).to(dtype)
    center = torch.randn(1, K, generator=generator)
    weights = torch.rand(rows, generator=generator)
    matches = [torch.randint(4, group, generator=generator) for group in groups]
    distributions = teacher_distribution(teacher, center, 0.04)

    def triton_loss(logits: torch.Tensor) -> torch.Tensor:
        own = center.clone()
        loss = kernels.MatchedCrossEntropyTriton.apply(logits, teacher, own, (0.1, 0.04), weights, *matches)
        own.zero_()  # the center is updated before the backward pass
        return loss

    def torch_loss(logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy.MatchedCrossEntropy.apply(logits, distributions, weights, 0.1, *matches)

    results = []
    for function in (triton_loss, torch_loss):
        logits = student.clone().requires_grad_()
        loss = function(logits)
        (3 * loss).backward()
        results.append((loss.detach(), logits.grad.float()))
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=1e-5, atol=1e-5)
    # A gradient is 3 weight / 0.1 times the difference of two probabilities, each of which float32 gives to about 1e-5
    # where logits are divided by 0.04; bfloat16 rounds the gradient itself.
    rtol, atol = (1e-4, 30 * 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(*(gradient for _, gradient in results), rtol=rtol, atol=atol)


def test_many_columns_are_processed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 16)
    student = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher, center, weights = torch.ones(1, 50), torch.zeros(1, 50), torch.ones(3)
    match = torch.zeros(3, 1, dtype=torch.long)
    loss = kernels.MatchedCrossEntropyTriton.apply(student, teacher, center, (1.0, 0.1), weights, match)
    loss.backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - 1 / 50)


def test_a_large_logit_does_not_overflow() -> None:
    student = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    teacher, center, match = torch.tensor([[-1000.0, 1000.0]]), torch.zeros(1, 2), torch.zeros(1, 1).long()
    loss = kernels.MatchedCrossEntropyTriton.apply(student, teacher, center, (1.0, 1.0), torch.ones(1), match)
    assert loss.item() == 1000.0


def test_without_a_c_compiler_triton_is_not_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the container images: Triton would fail at its first kernel."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    cpu = torch.device("cpu")  # the kernels run in the interpreter
    assert triton_support.triton_problem.__wrapped__(cpu) == "Triton needs a C compiler and found none"
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton_support.triton_problem.__wrapped__(cpu) == ""
