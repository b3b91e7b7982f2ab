"""The validation images on which a hyperparameter is chosen: folds of the training images."""

from __future__ import annotations

import numpy as np

FOLDS = 5
# With more training images, a single fold has at least 1,000 images, and the choice is made on it alone.
MAX_IMAGES_FOR_ALL_FOLDS = 5_000


def validation_folds(labels: np.ndarray, seed: int, folds: int = FOLDS) -> np.ndarray:
    """Distribute the images of each class evenly over the folds at random; fold of each image, (N,).

    The only image of a class is in no fold (-1), so that every fit sees every class. With several labels per image, (N, C),
    all images are distributed as if they belonged to one class.
    """
    rng = np.random.default_rng(seed)
    fold = np.full(len(labels), -1)
    start = 0
    of_image = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
    for value in np.unique(of_image):
        members = rng.permutation(np.flatnonzero(of_image == value))
        if len(members) > 1:
            fold[members] = (start + np.arange(len(members))) % folds
            start += len(members)  # so that the folds of many small classes have the same size
    return fold


def folds_to_use(fold: np.ndarray) -> list[np.ndarray]:
    """Return a mask of the validation images of each fold that is used, (N,) bool."""
    number = FOLDS if len(fold) <= MAX_IMAGES_FOR_ALL_FOLDS else 1
    masks = [fold == i for i in range(number)]
    return [mask for mask in masks if mask.any()]
