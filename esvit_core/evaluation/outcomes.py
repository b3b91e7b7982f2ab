"""Outcomes of single images: whether a model classified each held-out image correctly.

They are kept in the result of an evaluation, so that models are compared on the same images, also later and across runs:

    {"held_out": "<digest of the images>", "images": 802, "labels": "<classes, for a mean over classes>",
     "correct": {"trained": {"knn/20": "<one bit per image>"}, "baseline": {"knn/20": "..."}}}
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from esvit_core.data.shards.manifest import Manifest
from esvit_core.evaluation.significance import Difference, accuracy_difference, mean_per_class_difference

Outcomes = dict[str, Any]
_LABEL_DTYPE = "<i4"


def held_out_digest(manifest: Manifest) -> str:
    """Return a digest of the held-out images, their labels and their order; empty if there are none."""
    split = manifest.splits.get("val")
    if split is None:
        return ""
    content = [manifest.files[split.index].sha256, *(shard.sha256 for shard in split.shards), *manifest.classes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def pack_outcomes(
    held_out: str, correct: Mapping[str, Mapping[str, np.ndarray]], labels: np.ndarray | None = None
) -> Outcomes:
    """Pack outcomes for JSON, one bit per image.

    Args:
        held_out: digest of the images, see :func:`held_out_digest`.
        correct: for each model and figure whether each image was classified correctly, (M,) bool.
        labels: class of each image, (M,), if the figure is the mean over classes; None if it is the accuracy.
    """
    images = len(next(iter(next(iter(correct.values())).values())))
    packed = {
        "held_out": held_out,
        "images": images,
        "correct": {
            model: {key: base64.b64encode(np.packbits(each).tobytes()).decode() for key, each in figures.items()}
            for model, figures in correct.items()
        },
    }
    if labels is not None:
        packed["labels"] = base64.b64encode(zlib.compress(labels.astype(_LABEL_DTYPE).tobytes())).decode()
    return packed


def unpack_correct(outcomes: Outcomes, model: str, key: str) -> np.ndarray | None:
    """Return whether a model classified each image correctly, (M,) bool; None if this was not kept."""
    text = outcomes["correct"].get(model, {}).get(key)
    if text is None:
        return None
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=outcomes["images"]).astype(bool)


def compare_outcomes(
    key: str,
    first: Mapping[str, Any],
    first_model: str,
    second: Mapping[str, Any],
    second_model: str,
    *,
    same_images: bool = False,
) -> Difference | str:
    """Compare two models on the same held-out images.

    Args:
        key: the figure, such as ``knn/20``.
        first, second: results of the same evaluation; they may be the same result.
        first_model, second_model: model of each result.
        same_images: the caller knows that both were measured on the same images, which may be stored in different sizes;
            otherwise their digests must be equal.

    Returns:
        The difference, first minus second; or the reason why it has no interval.
    """
    one, other = first.get("outcomes"), second.get("outcomes")
    if not one or not other:
        return "the outcomes of the single images were not kept"
    if one["images"] != other["images"] or (not same_images and one["held_out"] != other["held_out"]):
        return "the two were measured on different held-out images"
    correct, compared = unpack_correct(one, first_model, key), unpack_correct(other, second_model, key)
    if correct is None or compared is None:
        return "the outcomes of the single images were not kept"
    if "labels" not in one:
        return accuracy_difference(correct, compared)
    labels = np.frombuffer(zlib.decompress(base64.b64decode(one["labels"])), _LABEL_DTYPE)
    return mean_per_class_difference(correct, compared, labels)


def keep_outcomes(result: dict[str, Any], outcomes: Outcomes) -> dict[str, Any]:
    """Add outcomes to a result, and under ``differences`` the difference of the trained model and the baseline.

    Args:
        result: of :func:`esvit_core.evaluation.results.measured`.
        outcomes: of :func:`pack_outcomes`.
    """
    result = result | {"outcomes": outcomes}
    found = {
        key: compare_outcomes(key, result, "trained", result, "baseline")
        for key in outcomes["correct"].get("trained", {})
        if key in outcomes["correct"].get("baseline", {})
    }
    if found:
        result["differences"] = {key: each.as_json() for key, each in found.items() if isinstance(each, Difference)}
    return result
