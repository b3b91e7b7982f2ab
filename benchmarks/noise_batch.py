"""A batch of noise as the loader of a training on a GPU hands it over, in pinned memory."""

from __future__ import annotations

import numpy as np
import torch

from esvit_core.config import Config
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.data.loading.device_colors import pack_draws
from esvit_core.data.loading.loader import Batch

_WIDTH, _HEIGHT = 500, 375  # of the images that the crops would have been cut from


def noise_batch(config: Config, images: int) -> Batch:
    """Return a batch; levels and what changes their colors, or with the policy deit finished crops."""
    multicrop = MultiCrop(config.augment)
    if config.augment.policy != "dino":
        crops = [torch.randn(images, 3, size, size).pin_memory() for size in multicrop.sizes]
        return Batch(crops, np.arange(images), 0.0)
    levels = [torch.randint(256, (images, 3, s, s), dtype=torch.uint8).pin_memory() for s in multicrop.sizes]
    draws = [pack_draws(multicrop.draw(_WIDTH, _HEIGHT, sample_rng(0, 0, i))) for i in range(images)]
    return Batch(levels, np.arange(images), 0.0, torch.from_numpy(np.stack(draws)).pin_memory())
