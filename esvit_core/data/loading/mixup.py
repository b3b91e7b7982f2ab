"""Mixup and CutMix of a batch of crops, as the published code does it with timm's ``Mixup``.

Each crop of the batch is mixed by itself: image i with image B - 1 - i of those that a process works off together,
in a ratio drawn anew for each crop. The ratio is a function of seed and step, and the same in all processes (the
published processes, which are seeded alike, agree on it too).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor

from esvit_core.config import MixupConfig
from esvit_core.data.loading.randomness import seeded

_MIX_STREAM = 2  # keeps these random numbers apart from those of order and augmentation, which have the same seed


class Mixed(NamedTuple):
    """Crops for student and teacher, and of each crop the shares (B, B) that the loss takes as ``mix``."""

    student: list[Tensor]
    teacher: list[Tensor]
    shares: list[Tensor] | None


def mix_crops(crops: list[Tensor], config: MixupConfig, seed: int, step: int) -> Mixed:
    """Mix the images of a batch, or leave them where the recipe does not mix.

    Args:
        crops: the two global crops and the local ones, each (B, 3, S, S), on any device; those that are mixed are
            overwritten. Of an odd number of images the last stays as it is: timm mixes pairs.
        config: the ``mixup`` section.
        seed: of the run.
        step: of the run; which images are mixed how is a function of both.

    Returns:
        The teacher's crops are mixed too, as in the published code (timm mixes in place, after the teacher's list was
        made), unless ``clean_teacher`` is set. Without mixing there are no shares.
    """
    if not config.use:
        return Mixed(crops, crops[:2], None)
    teacher = [crop.clone() if config.clean_teacher else crop for crop in crops[:2]]
    paired = len(crops[0]) // 2 * 2
    mixup = _timm_mixup(config, paired)
    own = torch.arange(paired, device=crops[0].device)
    shares = [torch.eye(len(crop), device=crop.device) for crop in crops]
    with seeded((seed, _MIX_STREAM, step)):
        for crop, share in zip(crops[: config.crops], shares, strict=False):
            if paired:
                _, share[:paired, :paired] = mixup(crop[:paired], own)
    return Mixed(crops, teacher, shares)


def _timm_mixup(config: MixupConfig, images: int) -> Mixup:
    return Mixup(
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.prob,
        switch_prob=config.switch_prob,
        mode=config.mode,
        label_smoothing=config.smoothing,
        num_classes=images,
    )
