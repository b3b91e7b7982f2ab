"""Multi-crop augmentation (EsViT, appendix A.1; DINO's), and the transform of the measured steps."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from esvit_core.config import AugmentConfig, CropConfig

Box = tuple[int, int, int, int]
_AUGMENT_STREAM = 1  # keeps these random numbers apart from those of the order, which has the same seed
_RATIO = (3 / 4, 4 / 3)
_SOLARIZE_THRESHOLD = 128


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever augments it and whenever."""
    return np.random.default_rng((seed, _AUGMENT_STREAM, epoch, index))


class MultiCrop:
    """The crops of a picture: global ones first, then local ones."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._mean = np.asarray(config.mean, np.float32)
        self._std = np.asarray(config.std, np.float32)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[torch.Tensor]:
        config = self.config
        picture = Image.fromarray(image)
        crops = []
        for number in range(config.global_crops.number):
            second = number % 2 == 1
            crop = self._crop(picture, config.global_crops, rng)[0]
            crop = self._photometric(crop, rng, config.blur[1 if second else 0], config.solarize if second else 0.0)
            crops.append(self._normalise(crop))
        for _ in range(config.local_crops.number):
            crop = self._crop(picture, config.local_crops, rng)[0]
            crops.append(self._normalise(self._photometric(crop, rng, config.blur[2], 0.0)))
        return crops

    def geometric(
        self, image: np.ndarray, rng: np.random.Generator, kind: Literal["global", "local"]
    ) -> tuple[torch.Tensor, tuple[float, float, float, float], bool]:
        """A crop without photometrics, with where it lies.

        Returns:
            The normalised crop (3, S, S); left, top, right, bottom as shares of the picture's sides; whether it is
            mirrored.
        """
        config = self.config.global_crops if kind == "global" else self.config.local_crops
        crop, (x0, y0, x1, y1), flipped = self._crop(Image.fromarray(image), config, rng)
        height, width = image.shape[:2]
        return self._normalise(crop), (x0 / width, y0 / height, x1 / width, y1 / height), flipped

    def _crop(self, picture: Image.Image, kind: CropConfig, rng: np.random.Generator) -> tuple[Image.Image, Box, bool]:
        box = crop_box(picture.width, picture.height, kind.scale, rng)
        crop = picture.crop(box).resize((kind.size, kind.size), Image.Resampling.BICUBIC)
        flipped = bool(rng.random() < self.config.flip)
        if flipped:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop, box, flipped

    def _photometric(self, crop: Image.Image, rng: np.random.Generator, blur: float, solarize: float) -> Image.Image:
        config = self.config
        if rng.random() < config.jitter:
            order = rng.permutation(4)
            factors = [
                rng.uniform(max(0.0, 1 - config.brightness), 1 + config.brightness),
                rng.uniform(max(0.0, 1 - config.contrast), 1 + config.contrast),
                rng.uniform(max(0.0, 1 - config.saturation), 1 + config.saturation),
                rng.uniform(-config.hue, config.hue),
            ]
            for which in order:
                if which == 0:
                    crop = ImageEnhance.Brightness(crop).enhance(factors[0])
                elif which == 1:
                    crop = ImageEnhance.Contrast(crop).enhance(factors[1])
                elif which == 2:
                    crop = ImageEnhance.Color(crop).enhance(factors[2])
                else:
                    crop = _shift_hue(crop, factors[3])
        if rng.random() < config.grayscale:
            crop = crop.convert("L").convert("RGB")
        if rng.random() < blur:
            crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(*config.blur_sigma)))
        if solarize and rng.random() < solarize:
            crop = ImageOps.solarize(crop, _SOLARIZE_THRESHOLD)
        return crop

    def _normalise(self, crop: Image.Image) -> torch.Tensor:
        return to_tensor(np.asarray(crop), self._mean, self._std)


class EvalTransform:
    """Resize the shorter side, crop the centre, normalise (EsViT, section 4).

    Args:
        resize: the shorter side, pixels.
        crop: side of the crop, pixels.
        mean, std: of the three channels, as shares of 255.
    """

    def __init__(
        self,
        resize: int,
        crop: int,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        self.resize, self.crop = resize, crop
        self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """From (H, W, 3) uint8 to (3, crop, crop) float32."""
        picture = Image.fromarray(image)
        short, side = min(picture.size), self.resize
        # torchvision's rounding: the longer side is cut, not rounded.
        size = tuple(side if length == short else int(side * length / short) for length in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (round((length - self.crop) / 2.0) for length in picture.size)
        picture = picture.crop((left, top, left + self.crop, top + self.crop))  # black where it reaches outside
        return to_tensor(np.asarray(picture), self._mean, self._std)


def crop_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Where a random resized crop lies: area and aspect ratio at random, as torchvision's ``RandomResizedCrop`` does.

    Args:
        width, height: of the picture, pixels.
        scale: smallest and largest area as a share of the picture's.

    Returns:
        Left, top, right, bottom in pixels; after ten attempts that do not fit, the largest centred box whose ratio
        is allowed.
    """
    area = width * height
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    ratio = width / height
    w, h = width, height
    if ratio < _RATIO[0]:
        h = max(1, min(height, round(width / _RATIO[0])))
    elif ratio > _RATIO[1]:
        w = max(1, min(width, round(height * _RATIO[1])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_tensor(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    """Normalise (H, W, 3) uint8 to (3, H, W) float32."""
    values = pixels.astype(np.float32)
    values /= 255
    values -= mean
    values /= std
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _shift_hue(crop: Image.Image, factor: float) -> Image.Image:
    hue, saturation, value = crop.convert("HSV").split()
    shifted = (np.asarray(hue).astype(np.int16) + int(factor * 255)).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")
