"""Multi-crop augmentation (EsViT, appendix A.1, following DINO), and the transform for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from esvit_core.config import AugmentConfig
from esvit_core.data.loading import photometric
from esvit_core.data.loading.randomness import seeded
from esvit_core.kernels import image_ops

Box = tuple[int, int, int, int]
Draw = Callable[[], float]  # returns the next random number in [0, 1)

_AUGMENT_STREAM = 1  # separates these random numbers from those of the order, which uses the same seed
_LONG = 8  # times the shorter side; the ends of longer images are cut off before they are resized
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_DRAWS = 2 * _ATTEMPTS + 16  # upper bound of the random numbers per crop, which are drawn in one call


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random generator of one sample in one epoch, independent of process and time."""
    return np.random.default_rng((seed, _AUGMENT_STREAM, epoch, index))


class CropDraw(NamedTuple):
    """What was drawn for a crop.

    Attributes:
        box: left, top, right, bottom, pixels.
        flip: mirror the crop.
        jitter: operations of the color jitter (indexes of ``_JITTER``) and their factors, in order.
        grayscale: set all channels to the luma.
        blur_sigma: of the Gaussian blur, pixels; None: no blur.
        solarize: invert bright values.
        turns: quarter turns, 0 to 3.
    """

    box: Box
    flip: bool
    jitter: tuple[tuple[int, float], ...] = ()
    grayscale: bool = False
    blur_sigma: float | None = None
    solarize: bool = False
    turns: int = 0


