"""Lazy logits with the Triton kernels, in Triton's interpreter on a CPU, give the loss and gradients of stored logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esvit_core.losses.cross_entropy import Pairs, Teacher, chunked_cross_entropy
from esvit_core.models.lazy_logits import LazyLogits

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled here, not interpreted", allow_module_level=True)

from esvit_core.losses import lazy_triton
from esvit_core.losses.lazy_triton import lazy_triton_cross_entropy

WIDTH, K = 4, 19


def pairs_of(images: int, regions: list[int], teacher_regions: int, generator: torch.Generator) -> Pairs:
    """Random matches within each image: one for each row of a global crop, two for those of a local one."""
    matches = []
    for crop, count in enumerate(regions):
        image = torch.arange(images).repeat_interleave(count)
        columns = [
            torch.randint(teacher_regions, image.shape, generator=generator) + (q * images + image) * teacher_regions
            for q in (0, 1)
            if q != crop
        ]
        matches.append(torch.stack(columns, 1))
    rows = [images * count for count in regions]
    return Pairs(matches, torch.rand(sum(rows), generator=generator), rows, images)


def lazy(rows: int, generator: torch.Generator, dtype: torch.dtype) -> LazyLogits:
    return LazyLogits(
        torch.randn(rows, WIDTH, generator=generator).to(dtype), torch.randn(K, WIDTH, generator=generator)
    )


def loss_and_gradients(function, logits: LazyLogits, stored: bool, *arguments) -> list[Tensor]:
    embeddings, weight = (t.clone().requires_grad_() for t in (logits.embeddings, logits.weight))
    given = embeddings @ weight.to(embeddings.dtype).T if stored else LazyLogits(embeddings, weight)
    loss = function(given, *arguments)
    (3 * loss).backward()
    assert weight.grad is not None and weight.grad.dtype == weight.dtype
    return [loss.detach(), embeddings.grad.float(), weight.grad]


@settings(max_examples=12, deadline=None)
@given(
    images=st.integers(1, 4),
    regions=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    chunk_rows=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_lazy_logits_give_what_stored_ones_give(images, regions, chunk_rows, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs_of(images, regions, 2, generator)
    student = lazy(sum(pairs.rows_per_crop), generator, dtype)
    theirs = lazy(2 * images * 2, generator, dtype)
    center = torch.randn(1, K, generator=generator)
    expected = loss_and_gradients(
        chunked_cross_entropy, student, True, Teacher(theirs.materialize(), center, 0.4), pairs, 0.5
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_triton, "CHUNK_ROWS", chunk_rows)
        found = loss_and_gradients(lazy_triton_cross_entropy, student, False, Teacher(theirs, center, 0.4), pairs, 0.5)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2  # of the norm: a sum may nearly cancel
    for mine, wanted in zip(found, expected, strict=True):
        assert (mine - wanted).norm() <= tolerance * wanted.norm() + 1e-4


def test_no_more_logits_are_stored_than_those_of_a_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, sizes = torch.Generator().manual_seed(0), []
    kernels = pytest.importorskip("esvit_core.kernels.cross_entropy_triton")
    compute = kernels.cross_entropies
    monkeypatch.setattr(
        kernels, "cross_entropies", lambda logits, *rest: sizes.append(len(logits)) or compute(logits, *rest)
    )
    monkeypatch.setattr(lazy_triton, "CHUNK_ROWS", 12)
    pairs = pairs_of(5, [3, 3], 3, generator)
    student, theirs = lazy(30, generator, torch.float32), lazy(30, generator, torch.float32)
    lazy_triton_cross_entropy(student, Teacher(theirs, torch.zeros(1, K), 0.1), pairs, 0.1)
    assert sizes == [12, 12, 6]
