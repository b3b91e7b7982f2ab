"""Colors that are changed on the device, for whole batches, agree with those of single crops on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.config import Config
from esvit_core.data.loading import augment, device_batches
from esvit_core.data.loading.augment import CropDraw, MultiCrop, sample_rng
from esvit_core.data.loading.device_batches import copy_ahead, crops_on
from esvit_core.data.loading.device_colors import DeviceColors, change_colors, pack_draws
from esvit_core.data.loading.loader import Batch, TrainLoader

CPU = torch.device("cpu")
SIDE = 20
SCALE, SHIFT = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
# Rounding, in levels. Blur sums 6 passes over at most 5 neighbors; hue divides by the chroma.
TOLERANCE = 0.02

factors = st.floats(0.5, 1.5).map(lambda x: float(np.float32(x)))
operations = st.tuples(factors, factors, factors, st.floats(-0.5, 0.5), st.permutations(range(4)))
draws = st.builds(
    CropDraw,
    box=st.just((0, 0, 1, 1)),
    flip=st.booleans(),
    jitter=st.one_of(st.just(()), operations.map(lambda drawn: tuple((which, drawn[which]) for which in drawn[4]))),
    grayscale=st.booleans(),
    blur_sigma=st.one_of(st.none(), st.floats(0.1, 2.0)),
    solarize=st.booleans(),
)


def levels(number: int, seed: int, side: int = SIDE) -> torch.Tensor:
    """Smooth images, and gray ones: the hue of gray is a division by almost nothing."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(6 * (x * rng.normal() + y * rng.normal() + rng.random())) for _ in range(3 * number)]
    made = (
        np.stack(waves).reshape(number, 3, side, side) * 127 + 128 + rng.normal(0, 4, (number, 3, side, side))
    ).clip(0, 255)
    made[::4] = made[::4, :1]
    return torch.from_numpy(made.astype(np.uint8))


def on_cpu(images: torch.Tensor, drawn: list[CropDraw]) -> torch.Tensor:
    found = images.float()
    for crop, each in zip(found, drawn, strict=True):
        augment._change_colors(crop.numpy(), each)
    return found


def near_half(images: torch.Tensor, drawn: list[CropDraw]) -> torch.Tensor:
    """Images whose mean gray value before the contrast is so near a half that rounding decides about the integer."""
    found = []
    for crop, each in zip(images.float(), drawn, strict=True):
        before = [op for op, _ in each.jitter]
        count = before.index(1) if 1 in before else 0
        augment._change_colors(crop.numpy(), CropDraw((0, 0, 1, 1), False, each.jitter[:count]))
        mean = float((crop * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).mean())
        found.append(abs(mean % 1 - 0.5) < 1e-2)
    return torch.tensor(found)


def largest_difference(one: torch.Tensor, other: torch.Tensor, drawn: list[CropDraw], images: torch.Tensor) -> float:
    """Largest difference in levels; at a solarization's threshold a rounding error inverts the value."""
    difference = (one - other).abs()
    solarized = torch.tensor([each.solarize for each in drawn])[:, None, None, None]
    at_threshold = solarized & ((one - 127.5).abs() < 1) & ((other - 127.5).abs() < 1)
    difference[near_half(images, drawn)] = 0
    return float(difference[~at_threshold.expand_as(difference)].max())


