"""The augmentation of DeiT, timm's: RandAugment and random erasing (Touvron et al., 2021), as `augment.policy: deit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor

from esvit_core.config import AugmentConfig, CropConfig


def deit_transform(config: AugmentConfig, kind: CropConfig) -> Callable[[Image.Image], Tensor]:
    """Random resized crop, flip, RandAugment, normalisation and random erasing of one kind of crop.

    timm draws from global random states: see :func:`esvit_core.data.loading.randomness.seeded`. Its colour jitter is off
    beside RandAugment, as it is in the published code, which asks for both.

    Args:
        config: the ``augment`` section.
        kind: size and scale of the crop.

    Returns:
        From an image to (3, S, S) float32.
    """
    deit = config.deit
    transform: Any = create_transform(
        input_size=kind.size,
        is_training=True,
        scale=kind.scale,
        hflip=config.flip,
        auto_augment=deit.rand_augment,
        interpolation=deit.interpolation,
        mean=config.mean,
        std=config.std,
        re_prob=deit.erase,
        re_mode=deit.erase_mode,
        re_count=deit.erase_count,
    )
    for step in transform.transforms:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which asks for 0 bits now and then: new versions of Pillow refuse that, the older ones gave black."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
