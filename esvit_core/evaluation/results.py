"""Result of an evaluation: one JSON object of the run, written once.

    {"name": "knn", "status": "measured", "reason": null, "headline": "knn/20", "unit": "%",
     "results": {"trained": {"knn/20": 34.9}, "baseline": {"knn/20": 30.7}},
     "differences": {"knn/20": {"points": 4.2, "interval": [0.3, 8.1], "p": 0.041, "images": 480, "discordant": 96,
                                "images_needed": 460, "decision": "better"}},
     "classes": ["cat", ...], "notes": [...], "seconds": 1.2, ...}

``differences`` and ``outcomes`` are described in :mod:`esvit_core.evaluation.outcomes`. What cannot be measured has the status ``left_out`` and a reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import NotFound

MODELS = ("trained", "baseline")
Result = dict[str, Any]


def result_uri(run_uri: str, name: str) -> str:
    return join_uri(run_uri, "evaluation", f"{name}.json")


def read_result(store: ObjectStore, run_uri: str, name: str) -> Result | None:
    """Read the result of the evaluation ``name`` (``knn``, ``linear``, ``transfer-<set>``); None if it does not exist."""
    try:
        return store.get_json(result_uri(run_uri, name))
    except NotFound:
        return None


def measure_once(store: ObjectStore, run_uri: str, name: str, measure: Callable[[], Result]) -> Result:
    """Return the existing result, or measure and write it.

    If two attempts run concurrently, the first result is kept and both return it.
    """
    if (existing := read_result(store, run_uri, name)) is not None:
        return existing
    start = time.monotonic()
    result: Result = {"name": name} | measure()
    result["seconds"] = round(time.monotonic() - start, 2)
    uri = result_uri(run_uri, name)
    if store.put_if_absent(uri, (json.dumps(result, indent=1) + "\n").encode()):
        return result
    return store.get_json(uri)


def measured(headline: str, results: dict[str, dict[str, float]], classes: Sequence[str], **more: Any) -> Result:
    """Create a result with figures in percent for each of :data:`MODELS`."""
    return {
        "status": "measured",
        "reason": None,
        "headline": headline,
        "unit": "%",
        "results": {model: {k: round(v, 4) for k, v in figures.items()} for model, figures in results.items()},
        "classes": list(classes),
        "notes": [],
    } | more


def left_out(headline: str, reason: str) -> Result:
    """Create a result that states why there are no figures."""
    return {
        "status": "left_out",
        "reason": reason,
        "headline": headline,
        "unit": "%",
        "results": {},
        "classes": [],
        "notes": [],
    }
