"""Lazy logits: the same loss and gradients as with stored logits, in little memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from esvit_core.config import Config, ObjectiveConfig
from esvit_core.kernels.fused_softmax import TORCH_KERNELS, select_softmax_kernels
from esvit_core.losses import Objective, blockwise, region_loss, view_loss
from esvit_core.losses.reference import plain_region_loss, plain_view_loss
from esvit_core.losses.strategy import BLOCKWISE, CHUNKED, LossStrategy
from esvit_core.models.lazy_logits import LazyLogits
from esvit_core.models.multicrop import MultiCropNetwork, build_student_teacher
from esvit_core.training.diagnostics import BatchStatistics

LAZY = BLOCKWISE[select_softmax_kernels()]
D, TEMPS = 6, {"student_temp": 0.1, "teacher_temp": 0.05}


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    K=st.integers(2, 20),
    regions=st.lists(st.integers(1, 5), max_size=3),  # of each local crop: sizes may differ
    T=st.integers(1, 5),
    rows_per_block=st.sampled_from([1, 12, 256]),
    seed=st.integers(0, 2**31),
)
def test_losses_of_lazy_logits_equal_the_plain_formula(B, K, regions, T, rows_per_block, seed) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = [T, T, *regions]
    center, of_teacher, features = 0.1 * draw(1, K), draw(K, D), {"teacher_features": draw(2 * B * T, 4)}
    features["student_features"] = draw(B * sum(counts), 4)
    tasks = (
        (view_loss, plain_view_loss, B * len(counts), 2 * B, {"n_crops": len(counts)}),
        (
            *(region_loss, plain_region_loss, B * sum(counts), 2 * B * T),
            {**features, "student_regions": counts, "teacher_regions": T},
        ),
    )
    for ours, plain, rows, teacher_rows, others in tasks:
        teacher, student = LazyLogits(0.3 * draw(teacher_rows, D), of_teacher), (0.3 * draw(rows, D), draw(K, D))
        results = []
        for loss in (ours, plain):
            leaves = [tensor.clone().requires_grad_() for tensor in student]
            logits = LazyLogits(*leaves)
            given = (logits, teacher) if loss is ours else (logits.materialize(), teacher.materialize())
            strategy = {"strategy": BLOCKWISE[TORCH_KERNELS]} if loss is ours else {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(blockwise, "LAZY_BLOCK_ROWS", rows_per_block)
                value = loss(*given, center=center, **TEMPS, **others, **strategy)
            (3 * value).backward()
            results.append((value.detach(), *(leaf.grad for leaf in leaves)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


MICRO = Config.from_mapping(
    {
        "augment": {
            "global_crops": {"size": 32, "number": 2, "scale": (0.4, 1)},
            "local_crops": {"size": 16, "number": 2, "scale": (0.05, 0.4)},
        },
        "model": {
            **{"arch": "swin", "patch_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
            **{"window_size": 4, "drop_path": 0.0},
        },
        "head": {"out_dim": 600, "hidden_dim": 16, "bottleneck_dim": 8},
    }
)
B = 4


@pytest.fixture
def networks() -> list[MultiCropNetwork]:
    return list(build_student_teacher(MICRO))


def crops() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, 3, size, size, generator=generator) for size in (32, 32, 16, 16)]


def step(
    networks: list[MultiCropNetwork], strategy: LossStrategy, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Loss, center, diagnostics and gradients of a step."""
    student, teacher = networks
    student.zero_grad()
    objective = Objective(ObjectiveConfig(), 600, strategy=strategy)
    for network in networks:
        network.set_lazy_logits(strategy.lazy_logits)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            theirs = teacher(crops()[:2])
        ours = student(crops())
    total = objective(ours, theirs, 0.04).total
    total.backward()
    assert isinstance(ours.region_logits, LazyLogits) == strategy.lazy_logits
    statistics = BatchStatistics(ours, theirs, objective, 0.04)
    figures = {name: torch.tensor(float(x)) for name, x in statistics.diagnostics().figures().items()}
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {"loss": total.detach(), "center": objective.center_region.value} | figures | gradients


def test_a_network_learns_the_same_with_stored_and_lazy_logits(networks: list[MultiCropNetwork]) -> None:
    stored, made = step(networks, CHUNKED), step(networks, LAZY)
    assert stored.keys() == made.keys()
    for name, value in stored.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_in_bfloat16_they_agree_within_its_rounding(networks: list[MultiCropNetwork]) -> None:
    precise, made = step(networks, CHUNKED), step(networks, LAZY, torch.bfloat16)
    assert made["loss"].dtype == torch.float32
    assert made["loss"].item() == pytest.approx(precise["loss"].item(), rel=5e-3)
    name = "head_dense.last_layer.weight_v"
    cosine = torch.cosine_similarity(made[name].flatten(), precise[name].flatten(), dim=0)
    assert cosine > 0.99


class Largest(TorchDispatchMode):
    """Record the size of the largest K-wide tensor that is created."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and 600 in out.shape:
            self.values = max(self.values, out.numel())
        return out


def test_no_tensor_holds_the_logits_of_all_images(
    networks: list[MultiCropNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "LAZY_BLOCK_ROWS", 1)
    student, teacher = networks
    for network in networks:
        network.set_lazy_logits()
    with torch.no_grad():
        theirs = teacher(crops()[:2])
    ours = student(crops())
    of_one_image = 600 * sum(ours.regions_per_crop)
    with Largest() as largest:
        Objective(ObjectiveConfig(), 600, strategy=LAZY)(ours, theirs, 0.04).total.backward()
    assert 0 < largest.values <= of_one_image < ours.region_logits.shape[0] * 600
