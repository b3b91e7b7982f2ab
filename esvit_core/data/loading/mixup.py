"""Mixup and CutMix of a batch of crops, as in the published code with timm's ``Mixup``.

Each crop is mixed separately: image i with image B - 1 - i of the images in the same process, in a ratio drawn anew for
each crop. The ratio is a function of seed and step, and the same in all processes, as in the published code, whose
processes share one seed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor

from esvit_core.config import MixupConfig
from esvit_core.data.loading.randomness import seeded

_MIX_STREAM = 2  # separates these random numbers from those of order and augmentation, which use the same seed


class MixedCrops(NamedTuple):
    """Crops for student and teacher, and the mixing matrix (B, B) of each crop, which the loss takes as ``mix``."""

    student: list[Tensor]
    teacher: list[Tensor]
    shares: list[Tensor] | None


def mix_crops(crops: list[Tensor], config: MixupConfig, seed: int, step: int) -> MixedCrops:
    """Mix the images of a batch, or return them unchanged if the recipe does not mix.

    Args:
        crops: the two global crops and the local crops, each (B, 3, S, S), on any device; mixed crops are overwritten. If
            the number of images is odd, the last one stays unchanged, because timm mixes pairs.
        config: the ``mixup`` section.
        seed: seed of the run.
        step: step of the run.

    Returns:
        The mixed crops. The teacher's crops are mixed too, as in the published code (timm mixes in place, after the
        teacher's list was made), unless ``clean_teacher`` is set. Without mixing there are no shares.
    """
    if not config.use:
        return MixedCrops(crops, crops[:2], None)
    teacher = [crop.clone() if config.clean_teacher else crop for crop in crops[:2]]
    paired = len(crops[0]) // 2 * 2
    mixup = _timm_mixup(config, paired)
    indices = torch.arange(paired, device=crops[0].device)
    shares = [torch.eye(len(crop), device=crop.device) for crop in crops]
    with seeded((seed, _MIX_STREAM, step)):
        for crop, share in zip(crops[: config.crops], shares, strict=False):
            if paired:
                _, share[:paired, :paired] = mixup(crop[:paired], indices)
    return MixedCrops(crops, teacher, shares)


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
