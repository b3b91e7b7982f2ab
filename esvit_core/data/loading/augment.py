"""Multi-crop augmentation (EsViT, appendix A.1; DINO's), and the transform of the measured steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from esvit_core.config import AugmentConfig, CropConfig
from esvit_core.data.loading import photometric
from esvit_core.data.loading.randaugment import deit_transform
from esvit_core.data.loading.randomness import seeded

Box = tuple[int, int, int, int]
Draw = Callable[[], float]  # the next random number from 0 to 1

_AUGMENT_STREAM = 1  # keeps these random numbers apart from those of the order, which has the same seed
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_DRAWS = 2 * _ATTEMPTS + 16  # as many random numbers as a crop can use, and one call for all of them


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever augments it and whenever."""
    return np.random.default_rng((seed, _AUGMENT_STREAM, epoch, index))


class MultiCrop:
    """The crops of an image: global ones first, then local ones.

    Each is cut out at random (:func:`crop_box`), resized (bicubic, antialiased), mirrored with probability ``flip``;
    then, each with its probability, come colour jitter in random order, loss of colour, Gaussian blur, and for all
    global crops but the first solarisation; at last it is normalised. With the policy ``deit`` each crop goes through
    :func:`~esvit_core.data.loading.randaugment.deit_transform` instead.

    Args:
        config: sizes, numbers and probabilities.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._kinds = [kind for kind in (config.global_crops, *config.local_kinds) for _ in range(kind.number)]
        self._normalise = Normalise(config.mean, config.std)
        self._deit = [deit_transform(config, kind) for kind in self._kinds] if config.policy == "deit" else None

    @property
    def sizes(self) -> list[int]:
        """Side of every crop, pixels, in their order."""
        return [kind.size for kind in self._kinds]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
        """Make the crops of an image.

        Args:
            image: (H, W, 3) uint8.
            rng: determines everything that is random; see :func:`sample_rng`.

        Returns:
            One tensor (3, S, S) float32 a crop.
        """
        crops = [torch.empty(3, size, size) for size in self.sizes]
        self.write(image, rng, crops)
        return crops

    def write(self, image: np.ndarray, rng: np.random.Generator, crops: Sequence[Tensor]) -> None:
        """The same into tensors that are there already, such as rows of a batch; each contiguous, (3, S, S)."""
        if self._deit is not None:
            with seeded(rng.integers(1 << 32, size=4).tolist()):
                for transform, crop in zip(self._deit, crops, strict=True):
                    crop.copy_(transform(Image.fromarray(image)))
            return
        config = self.config
        pixels = _as_tensor(image)
        for number, (kind, crop) in enumerate(zip(self._kinds, crops, strict=True)):
            draw = _drawer(rng)
            self._cut(pixels, kind, draw, crop)
            is_global = number < config.global_crops.number
            blur = config.blur[min(number, 1) if is_global else 2]
            self._photometric(crop.numpy(), draw, blur, config.solarize if is_global and number else 0.0)
            self._normalise(crop)

    def geometric(
        self, image: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, tuple[float, float, float, float], bool]:
        """A global crop without photometrics, with where it lies.

        Returns:
            The normalised crop (3, S, S); left, top, right, bottom as shares of the image's sides; whether it is
            mirrored.
        """
        config = self.config.global_crops
        crop = torch.empty(3, config.size, config.size)
        (x0, y0, x1, y1), flipped = self._cut(_as_tensor(image), config, _drawer(rng), crop)
        height, width = image.shape[:2]
        return self._normalise(crop), (x0 / width, y0 / height, x1 / width, y1 / height), flipped

    def _cut(self, pixels: Tensor, kind: CropConfig, draw: Draw, out: Tensor) -> tuple[Box, bool]:
        """Cut out a crop, levels 0 to 255, into ``out``; return where it lies and whether it is mirrored."""
        height, width = pixels.shape[2:]
        left, top, right, bottom = box = crop_box(width, height, kind.scale, draw)
        crop = resize(pixels[:, :, top:bottom, left:right], kind.size, kind.size)
        flipped = draw() < self.config.flip
        out.copy_((crop.flip(-1) if flipped else crop)[0])
        return box, flipped

    def _photometric(self, x: np.ndarray, draw: Draw, blur: float, solarize: float) -> None:
        config = self.config
        if draw() < config.jitter:
            factors = [
                _between(max(0.0, 1 - config.brightness), 1 + config.brightness, draw),
                _between(max(0.0, 1 - config.contrast), 1 + config.contrast, draw),
                _between(max(0.0, 1 - config.saturation), 1 + config.saturation, draw),
                _between(-config.hue, config.hue, draw),
            ]
            places = [draw() for _ in factors]
            for which in sorted(range(4), key=places.__getitem__):
                _JITTER[which](x, factors[which])
        if draw() < config.grayscale:
            photometric.grey(x)
        if draw() < blur:
            photometric.blur(x, _between(*config.blur_sigma, draw))
        if draw() < solarize:
            photometric.solarize(x)


_JITTER = (photometric.brighten, photometric.contrast, photometric.saturate, photometric.shift_hue)


class EvalTransform:
    """Resize the shorter side, crop the center, normalise (EsViT, section 4).

    Args:
        resize: the shorter side, pixels.
        crop: side of the crop, pixels; what lies outside the image is black.
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
        self._normalise = Normalise(mean, std)

    def __call__(self, image: np.ndarray) -> Tensor:
        """From (H, W, 3) uint8 to (3, crop, crop) float32."""
        height, width = image.shape[:2]
        short = min(height, width)
        # torchvision's rounding: the longer side is cut to whole pixels.
        height, width = (self.resize if side == short else int(self.resize * side / short) for side in (height, width))
        pixels = resize(_as_tensor(image), height, width)
        top, left = (round((side - self.crop) / 2.0) for side in (height, width))
        if top < 0 or left < 0:
            pixels = F.pad(pixels, (max(0, -left), self.crop, max(0, -top), self.crop))
            top, left = max(0, top), max(0, left)
        out = torch.empty(3, self.crop, self.crop)
        out.copy_(pixels[0, :, top : top + self.crop, left : left + self.crop])
        return self._normalise(out)


