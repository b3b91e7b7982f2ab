"""Random numbers of libraries that draw them from global states."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(key: Sequence[int]) -> Iterator[None]:
    """Make what is drawn from Python's, numpy's and torch's (CPU) global states a function of ``key``.

    Afterwards the states are what they were before, so that nobody else's numbers change.
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
