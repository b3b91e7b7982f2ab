"""Diagnostics of outputs with known values."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.config import ObjectiveConfig
from esvit_core.losses.objective import Objective
from esvit_core.models.multicrop import NetworkOutput
from esvit_core.training import diagnostics
from esvit_core.training.diagnostics import (
    SAMPLED_ROWS,
    BatchStatistics,
    Diagnostics,
    _stride,
    effective_rank,
)

K, B, T, D = 32, 16, 4, 8  # prototypes, images, regions of a global crop, width
TAU_S, TAU_T = 0.1, 0.05


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def outputs(region: bool = True) -> tuple[NetworkOutput, NetworkOutput]:
    """Of a student for two global and one local crop with one region, and of a teacher."""
    draw = generator()

    def network(views: int, regions: int, counts: list[int]) -> NetworkOutput:
        def random(rows: int, width: int) -> torch.Tensor:
            return torch.rand(rows, width, generator=draw)

        return NetworkOutput(
            random(views, K),
            random(regions, K) if region else None,
            random(regions, D) if region else None,
            counts,
            random(views, D),
        )

    return network(3 * B, B * (2 * T + 1), [T, T, 1]), network(2 * B, B * 2 * T, [T, T])


def objective(region: bool = True, center: float = 0.0) -> Objective:
    made = Objective(ObjectiveConfig(region=region, student_temp=TAU_S), K)
    for buffer in made.buffers():
        buffer.copy_(center * torch.rand(1, K, generator=generator()))
    return made


def diagnose(student: NetworkOutput, teacher: NetworkOutput, center: float = 0.0) -> Diagnostics:
    return BatchStatistics(student, teacher, objective(teacher.region_logits is not None, center), TAU_T).diagnostics()


def share(output: NetworkOutput, images: slice) -> NetworkOutput:
    """What a process has of it: some images of every crop."""

    def of(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        crops = rows.split([B * n for n in counts])
        return torch.cat([crop.unflatten(0, (B, -1))[images].flatten(0, 1) for crop in crops])

    counts, views = output.regions_per_crop, [1] * len(output.regions_per_crop)
    return NetworkOutput(
        of(output.view_logits, views),
        of(output.region_logits, counts),
        of(output.region_features, counts),
        counts,
        of(output.view_features, views),
    )


def test_a_teacher_that_gives_each_prototype_one_view():
    student, teacher = outputs(region=False)
    teacher = teacher._replace(view_logits=torch.eye(K), view_features=torch.eye(4).repeat(8, 1))
    found = diagnose(student, teacher)
    assert found.view.entropy == pytest.approx(math.log(K), abs=1e-4)
    assert found.view.kl == pytest.approx(math.log(K), abs=1e-2)
    assert found.view.prototypes == K
    assert found.feature_std == pytest.approx(math.sqrt(1 - 1 / 4))
    assert found.feature_rank == pytest.approx(4)


def test_diagnostics_follow_their_definitions():
    student, teacher = outputs()
    found = diagnose(student, teacher, center=0.5)
    center = objective(center=0.5).center_region.value
    targets = F.softmax((teacher.region_logits - center) / TAU_T, -1).unflatten(0, (2, B, T))
    predictions = F.log_softmax(student.region_logits[: 2 * B * T] / TAU_S, -1).unflatten(0, (2, B, T))
    queries = F.normalize(student.region_features[: 2 * B * T], dim=-1).unflatten(0, (2, B, T))
    keys = F.normalize(teacher.region_features, dim=-1).unflatten(0, (2, B, T))
    divergences, mutual = [], []
    for v in (0, 1):
        for b in range(B):
            similarity = queries[v, b] @ keys[1 - v, b].T  # (T, T)
            for i in range(T):
                j = similarity[i].argmax()
                target = targets[1 - v, b, j]
                divergences.append((target * (target.log() - predictions[v, b, i])).sum())
                mutual.append(similarity[:, j].argmax() == i)
    flat = targets.flatten(0, 2)
    assert found.region is not None
    assert found.region.student_kl == pytest.approx(torch.stack(divergences).mean().item(), rel=1e-5)
    assert found.mutual_matches == pytest.approx(torch.stack(mutual).float().mean().item())
    assert found.region.entropy == pytest.approx(torch.special.entr(flat.mean(0)).sum().item(), rel=1e-5)
    assert found.region.kl == pytest.approx((flat * (flat.log() - flat.mean(0).log())).sum(-1).mean().item(), rel=1e-4)
    assert found.region.prototypes == len(flat.argmax(-1).unique()) < K
    assert found.region.center_norm == pytest.approx(center.norm().item())


@pytest.mark.parametrize("sampled_rows", [SAMPLED_ROWS, 40, 4])
def test_blocks_of_images_give_the_diagnostics_of_the_whole_batch(
    sampled_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "SAMPLED_ROWS", sampled_rows)
    student, teacher = outputs()
    together = diagnose(student, teacher, center=0.5).figures()
    monkeypatch.setattr(diagnostics, "_BLOCK_VALUES", 3 * 2 * T * K)  # of 16 images
    assert diagnose(student, teacher, center=0.5).figures() == pytest.approx(together, rel=1e-5)


def test_a_student_that_matches_the_teacher_has_no_divergence():
    student, teacher = outputs()
    own = teacher.view_logits.roll(B, 0) * TAU_S / TAU_T
    agreeing = student._replace(view_logits=torch.cat((own, student.view_logits[2 * B :])))
    assert diagnose(agreeing, teacher).view.student_kl == pytest.approx(0, abs=1e-5)
    assert diagnose(student, teacher).view.student_kl > 0.1


def test_unequal_shares_give_the_diagnostics_of_the_whole_batch():
    student, teacher = outputs()
    joined, other = (
        BatchStatistics(share(student, part), share(teacher, part), objective(), TAU_T, processes=2)
        for part in (slice(0, 5), slice(5, B))
    )
    joined.sums = (joined.sums + other.sums) / 2
    joined.features = torch.cat((joined.features, other.features))
    assert joined.diagnostics().figures() == pytest.approx(diagnose(student, teacher).figures(), rel=1e-5)


def test_mixed_images_have_no_divergence_of_the_student():
    figures = BatchStatistics(*outputs(), objective(), TAU_T, mixed=True).diagnostics().figures()
    assert "kl_view" in figures and not any(name.startswith("student_kl") for name in figures)


def test_a_view_only_run_has_no_figures_of_regions():
    figures = diagnose(*outputs(region=False)).figures()
    assert set(figures) == {f"{name}_view" for name in ("entropy", "kl", "student_kl", "prototypes", "center_norm")} | {
        "feature_std",
        "feature_rank",
    }


def test_diagnostics_change_nothing():
    student, teacher = outputs()
    made = objective(center=0.5)
    tensors = [t for t in (*student, *teacher, *made.buffers()) if isinstance(t, torch.Tensor)]
    before, drawn = [t.clone() for t in tensors], torch.get_rng_state()
    BatchStatistics(student, teacher, made, TAU_T).diagnostics()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_effective_rank_of_equal_directions_is_their_number(rank: int, more_rows: int, more_width: int):
    features = torch.zeros(rank + more_rows, rank + more_width)
    features[:rank, :rank] = 3 * torch.eye(rank)
    assert effective_rank(features) == pytest.approx(rank, rel=1e-6)


def test_effective_rank_is_that_of_the_singular_values():
    features = torch.randn(30, 12, generator=generator())
    p = torch.linalg.svdvals(features.double())
    p /= p.sum()
    assert effective_rank(features) == pytest.approx(torch.exp(-(p * p.log()).sum()).item())
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(5, 3)) == 0
    assert math.isnan(effective_rank(torch.tensor([[math.nan, 1.0]])))


@given(st.integers(1, 60), st.sampled_from([1, 4, 9, 16, 36, 49, 196]))
def test_the_sample_covers_every_position_of_the_map_equally(images: int, regions: int):
    count = 2 * images * regions
    rows = torch.arange(0, count, _stride(count, regions))
    assert 1 <= len(rows) <= SAMPLED_ROWS and rows[-1] < count
    met = torch.bincount(rows % regions, minlength=regions)
    assert met.max() - met.min() <= 1