class Normalise:
    """Take off the mean and divide by the standard deviation, in place.

    Args:
        mean, std: of the three channels, as shares of 255.
    """

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Of levels 0 to 255, (3, H, W) float32."""
        return x.mul_(self._scale).add_(self._shift)


def crop_box(width: int, height: int, scale: tuple[float, float], draw: Draw) -> Box:
    """Where a random resized crop lies: area and aspect ratio at random, as torchvision's ``RandomResizedCrop`` does.

    Args:
        width, height: of the image, pixels.
        scale: smallest and largest area as a share of the image's.
        draw: the next random number from 0 to 1.

    Returns:
        Left, top, right, bottom in pixels. After ten attempts that do not fit, the largest centered box whose ratio is
        allowed.
    """
    area = width * height
    low, high = (math.log(ratio) for ratio in _RATIO)
    for _ in range(_ATTEMPTS):
        target = area * _between(*scale, draw)
        ratio = math.exp(_between(low, high, draw))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draw() * (height - h + 1)), int(draw() * (width - w + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize as PIL's bicubic filter does, (1, 3, H, W) uint8."""
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)


def _as_tensor(image: np.ndarray) -> Tensor:
    """(1, 3, H, W) uint8 in the memory of ``image``, (H, W, 3), where that can be shared."""
    writable = image if image.flags.writeable else image.copy()
    return torch.from_numpy(np.ascontiguousarray(writable)).permute(2, 0, 1).unsqueeze(0)


def _drawer(rng: np.random.Generator) -> Draw:
    return iter(rng.random(_DRAWS).tolist()).__next__


def _between(low: float, high: float, draw: Draw) -> float:
    return low + (high - low) * draw()
