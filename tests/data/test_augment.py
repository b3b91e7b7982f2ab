"""Multi-crop augmentation: geometry and probabilities of the paper, as a function of seed, epoch and sample."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from esvit_core.config import AugmentConfig, Config, CropConfig, DeitConfig
from esvit_core.data.loading import augment, photometric
from esvit_core.data.loading.augment import EvalTransform, MultiCrop, Normalize, crop_box, resize, sample_rng
from esvit_core.data.loading.randomness import seeded
from esvit_core.kernels import image_ops

SMALL = AugmentConfig(
    global_crops=CropConfig(size=32, number=2, scale=(0.4, 1.0)),
    local_crops=CropConfig(size=16, number=3, scale=(0.05, 0.4)),
)
PLAIN = SMALL.model_copy(update={"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0})


def test_global_crops_come_first(make):
    crops = MultiCrop(SMALL)(make.pixels(), sample_rng(0, 0, 0))
    assert [tuple(c.shape) for c in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert all(c.dtype == torch.float32 for c in crops)


def test_a_sample_is_a_function_of_seed_epoch_and_number(make):
    multicrop, image = MultiCrop(SMALL), make.pixels()

    def crops(*key: int) -> torch.Tensor:
        return torch.cat([c.flatten() for c in multicrop(image, sample_rng(*key))])

    assert torch.equal(crops(1, 2, 3), crops(1, 2, 3))
    seen = {tuple(crops(*key).tolist()) for key in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (3, 2, 1)]}
    assert len(seen) == 5


def test_writing_into_a_batch_is_the_same(make):
    multicrop, image = MultiCrop(SMALL), make.pixels()
    batch = [torch.full((4, 3, size, size), -9.0) for size in multicrop.sizes]
    multicrop.write(image, sample_rng(0, 0, 5), [crop[2] for crop in batch])
    for crop, rows in zip(multicrop(image, sample_rng(0, 0, 5)), batch, strict=True):
        assert torch.equal(rows[2], crop) and bool((rows[[0, 1, 3]] == -9).all())


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 1), st.floats(0.05, 1), st.integers(0, 2**32))
def test_boxes_lie_inside_the_image(width, height, a, b, seed):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = crop_box(width, height, (min(a, b), max(a, b)), rng.random)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_areas_and_ratios_are_distributed_as_in_torchvision():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    boxes = np.array([crop_box(500, 375, (0.05, 0.4), rng.random) for _ in range(4000)])
    image = torch.zeros(3, 375, 500)
    reference = np.array(
        [transforms.RandomResizedCrop.get_params(image, [0.05, 0.4], [3 / 4, 4 / 3]) for _ in range(4000)]
    )  # top, left, height, width
    ours = {"w": boxes[:, 2] - boxes[:, 0], "h": boxes[:, 3] - boxes[:, 1], "x": boxes[:, 0], "y": boxes[:, 1]}
    theirs = {"w": reference[:, 3], "h": reference[:, 2], "x": reference[:, 1], "y": reference[:, 0]}
    for name in ours:
        deciles = [np.percentile(values[name], range(10, 100, 10)) for values in (ours, theirs)]
        assert np.abs(deciles[0] - deciles[1]).max() < 12, name  # pixels; a few standard errors


@pytest.mark.parametrize(("width", "height", "box"), [(300, 10, (143, 0, 156, 10)), (9, 400, (0, 194, 9, 206))])
def test_a_crop_that_never_fits_becomes_the_largest_centered_box(width, height, box):
    assert crop_box(width, height, (0.9, 1.0), np.random.default_rng(0).random) == box


def test_resizing_matches_pil_bicubic_within_two_levels(make):
    image = make.pixels(3, 203, 151)
    ours = resize(torch.from_numpy(image).permute(2, 0, 1)[None], 48, 64)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_the_returned_box_and_flip_match_the_crop(make):
    image, multicrop = make.pixels(1, 120, 90), MultiCrop(SMALL)
    flips = []
    for seed in range(20):
        crop, (x0, y0, x1, y1), flipped = multicrop.geometric_crop(image, np.random.default_rng(seed))
        box = tuple(round(v * side) for v, side in zip((x0, y0, x1, y1), (120, 90, 120, 90), strict=True))
        cut = Image.fromarray(image).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        expected = np.asarray(cut)[:, ::-1] if flipped else np.asarray(cut)
        shown = (crop * torch.tensor(SMALL.std)[:, None, None] + torch.tensor(SMALL.mean)[:, None, None]) * 255
        assert np.abs(shown.permute(1, 2, 0).numpy() - expected).max() < 2.1
        assert 0.3 < (x1 - x0) * (y1 - y0) <= 1.0
        flips.append(flipped)
    assert 3 < sum(flips) < 17


def test_the_first_crop_of_a_plain_recipe_is_the_geometric_one(make):
    image = make.pixels(2)
    crops = MultiCrop(PLAIN)(image, np.random.default_rng(4))
    assert torch.equal(crops[0], MultiCrop(PLAIN).geometric_crop(image, np.random.default_rng(4))[0])


def test_probabilities_and_factors_match_the_recipe():
    """Counts over 500 samples of 2 global and 3 local crops, within four standard deviations."""
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    counts = {name: np.zeros(5) for name in (*names, "grey", "blur", "solarize")}
    factors: dict[str, list[float]] = {name: [] for name in counts}
    orders = set()
    for index in range(500):
        for number, drawn in enumerate(MultiCrop(SMALL).draw(64, 48, sample_rng(0, 0, index))):
            jitter = [(names[which], factor) for which, factor in drawn.jitter]
            blur = [] if drawn.blur_sigma is None else [("blur", drawn.blur_sigma)]
            for name, factor in (*jitter, *blur):
                factors[name].append(factor)
                counts[name][number] += 1
            counts["grey"][number] += drawn.grayscale
            counts["solarize"][number] += drawn.solarize
            if jitter:
                orders.add(tuple(name for name, _ in jitter))
    _check_counts(counts, factors, orders)


def _check_counts(counts, factors, orders):
    def near(count: float, probability: float) -> bool:
        return abs(count - 500 * probability) <= 4 * (500 * probability * (1 - probability)) ** 0.5

    assert all(near(c, 0.8) for c in counts["adjust_brightness"]) and all(near(c, 0.2) for c in counts["grey"])
    assert all(near(c, p) for c, p in zip(counts["blur"], (1.0, 0.1, 0.5, 0.5, 0.5), strict=True))
    assert all(near(c, p) for c, p in zip(counts["solarize"], (0, 0.2, 0, 0, 0), strict=True))
    assert len(orders) == 24
    ranges = {
        "adjust_brightness": (0.6, 1.4),
        "adjust_contrast": (0.6, 1.4),
        "adjust_saturation": (0.8, 1.2),
        "adjust_hue": (-0.1, 0.1),
    }
    for name, (low, high) in {**ranges, "blur": (0.1, 2.0)}.items():
        assert min(factors[name]) >= low and max(factors[name]) <= high
        assert np.mean(factors[name]) == pytest.approx((low + high) / 2, abs=(high - low) * 0.05)


def test_normalization_matches_torchvision(make):
    image = make.pixels()
    theirs = transforms.functional.normalize(transforms.functional.to_tensor(image), SMALL.mean, SMALL.std)
    ours = Normalize(SMALL.mean, SMALL.std)(torch.from_numpy(image).permute(2, 0, 1).float().contiguous())
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(50, 50), (80, 50), (50, 81), (33, 120)])
def test_the_evaluation_transform_matches_torchvision(make, width, height):
    image = make.pixels(5, width, height)
    reference = transforms.Compose(
        [
            transforms.Resize(36, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(SMALL.mean, SMALL.std),
        ]
    )(Image.fromarray(image))
    ours = EvalTransform(36, 32)(image)
    assert ours.shape == (3, 32, 32)
    assert (ours - reference).abs().max() < 2.1 / 255 / min(SMALL.std)


def test_a_crop_larger_than_the_image_is_black_around_it(make):
    ours = EvalTransform(16, 24)(make.pixels(5, 40, 40))
    black = Normalize(SMALL.mean, SMALL.std)(torch.zeros(3, 1, 1))
    assert torch.allclose(ours[:, :4], black.expand(3, 4, 24)) and torch.allclose(
        ours[:, :, 20:], black.expand(3, 24, 4)
    )


def test_a_read_only_image_is_not_modified(make):
    image = make.pixels()
    image.flags.writeable = False
    before = image.copy()
    MultiCrop(SMALL)(image, sample_rng(0, 0, 0))
    EvalTransform(18, 16)(image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (2000, 3)])
def test_images_of_odd_shapes_give_crops(make, width, height):
    crops = MultiCrop(SMALL)(make.pixels(0, width, height), sample_rng(0, 0, 0))
    assert all(bool(torch.isfinite(c).all()) for c in crops)


def test_several_types_of_local_crops_follow_each_other(make):
    kinds = [CropConfig(size=16, number=2, scale=(0.2, 0.4)), CropConfig(size=12, number=1, scale=(0.05, 0.2))]
    multicrop = MultiCrop(PLAIN.model_copy(update={"local_crops": tuple(kinds)}))
    assert multicrop.sizes == [PLAIN.global_crops.size] * 2 + [16, 16, 12]
    crops = multicrop(make.pixels(), np.random.default_rng(4))
    assert [tuple(crop.shape) for crop in crops] == [(3, size, size) for size in multicrop.sizes]


class TestDeit:
    """The policy ``deit``."""

    config = AugmentConfig.model_validate({"policy": "deit", "local_crops": {"number": 2}})

    def test_crops_are_the_published_transform(self, make):
        image = make.pixels()
        found = MultiCrop(self.config)(image, sample_rng(0, 0, 5))
        transforms = [
            create_transform(
                input_size=size,
                is_training=True,
                color_jitter=0.4,
                auto_augment="rand-m9-mstd0.5-inc1",
                interpolation="bicubic",
                re_prob=0.25,
                re_mode="pixel",
                re_count=1,
            )
            for size in (224, 224, 96, 96)
        ]
        with seeded(sample_rng(0, 0, 5).integers(1 << 32, size=4).tolist()):
            expected = [transform(Image.fromarray(image)) for transform in transforms]
        assert all(map(torch.equal, found, expected))

    def test_a_sample_depends_on_nothing_but_its_own_numbers(self, make):
        multicrop, image = MultiCrop(self.config), make.pixels()
        random.seed(3)
        state = random.getstate()
        first = multicrop(image, sample_rng(0, 1, 2))
        assert random.getstate() == state
        others = [multicrop(image, sample_rng(0, 1, index))[0] for index in (3, 4)]
        np.random.seed(8)
        torch.manual_seed(8)
        again = MultiCrop(self.config)(image, sample_rng(0, 1, 2))
        assert all(map(torch.equal, first, again))
        assert not any(torch.equal(first[0], other) for other in others)

    def test_posterizing_to_zero_bits_gives_black(self, make):
        strong = DeitConfig(rand_augment="rand-m10-n8-inc1", erase=0.0)
        always = SMALL.model_copy(update={"policy": "deit", "deit": strong})
        multicrop, image = MultiCrop(always), make.pixels()
        crops = torch.stack([multicrop(image, sample_rng(0, 0, index))[0] for index in range(20)])
        black = -torch.tensor(always.mean) / torch.tensor(always.std)
        assert torch.isclose(crops, black.view(3, 1, 1)).all(1).flatten(1).float().mean(1).max() == 1


@pytest.mark.parametrize(("width", "height"), [(1, 100_000), (100_000, 1), (1000, 10)])
def test_no_crop_of_a_very_long_image_is_long(width, height):
    """The crop is cut out before it is resized, so it bounds the memory."""
    for index in range(200):
        rng = sample_rng(0, 0, index)
        left, top, right, bottom = crop_box(width, height, (0.05, 1.0), rng.random)
        assert 0 < right - left <= 2 * (bottom - top) and bottom - top <= 2 * (right - left)


@pytest.mark.parametrize("shape", [(1, 20000, 3), (20000, 1, 3), (3, 901, 3)])
def test_the_ends_of_a_very_long_image_are_cut_off_before_it_is_resized(shape, monkeypatch):
    image = np.zeros(shape, np.uint8)
    image[shape[0] // 2, shape[1] // 2] = 255
    sizes = []
    monkeypatch.setattr(augment, "resize", lambda pixels, *size: sizes.append(size) or resize(pixels, *size))
    out = EvalTransform(32, 28)(image)
    assert out.shape == (3, 28, 28) and max(sizes[0]) <= 9 * 32
    assert out[0].max() > out[0].min()  # the center stays in the center


needs_kernels = pytest.mark.skipif(not image_ops.can_make_crops(), reason="no kernels for crops on this machine")


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 70), flip=st.booleans(), data=st.data()
)
def test_the_kernel_resizes_exactly_as_torch(width, height, size, flip, data):
    image = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    out = torch.full((3, size, size), -1.0)
    crop = image_ops.describe_crop(box, flip, (), False, None, False, out)
    image_ops.make_crops(image, [crop], torch.ones(3), torch.zeros(3))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None, :, box[1] : box[3], box[0] : box[2]]
    expected = resize(pixels, size, size)[0].float()
    assert torch.equal(out, expected.flip(-1) if flip else expected)


@needs_kernels
@pytest.mark.parametrize("recipe", ["demo", "imagenet_swin_tiny_w7"])
def test_the_kernels_and_numpy_make_the_same_crops(make, recipe):
    """All operations occur within so many crops. The luma may differ in its last bit."""
    ours, reference = MultiCrop(Config.load(recipe).augment), MultiCrop(Config.load(recipe).augment)
    reference._has_kernels = False
    for index in range(12):
        image = make.pixels(index, 150 + 7 * index, 200 - 9 * index)
        pairs = zip(ours(image, sample_rng(0, 0, index)), reference(image, sample_rng(0, 0, index)), strict=True)
        assert all(torch.allclose(crop, expected, rtol=0, atol=1e-4) for crop, expected in pairs)


@needs_kernels
@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0, 5.0, 30.0])
def test_the_kernel_blurs_as_numpy(make, sigma):
    """Boxes of one to many neighbors, also wider than the crop."""
    image = make.pixels(3, 40, 40)
    out = torch.empty(3, 40, 40)
    crop = image_ops.describe_crop((0, 0, 40, 40), False, (), False, photometric.blur_factors(sigma), False, out)
    image_ops.make_crops(image, [crop], torch.ones(3), torch.zeros(3))
    expected = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
    photometric.gaussian_blur(expected, sigma)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-3)
