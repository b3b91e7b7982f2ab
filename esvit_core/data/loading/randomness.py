"""Seed libraries that draw random numbers from global states."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(key: Sequence[int]) -> Iterator[None]:
    """Seed the global random states of Python, numpy and torch (CPU) from ``key`` within the context.

    The previous states are restored afterwards, so other code's random numbers do not change.
    """
    words = np.random.SeedSequence(key).generate_state(6)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(words[:2].tobytes())
        np.random.seed(words[2:4])
        torch.default_generator.manual_seed(int(words[4:].view(np.uint64)[0] >> np.uint64(1)))
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
