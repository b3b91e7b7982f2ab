"""Every photometric operation against what torchvision and PIL make of the same image, in levels of 0 to 255.

PIL works on whole levels: blends lose their fraction (up to one level darker), a hue is one of 256, and each of the
blur's six passes rounds. The bounds below are those differences, on images that are hard in this respect.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from esvit_core.data.loading import photometric

Operation = Callable[[np.ndarray], None]
Reference = Callable[[Image.Image], Image.Image]


def images() -> list[np.ndarray]:
    """Return smooth colours, noise with all levels, saturated blocks, and gray, (H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((61, 47), Image.Resampling.BICUBIC)
    noise = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    blocks = np.kron(rng.integers(0, 2, (5, 6, 3), dtype=np.uint8) * 255, np.ones((9, 7, 1), np.uint8))
    grey = np.repeat(rng.integers(0, 256, (20, 20, 1), dtype=np.uint8), 3, axis=2)
    return [np.asarray(smooth), noise, blocks, grey]


def differences(operation: Operation, reference: Reference, image: np.ndarray) -> np.ndarray:
    x = image.transpose(2, 0, 1).astype(np.float32)
    operation(x)
    assert x.min() >= 0 and x.max() <= 255.001
    theirs = np.asarray(reference(Image.fromarray(image))).transpose(2, 0, 1).astype(np.float32)
    return np.abs(x - theirs)


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.97, 1.0, 1.2, 1.4])
@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (photometric.adjust_brightness, F.adjust_brightness),
        (photometric.adjust_contrast, F.adjust_contrast),
        (photometric.adjust_saturation, F.adjust_saturation),
    ],
)
def test_blends_are_within_a_level(operation, reference, factor):
    for image in images():
        found = differences(lambda x: operation(x, factor), lambda p: reference(p, factor), image)
        assert found.max() < 1.6 and found.mean() <= 1.0


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.043, 0.0, 0.02, 0.1, 0.5])
def test_hue_is_within_one_step_of_pil(shift):
    for image in images():
        found = differences(lambda x: photometric.adjust_hue(x, shift), lambda p: F.adjust_hue(p, shift), image)
        # One of 256 hue steps changes a fully saturated channel by 6 levels; two steps are tolerated.
        assert found.max() <= 15 and found.mean() < 2


@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), st.floats(-0.5, 0.5))
def test_hue_keeps_value_and_chroma_and_can_be_reversed(colour, shift):
    x = np.array(colour, np.float32).reshape(3, 1, 1)
    turned = x.copy()
    photometric.adjust_hue(turned, shift)
    assert turned.max() == pytest.approx(x.max(), abs=0.01) and turned.min() == pytest.approx(x.min(), abs=0.01)
    photometric.adjust_hue(turned, -shift)
    assert turned == pytest.approx(x, abs=0.05)


def test_a_third_of_a_turn_permutes_the_channels():
    x = np.array([[200, 30], [90, 70], [10, 250]], np.float32).reshape(3, 1, 2)
    turned = x.copy()
    photometric.adjust_hue(turned, 1 / 3)
    assert turned == pytest.approx(np.roll(x, 1, axis=0), abs=0.01)


def test_grayscale_is_within_rounding():
    for image in images():
        assert differences(photometric.grayscale, lambda p: F.rgb_to_grayscale(p, 3), image).max() <= 0.51


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.9, 1.3, 1.4143, 1.7, 2.0, 3.5])
def test_blur_is_within_rounding_also_at_the_borders(sigma):
    for image in images():
        found = differences(
            lambda x: photometric.gaussian_blur(x, sigma), lambda p: p.filter(ImageFilter.GaussianBlur(sigma)), image
        )
        assert found.max() < 3.1 and found.mean() < 1.2


@settings(max_examples=30)
@given(st.floats(0.1, 2.0), st.integers(1, 9), st.integers(1, 9))
def test_blur_keeps_a_uniform_image(sigma, height, width):
    x = np.full((3, height, width), 77, np.float32)
    photometric.gaussian_blur(x, sigma)
    assert x == pytest.approx(np.full_like(x, 77), abs=0.01)


def test_solarize_is_exact():
    for image in images():
        assert differences(photometric.solarize, ImageOps.solarize, image).max() == 0
