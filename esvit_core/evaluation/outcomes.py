"""Outcomes of single images: whether a model classified each held-out image correctly, or what its metric needs instead.

They are kept in the result of an evaluation, so that models are compared on the same images, also later and across runs:

    {"held_out": "<digest of the images>", "images": 802, "labels": "<classes, for a mean over classes>",
     "correct": {"trained": {"knn/20": "<one bit per image>"}, "baseline": {"knn/20": "..."}}}

A figure that is a mean of values of the images has ``values`` instead of ``correct``, and a metric of the order of the images
has the ``metric``, its ``truth`` and the ``ranks`` of the images.
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
from esvit_core.evaluation.metric_difference import mean_difference, ranking_difference, ranks
from esvit_core.evaluation.results import MODELS
from esvit_core.evaluation.significance import Difference, accuracy_difference, mean_per_class_difference
from esvit_core.evaluation.transfer_metrics import Metric

Outcomes = dict[str, Any]
_KINDS = ("correct", "values", "ranks")  # what is kept of each model and figure
_LABEL_DTYPE, _VALUE_DTYPE, _TRUTH_DTYPE = "<i4", "<f4", "<i1"
_NOT_KEPT = "the outcomes of the single images were not kept"


def held_out_digest(manifest: Manifest) -> str:
    """Return a digest of the held-out images, their labels and their order; empty if there are none."""
    split = manifest.splits.get("val")
    if split is None:
        return ""
    content = [split.content, *manifest.classes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def pack_outcomes(
    held_out: str,
    correct: Mapping[str, Mapping[str, np.ndarray]],
    labels: np.ndarray | None = None,
    values: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Outcomes:
    """Pack outcomes for JSON, one bit per image.

    Args:
        held_out: digest of the images, see :func:`held_out_digest`.
        correct: for each model and figure whether each image was classified correctly, (M,) bool.
        labels: class of each image, (M,), if the figure is the mean over classes; None if it is the accuracy.
        values: for each model and figure the values of the images, (M,) fractions, if the figure is their mean.
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
        packed["labels"] = _pack(labels, _LABEL_DTYPE)
    if values is not None:
        packed["values"] = {
            model: {key: _pack(each, _VALUE_DTYPE) for key, each in figures.items()}
            for model, figures in values.items()
        }
    return packed


def pack_rankings(
    held_out: str, metric: Metric, truth: np.ndarray, scores: Mapping[str, Mapping[str, np.ndarray]]
) -> Outcomes:
    """Pack the order in which each model ranks the images, for a metric that depends on it alone.

    Args:
        held_out: digest of the images, see :func:`held_out_digest`.
        metric: ``map_11_point`` or ``roc_auc``.
        truth: labels as the metric takes them, (M, C) or (M,).
        scores: for each model and figure the scores of the images, (M, C).
    """
    dtype = _rank_dtype(len(truth))
    return {
        "held_out": held_out,
        "images": len(truth),
        "metric": metric,
        "truth": _pack(truth, _TRUTH_DTYPE),
        "ranks": {
            model: {key: _pack(ranks(each), dtype) for key, each in figures.items()}
            for model, figures in scores.items()
        },
    }


def unpack_correct(outcomes: Outcomes, model: str, key: str) -> np.ndarray | None:
    """Return whether a model classified each image correctly, (M,) bool; None if this was not kept."""
    text = outcomes.get("correct", {}).get(model, {}).get(key)
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
        return _NOT_KEPT
    if one["images"] != other["images"] or (not same_images and one["held_out"] != other["held_out"]):
        return "the two were measured on different held-out images"
    if "ranks" in one:
        return _compare_rankings(key, one, first_model, other, second_model)
    values, compared_values = (_values(part, model, key) for part, model in ((one, first_model), (other, second_model)))
    if values is not None and compared_values is not None:
        return mean_difference(values, compared_values)
    correct, compared = unpack_correct(one, first_model, key), unpack_correct(other, second_model, key)
    if correct is None or compared is None:
        return _NOT_KEPT
    if "labels" not in one:
        return accuracy_difference(correct, compared)
    return mean_per_class_difference(correct, compared, _unpack(one["labels"], _LABEL_DTYPE))


def as_model(outcomes: Outcomes, model: str, name: str) -> Outcomes:
    """Return the outcomes of one model under another name, without those of the other models."""
    return outcomes | {kind: {name: outcomes[kind][model]} for kind in _KINDS if kind in outcomes}


def keep_outcomes(result: dict[str, Any], outcomes: Outcomes) -> dict[str, Any]:
    """Add outcomes to a result, and under ``differences`` the difference of the trained model and the baseline.

    Args:
        result: of :func:`esvit_core.evaluation.results.measured`.
        outcomes: of :func:`pack_outcomes`.
    """
    result = result | {"outcomes": outcomes}
    figures = {
        model: {key: None for kind in _KINDS for key in outcomes.get(kind, {}).get(model, {})} for model in MODELS
    }
    found = {
        key: compare_outcomes(key, result, "trained", result, "baseline")
        for key in figures["trained"]
        if key in figures["baseline"]
    }
    if found:
        result["differences"] = {key: each.as_json() for key, each in found.items() if isinstance(each, Difference)}
    return result


def _compare_rankings(
    key: str, one: Outcomes, first_model: str, other: Outcomes, second_model: str
) -> Difference | str:
    texts = one["ranks"].get(first_model, {}).get(key), other.get("ranks", {}).get(second_model, {}).get(key)
    if None in texts or one["metric"] != other["metric"]:
        return _NOT_KEPT
    truth = _unpack(one["truth"], _TRUTH_DTYPE)
    if one["metric"] == "map_11_point":
        truth = truth.reshape(one["images"], -1)
    first, second = (_unpack(text, _rank_dtype(one["images"])).reshape(one["images"], -1) for text in texts)
    return ranking_difference(one["metric"], truth, first, second)


def _values(outcomes: Outcomes, model: str, key: str) -> np.ndarray | None:
    text = outcomes.get("values", {}).get(model, {}).get(key)
    return None if text is None else _unpack(text, _VALUE_DTYPE)


def _rank_dtype(images: int) -> str:
    return "<u2" if images <= 1 << 16 else "<u4"


def _pack(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values.astype(dtype)).tobytes())).decode()


def _unpack(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)