@settings(max_examples=30, deadline=None)
@given(drawn=st.lists(draws, min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_every_combination_of_draws_agrees_with_the_cpu(drawn: list[CropDraw], seed: int) -> None:
    images = levels(len(drawn), seed)
    found = change_colors(images, torch.from_numpy(pack_draws(drawn)), SCALE, SHIFT, 1)
    assert largest_difference(found, on_cpu(images, drawn), drawn, images) < TOLERANCE


@settings(max_examples=5, deadline=None)
@given(drawn=st.lists(draws, min_size=1, max_size=4), seed=st.integers(0, 2**31), side=st.sampled_from([5, 12]))
def test_the_fused_kernels_agree_with_torch(drawn: list[CropDraw], seed: int, side: int) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled here, not interpreted")
    from esvit_core.kernels import colors_triton

    images, packed = levels(len(drawn), seed, side), torch.from_numpy(pack_draws(drawn))
    scale, shift = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([-3.0, 0.0, 7.0])
    expected = change_colors(images, packed, scale.view(3, 1, 1), shift.view(3, 1, 1), 1)
    found = colors_triton.change_colors_triton(images, packed, scale, shift, 1)
    unscaled = [(each - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for each in (found, expected)]
    assert largest_difference(*unscaled, drawn, images) < TOLERANCE


def test_a_strong_blur_reaches_further() -> None:
    drawn = [CropDraw((0, 0, 1, 1), False, blur_sigma=sigma) for sigma in (0.3, 2.0, 6.0)]
    images, reach = levels(3, 0), int(pack_draws(drawn)[2, 9])
    assert reach > 2
    found = change_colors(images, torch.from_numpy(pack_draws(drawn)), SCALE, SHIFT, reach)
    assert largest_difference(found, on_cpu(images, drawn), drawn, images) < TOLERANCE


class Photos:
    """Images of different sizes."""

    shard_sizes = (12,)
    weights = None

    def __len__(self) -> int:
        return 12

    def image(self, index: int) -> np.ndarray:
        return levels(1, index, 40 + index)[0].permute(1, 2, 0).contiguous().numpy()


def config(*changes: str) -> Config:
    crops = "augment.local_crops=[{size: 16, number: 3, scale: [0.1, 0.4]}, {size: 12, number: 1, scale: [0.1, 0.4]}]"
    small = ["augment.global_crops.size=24", crops, "training.batch_size=4", "augment.rotate=0.5"]
    return Config.load("demo", [*small, *changes])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_levels_becomes_the_batch_of_the_cpu(workers: int) -> None:
    asked = config(f"training.workers={workers}")
    ours, theirs = (TrainLoader(Photos(), asked, 7) for _ in range(2))
    theirs.change_colors_on_gpu()
    assert theirs._batch_bytes * 4 == ours._batch_bytes
    colors = DeviceColors(asked.augment, fused=False)
    scale = colors._normalize.scale
    for plain, raw in zip(ours.epoch(1), theirs.epoch(1), strict=True):
        assert np.array_equal(plain.indices, raw.indices) and plain.draws is None
        assert [crop.dtype for crop in raw.crops] == [torch.uint8] * 6
        for crop, made in zip(plain.crops, crops_on(CPU, raw, colors), strict=True):
            assert made.shape == crop.shape and made.dtype == torch.float32
            levels_apart = ((made - crop) / scale).abs()
            # A value at the threshold of the solarization, or a mean at a half, may fall to the other side.
            assert levels_apart.quantile(0.9) < TOLERANCE
        parts = raw.split(3)
        together = [torch.cat(crops) for crops in zip(*(crops_on(CPU, part, colors) for part in parts), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(together, crops_on(CPU, raw, colors), strict=True))


def test_levels_are_the_crops_before_their_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = config("augment.jitter=0", "augment.grayscale=0", "augment.blur=[0,0,0]", "augment.solarize=0")
    image, results = Photos().image(3), []
    for has_kernels in (True, False):
        multicrop = MultiCrop(plain.augment)
        if has_kernels and not multicrop._has_kernels:
            continue
        multicrop._has_kernels = has_kernels
        crops = [torch.empty(3, size, size, dtype=torch.uint8) for size in multicrop.sizes]
        multicrop.write_levels(image, sample_rng(0, 0, 1), crops)
        expected = MultiCrop(plain.augment)(image, sample_rng(0, 0, 1))
        for crop, normalized in zip(crops, expected, strict=True):
            back = (normalized - multicrop._normalize.shift) / multicrop._normalize.scale
            assert torch.equal(back.round(), crop.float())
        results.append(crops)
    assert all(torch.equal(a, b) for made in results for a, b in zip(made, results[0], strict=True))


def test_the_policy_deit_is_not_done_on_the_device() -> None:
    loader = TrainLoader(Photos(), config("augment.policy=deit"), 0)
    loader.change_colors_on_gpu()
    assert next(loader.epoch(0)).draws is None


def test_the_next_batch_is_copied_before_the_step_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the order of what is asked of the device."""
    asked: list[str] = []
    tensor = SimpleNamespace(record_stream=lambda stream: asked.append("keep"))
    tensor.to = lambda device, non_blocking: (asked.append(f"copy, non_blocking={non_blocking}"), tensor)[1]

    class Stream:
        def __init__(self, device: object) -> None: ...

        def record_event(self) -> str:
            return "copied"

        def wait_event(self, event: str) -> None:
            asked.append(f"wait for {event}")

    import contextlib

    cuda = SimpleNamespace(Stream=Stream, current_stream=Stream, stream=lambda _: contextlib.nullcontext())
    monkeypatch.setattr(device_batches, "torch", SimpleNamespace(cuda=cuda))
    source = (asked.append(f"load {i}") or Batch([tensor], np.array([i]), 0.0) for i in range(3))
    for batch in copy_ahead(source, "cuda"):
        asked.append(f"step {batch.indices[0]}")
    copy, ready = "copy, non_blocking=True", ["wait for copied", "keep"]
    assert asked == [
        *("load 0", copy, "load 1", copy, *ready, "step 0"),
        *("load 2", copy, *ready, "step 1"),
        *(*ready, "step 2"),
    ]
    assert list(copy_ahead(iter(()), "cuda")) == []
