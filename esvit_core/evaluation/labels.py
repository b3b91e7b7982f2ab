"""Labels for evaluation: build classification tasks and describe their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from esvit_core.data.shards.manifest import Manifest
from esvit_core.evaluation.features import SPLITS, Features
from esvit_core.evaluation.outcomes import held_out_digest
from esvit_core.evaluation.stored_features import load_features, stored_models
from esvit_core.storage import ObjectStore, join_uri

# Spread of the features relative to the largest of them, up to which their differences are rounding errors in float32.
_ROUNDING = 1e-6

Splits = tuple[Features, Features]


@dataclass(frozen=True)
class Task:
    """A classification that can be measured.

    Attributes:
        splits: labeled features of each model, for training and for testing.
        classes: names of the classes.
        notes: limits of the figures that a reader must know.
        held_out: digest of the held-out images.
        several_labels: of a set with several labels per image, 1, 0 (difficult) or -1 of each class, (N, C) for training and
            (M, C) for testing; None: each image has one label.
    """

    splits: dict[str, Splits]
    classes: list[str]
    notes: list[str]
    held_out: str
    several_labels: tuple[np.ndarray, np.ndarray] | None = None


def run_task(run_uri: str, store: ObjectStore, *, blocks: bool = False) -> Task | str:
    """Return the classification task of the run's own images, or the reason why there is none.

    Args:
        blocks: with the features of the last blocks.
    """
    manifest = Manifest.read(store, join_uri(run_uri, "data"))
    splits: dict[str, Splits] = {}
    for model in stored_models(store, run_uri):
        train, val = (load_features(store, run_uri, model, split, blocks=blocks) for split in SPLITS)
        splits[model] = train, val
    return task_of(splits, manifest)


def task_of(splits: Mapping[str, Splits], manifest: Manifest) -> Task | str:
    """Build a task from the features of each model on prepared data, or return the reason why there is none."""
    train, val = next(iter(splits.values()))
    names = class_names(manifest.classes, train.labels, val.labels)
    if reason := missing_labels(train.labels, val.labels, names):
        return reason
    for model, parts in splits.items():
        if reason := unusable_features(model, *parts):
            return reason
    return Task(
        {model: (_labeled(a), _labeled(b)) for model, (a, b) in splits.items()},
        names,
        label_notes(train.labels, val.labels, names),
        held_out_digest(manifest),
    )


def _labeled(features: Features) -> Features:
    keep = features.labels >= 0
    if keep.all():
        return features
    return Features(features.view[keep], features.blocks[keep], features.labels[keep])


def missing_labels(train_labels: np.ndarray, val_labels: np.ndarray, classes: Sequence[str]) -> str | None:
    """Return the reason why these labels cannot be used; None if they can.

    A class that only the held-out images have is such a reason: every image of it would count as wrong, so the figure would
    describe the split of the data.

    Args:
        train_labels, val_labels: classes from 0; -1: none.
        classes: names of the classes.
    """
    if not len(train_labels):
        return "there are no training images"
    known = train_labels[train_labels >= 0]
    if not len(known):
        return "the images have no labels; put the images of each class into a folder of their own to measure this"
    if len(np.unique(known)) < 2:
        return "all training images belong to one class; a classifier needs two"
    if not len(val_labels):
        return "no images are held out; add a val folder or set data.val_fraction above 0"
    if not (val_labels >= 0).any():
        return "the held-out images have no labels"
    missing = [classes[number] for number in np.setdiff1d(val_labels[val_labels >= 0], known)]
    if not np.intersect1d(val_labels, known).size:
        trained = _shown([classes[number] for number in np.unique(known)])
        return (
            f"the held-out images ({_shown(missing)}) have no class in common with the training images ({trained}); "
            "name the folders of a class alike in both splits"
        )
    if len(missing) == 1:
        return (
            f"{missing[0]}, a class of held-out images, has no training images; add some, or remove the held-out ones"
        )
    if missing:
        return (
            f"{len(missing):,} classes of held-out images have no training images: {_shown(missing)}; add some, or "
            "remove the held-out ones"
        )
    return None


def unusable_features(model: str, train: Features, val: Features) -> str | None:
    """Return the reason why features cannot be classified; None if they can.

    Args:
        model: name of the model for the reason.
        train, val: its features.
    """
    for part, images in ((train, "training"), (val, "held-out")):
        finite = np.isfinite(part.view).all(1) & np.isfinite(part.blocks).all(1)
        if not finite.all():
            return (
                f"the {model} backbone gives NaN or infinite features for {int((~finite).sum()):,} of {len(part):,} "
                f"{images} images"
            )
    spread = np.ptp(train.view, axis=0).max(initial=0)
    if len(train) > 1 and spread <= _ROUNDING * np.abs(train.view).max(initial=0):
        return f"the {model} backbone gives all {len(train):,} training images the same features"
    return None


def label_notes(train_labels: np.ndarray, val_labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Describe the limits of a figure: classes without held-out images, single-image classes, unlabeled images."""
    train = np.bincount(train_labels[train_labels >= 0], minlength=len(classes))
    val = np.bincount(val_labels[val_labels >= 0], minlength=len(classes))
    notes = [
        _note(classes, (train > 0) & (val == 0), "without held-out images, so not measured"),
        _note(classes, train == 1, "with a single training image"),
    ]
    unlabeled = int((train_labels < 0).sum() + (val_labels < 0).sum())
    if unlabeled:
        noun = "image" if unlabeled == 1 else "images"
        notes.append(f"{unlabeled:,} {noun} without a label not used")
    return [note for note in notes if note]


def class_names(classes: Sequence[str], *labels: np.ndarray) -> list[str]:
    """Return a name for every class; a class that the manifest does not name gets its number."""
    count = max([len(classes), *(int(part.max(initial=-1)) + 1 for part in labels)])
    return [*classes, *(str(number) for number in range(len(classes), count))]


def _note(classes: Sequence[str], which: np.ndarray, what: str) -> str:
    names = [name for name, chosen in zip(classes, which, strict=True) if chosen]
    if not names:
        return ""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} {what}: {_shown(names)}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
