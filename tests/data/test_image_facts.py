"""Facts about images that statistics and the search for duplicates need."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.data.ingest.image_facts import facts_of


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    bands=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_color_is_the_exact_mean_of_the_sampled_pixels(height, width, bands, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *bands), dtype=np.uint8)
    step = max(1, min(height, width) // 128)
    expected = pixels[::step, ::step].reshape(-1, *(bands or (1,))).mean(0).round().astype(int)
    red, green, blue = np.broadcast_to(expected, 3)
    assert facts_of(pixels, (width, height), "PNG").color == f"{red:02x}{green:02x}{blue:02x}"


@pytest.mark.parametrize("value", [0, 255])
def test_the_mean_of_a_long_image_does_not_overflow(value):
    assert facts_of(np.full((40_000, 8, 3), value, np.uint8), (8, 40_000), "PNG").color == f"{value:02x}" * 3
