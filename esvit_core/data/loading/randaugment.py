"""DeiT's augmentation as implemented in timm: RandAugment and random erasing (Touvron et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor

from esvit_core.config import AugmentConfig, CropConfig


def deit_transform(config: AugmentConfig, kind: CropConfig) -> Callable[[Image.Image], Tensor]:
    """Build the transform of one type of crop: random resized crop, flip, RandAugment, normalization and random erasing.

    timm draws from global random states; see :func:`esvit_core.data.loading.randomness.seeded`. timm disables color jitter
    when RandAugment is used, as in the published code, which requests both.

    Args:
        config: the ``augment`` section.
        kind: size and scale of the crop.

    Returns:
        A function from an image to (3, S, S) float32.
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
    """Posterize like timm. timm sometimes asks for 0 bits, which new versions of Pillow refuse; older ones returned black."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