class MultiCrop:
    """Makes the crops of an image: global crops first, then local crops.

    Each crop is cut out at random (:func:`crop_box`), resized (bicubic, antialiased) and flipped with probability ``flip``.
    Then follow, each with its own probability, color jitter in random order, grayscale, Gaussian blur, and, for all global
    crops but the first, solarization. Finally the crop is normalized, and turned by 90, 180 or 270 degrees with probability
    ``rotate``. With the policy ``deit``, each crop goes through
    :func:`~esvit_core.data.loading.randaugment.deit_transform` instead.

    Kernels in C make the crops where they are available (:mod:`esvit_core.kernels.image_ops`), else torch and NumPy do.

    Args:
        config: sizes, numbers and probabilities.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._has_kernels = image_ops.can_make_crops()
        self._kinds = [kind for kind in (config.global_crops, *config.local_kinds) for _ in range(kind.number)]
        self._normalize = Normalize(config.mean, config.std)
        self._deit: list[Callable[[Image.Image], Tensor]] | None = None
        if config.policy == "deit":
            from esvit_core.data.loading.randaugment import deit_transform  # imports timm, which takes seconds

            self._deit = [deit_transform(config, kind) for kind in self._kinds]

    @property
    def sizes(self) -> list[int]:
        """Side of each crop in pixels, in order."""
        return [kind.size for kind in self._kinds]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
        """Make the crops of an image.

        Args:
            image: (H, W, 3) uint8.
            rng: source of all randomness; see :func:`sample_rng`.

        Returns:
            One tensor (3, S, S) float32 per crop.
        """
        crops = [torch.empty(3, size, size) for size in self.sizes]
        self.write(image, rng, crops)
        return crops

    def write(self, image: np.ndarray, rng: np.random.Generator, crops: Sequence[Tensor]) -> None:
        """Write the crops to existing tensors, such as rows of a batch; each is contiguous, (3, S, S)."""
        if self._deit is not None:
            with seeded(rng.integers(1 << 32, size=4).tolist()):
                for transform, crop in zip(self._deit, crops, strict=True):
                    crop.copy_(transform(Image.fromarray(image)))
            return
        draws = self.draw(image.shape[1], image.shape[0], rng)
        if self._has_kernels:
            described = [
                image_ops.describe_crop(
                    drawn.box,
                    drawn.flip,
                    drawn.jitter,
                    drawn.grayscale,
                    None if drawn.blur_sigma is None else photometric.blur_factors(drawn.blur_sigma),
                    drawn.solarize,
                    crop,
                )
                for drawn, crop in zip(draws, crops, strict=True)
            ]
            image_ops.make_crops(np.ascontiguousarray(image), described, self._normalize.scale, self._normalize.shift)
        else:
            pixels = _as_tensor(image)
            for drawn, crop in zip(draws, crops, strict=True):
                _cut(pixels, drawn.box, drawn.flip, crop)
                _change_colors(crop.numpy(), drawn)
                self._normalize(crop)
        _turn(draws, crops)

    def write_levels(self, image: np.ndarray, rng: np.random.Generator, crops: Sequence[Tensor]) -> list[CropDraw]:
        """Write the levels of the crops, cut out, resized, flipped and turned, to (3, S, S) uint8 tensors.

        The rest is done on a GPU, see :mod:`esvit_core.data.loading.device_colors`. Not for the policy ``deit``.

        Returns:
            What was drawn for each crop.
        """
        draws = self.draw(image.shape[1], image.shape[0], rng)
        if self._has_kernels:
            levels = [torch.empty(crop.shape) for crop in crops]
            described = [
                image_ops.describe_crop(drawn.box, drawn.flip, (), False, None, False, crop)
                for drawn, crop in zip(draws, levels, strict=True)
            ]
            image_ops.make_crops(np.ascontiguousarray(image), described, torch.ones(3), torch.zeros(3))
            for crop, made in zip(crops, levels, strict=True):
                crop.copy_(made)  # whole numbers
        else:
            pixels = _as_tensor(image)
            for drawn, crop in zip(draws, crops, strict=True):
                _cut(pixels, drawn.box, drawn.flip, crop)
        _turn(draws, crops)
        return draws

    def draw(self, width: int, height: int, rng: np.random.Generator) -> list[CropDraw]:
        """Draw everything that is random in the crops of an image with these sides, in pixels."""
        config = self.config
        draws = []
        for number, kind in enumerate(self._kinds):
            draw = _drawer(rng)
            box, flip = crop_box(width, height, kind.scale, draw), draw() < config.flip
            is_global = number < config.global_crops.number
            blur = config.blur[min(number, 1) if is_global else 2]
            solarize = config.solarize if is_global and number else 0.0
            colors = self._draw_colors(draw, blur, solarize)
            # Without rotation nothing is drawn for it: the other random numbers stay the same.
            turns = 1 + int(3 * rng.random()) if config.rotate and rng.random() < config.rotate else 0
            draws.append(CropDraw(box, flip, *colors, turns))
        return draws

    def geometric_crop(
        self, image: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, tuple[float, float, float, float], bool]:
        """Make a global crop without photometric augmentation, and return its position.

        Returns:
            The normalized crop (3, S, S); left, top, right, bottom as fractions of the image's sides; whether it is flipped.
        """
        config = self.config.global_crops
        height, width = image.shape[:2]
        crop, draw = torch.empty(3, config.size, config.size), _drawer(rng)
        x0, y0, x1, y1 = box = crop_box(width, height, config.scale, draw)
        flip = draw() < self.config.flip
        _cut(_as_tensor(image), box, flip, crop)
        return self._normalize(crop), (x0 / width, y0 / height, x1 / width, y1 / height), flip

    def _draw_colors(
        self, draw: Draw, blur: float, solarize: float
    ) -> tuple[tuple[tuple[int, float], ...], bool, float | None, bool]:
        config = self.config
        jitter: tuple[tuple[int, float], ...] = ()
        if draw() < config.jitter:
            factors = [
                _between(max(0.0, 1 - config.brightness), 1 + config.brightness, draw),
                _between(max(0.0, 1 - config.contrast), 1 + config.contrast, draw),
                _between(max(0.0, 1 - config.saturation), 1 + config.saturation, draw),
                _between(-config.hue, config.hue, draw),
            ]
            order = [draw() for _ in factors]
            jitter = tuple((which, factors[which]) for which in sorted(range(4), key=order.__getitem__))
        grayscale = draw() < config.grayscale
        sigma = _between(*config.blur_sigma, draw) if draw() < blur else None
        return jitter, grayscale, sigma, draw() < solarize


def _cut(pixels: Tensor, box: Box, flip: bool, out: Tensor) -> None:
    """Cut out a box and resize it, levels 0 to 255, into ``out``."""
    left, top, right, bottom = box
    crop = resize(pixels[:, :, top:bottom, left:right], out.shape[1], out.shape[2])
    out.copy_((crop.flip(-1) if flip else crop)[0])


def _turn(draws: Sequence[CropDraw], crops: Sequence[Tensor]) -> None:
    for drawn, crop in zip(draws, crops, strict=True):
        if drawn.turns:
            crop.copy_(torch.rot90(crop, drawn.turns, (1, 2)).clone())


def _change_colors(x: np.ndarray, drawn: CropDraw) -> None:
    for which, factor in drawn.jitter:
        _JITTER[which](x, factor)
    if drawn.grayscale:
        photometric.grayscale(x)
    if drawn.blur_sigma is not None:
        photometric.gaussian_blur(x, drawn.blur_sigma)
    if drawn.solarize:
        photometric.solarize(x)


_JITTER = (
    photometric.adjust_brightness,
    photometric.adjust_contrast,
    photometric.adjust_saturation,
    photometric.adjust_hue,
)


class EvalTransform:
    """Resize the shorter side, crop the center, normalize (EsViT, section 4).

    Args:
        resize: length of the shorter side, pixels.
        crop: side of the crop, pixels; areas outside the image are black.
        mean, std: of the three channels, as fractions of 255.
    """

    def __init__(
        self,
        resize: int,
        crop: int,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        self.resize, self.crop = resize, crop
        self._normalize = Normalize(mean, std)

    def __call__(self, image: np.ndarray) -> Tensor:
        """Transform an image, (H, W, 3) uint8, to (3, crop, crop) float32."""
        image = self._center_of_long_image(image)
        height, width = image.shape[:2]
        short = min(height, width)
        # As in torchvision, the longer side is rounded down.
        height, width = (self.resize if side == short else int(self.resize * side / short) for side in (height, width))
        pixels = resize(_as_tensor(image), height, width)
        top, left = (round((side - self.crop) / 2.0) for side in (height, width))
        if top < 0 or left < 0:
            pixels = F.pad(pixels, (max(0, -left), self.crop, max(0, -top), self.crop))
            top, left = max(0, top), max(0, left)
        out = torch.empty(3, self.crop, self.crop)
        out.copy_(pixels[0, :, top : top + self.crop, left : left + self.crop])
        return self._normalize(out)

    def _center_of_long_image(self, image: np.ndarray) -> np.ndarray:
        """Cut off the ends of a very long image, which the crop does not show: resized, they would fill the memory."""
        keep = max(_LONG, 2 * -(-self.crop // self.resize)) * min(image.shape[:2])
        height, width = image.shape[:2]
        top, left = max(0, height - keep) // 2, max(0, width - keep) // 2
        return image[top : height - top, left : width - left]


class Normalize:
    """Subtract the mean and divide by the standard deviation, in place.

    Args:
        mean, std: of the three channels, as fractions of 255.
    """

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(3, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize levels 0 to 255, (3, H, W) float32."""
        return x.mul_(self.scale).add_(self.shift)


def crop_box(width: int, height: int, scale: tuple[float, float], draw: Draw) -> Box:
    """Draw the box of a random resized crop: random area and aspect ratio, as in torchvision's ``RandomResizedCrop``.

    Args:
        width, height: of the image, pixels.
        scale: smallest and largest area as a fraction of the image's.
        draw: returns the next random number in [0, 1).

    Returns:
        Left, top, right, bottom in pixels. If ten attempts do not fit into the image, the largest centered box with an
        allowed aspect ratio.
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
    """Resize like PIL's bicubic filter, (1, 3, H, W) uint8."""
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)


def _as_tensor(image: np.ndarray) -> Tensor:
    """Return ``image``, (H, W, 3), as (1, 3, H, W) uint8, sharing its memory where possible."""
    writable = image if image.flags.writeable else image.copy()
    return torch.from_numpy(np.ascontiguousarray(writable)).permute(2, 0, 1).unsqueeze(0)


def _drawer(rng: np.random.Generator) -> Draw:
    return iter(rng.random(_DRAWS).tolist()).__next__


def _between(low: float, high: float, draw: Draw) -> float:
    return low + (high - low) * draw()
