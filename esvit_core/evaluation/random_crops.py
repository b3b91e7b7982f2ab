"""The training images of the published linear probe: a new random crop and flip of every image in every epoch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from esvit_core.config import Config
from esvit_core.data.loading.augment import Normalize, crop_box
from esvit_core.evaluation.features import Images

_STREAM = 2  # separates these random numbers from those of the pre-training, which uses the same seed
_SCALE = (0.08, 1.0)  # areas of torchvision's RandomResizedCrop
_FLIP = 0.5


class RandomCrops:
    """Random resized crops (bilinear, antialiased) and flips, as torchvision's default transforms make them.

    Args:
        dataset: the images.
        indices: the images to use, (N,).
        config: its ``evaluation.crop`` is the side of the crops, ``augment`` has mean and std; and the seed.
        epoch: number of the epoch; with the seed and the image it determines the crop.
    """

    def __init__(self, dataset: Images, indices: np.ndarray, config: Config, epoch: int) -> None:
        self.labels: np.ndarray = np.asarray(dataset.labels)[indices]
        self._dataset, self._indices, self._epoch = dataset, indices, epoch
        self._side, self._seed = config.evaluation.crop, config.seed
        self._normalize = Normalize(config.augment.mean, config.augment.std)

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> np.ndarray:
        """Return the crop of an image, (S, S, 3) uint8."""
        number = int(self._indices[index])
        image = self._dataset.image(number)
        draw = np.random.default_rng((self._seed, _STREAM, self._epoch, number)).random
        left, top, right, bottom = crop_box(image.shape[1], image.shape[0], _SCALE, draw)
        pixels = torch.from_numpy(np.ascontiguousarray(image[top:bottom, left:right]).copy()).permute(2, 0, 1)[None]
        crop = F.interpolate(pixels, (self._side, self._side), mode="bilinear", antialias=True)[0]
        crop = crop.flip(-1) if draw() < _FLIP else crop
        return crop.permute(1, 2, 0).numpy()

    def normalize(self, image: np.ndarray) -> torch.Tensor:
        """Return the network's input of a crop, (3, S, S) float32."""
        return self._normalize(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float())
