"""KFP artifacts of a step's outputs: addresses, metadata, and scalar metrics.

KFP's launcher rejects null in metadata, and JSON has neither NaN nor infinity. Only this module writes metadata: it
omits values that are None or not finite, and raises an error for types that the launcher cannot store, so that such a
mistake shows on every machine, not only on a cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_REMOTE = ("s3://", "minio://", "gs://")


class Artifact(Protocol):
    """The part of a KFP artifact that is used here (this package does not import kfp)."""

    uri: str
    metadata: dict[str, Any]

    @property
    def path(self) -> str: ...


def describe(artifact: Artifact, **values: Any) -> None:
    """Add ``values`` to an artifact's metadata, except those that are None or not finite.

    Raises:
        TypeError: a value is not a string, number, boolean, or a list or mapping of these.
    """
    artifact.metadata.update(_known(values, "metadata"))


def log_metrics(metrics: Artifact, values: Mapping[str, Any]) -> None:
    """Write metrics, which the UI displays and compares between runs: numbers, and verdicts in words.

    Values that are not finite are omitted.
    """
    known = {name: value for name, value in values.items() if value is not None}
    describe(metrics, **{name: value if isinstance(value, str) else float(value) for name, value in known.items()})
    write_preview(metrics)


def write_preview(artifact: Artifact) -> None:
    """Write the metadata as the artifact's content, because the UI shows an error for an artifact without content."""
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(artifact.metadata, indent=1) + "\n", encoding="utf-8")


def point_to(artifact: Artifact, uri: str, **values: Any) -> None:
    """Make a KFP artifact refer to data at ``uri`` in the object store.

    The data stay where they are. On a cluster, KFP's launcher accepts only output addresses below its own pipeline root,
    and downloads everything at the address of an input before a step starts. There the artifact keeps the address that
    KFP has given it, and its content is a few bytes with ``uri``. On one machine the artifact's own ``uri`` is set.
    ``metadata["uri"]`` is set everywhere.

    Raises:
        TypeError: see :func:`describe`.
    """
    describe(artifact, uri=uri, **values)
    write_preview(artifact)
    if not artifact.uri.startswith(_REMOTE):
        artifact.uri = uri


def evaluation_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Print the headline metric of an evaluation in one line, and return all its metrics by name.

    The names of the baseline's metrics have a suffix: ``knn/20`` and ``knn/20 (baseline)``. A skipped evaluation has no
    metrics.
    """
    if result["status"] == "measured":
        values = {model: metrics[result["headline"]] for model, metrics in result["results"].items()}
        text = ", ".join(f"{value:.1f} {result['unit']} {model}" for model, value in values.items())
        print(f"{result['headline']}: {text}{_compared(result)}", flush=True)
    else:
        print(f"skipped: {result['reason']}", flush=True)
    return {
        name if model == "trained" else f"{name} (baseline)": value
        for model, values in result.get("results", {}).items()
        for name, value in values.items()
    }


def _compared(result: Mapping[str, Any]) -> str:
    """Return the difference of the headline metric from the baseline, in words; empty if it was not tested."""
    found = result.get("differences", {}).get(result["headline"])
    if found is None:
        return ""
    low, high = found["interval"]
    p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
    return (
        f"; {found['decision']}: {found['points']:+.1f} points, 95 % interval {low:.1f} to {high:.1f}, "
        f"{p}, {found['images']:,} images"
    )


def _known(value: Any, name: str) -> Any:
    """Remove None and non-finite values from a value, at any depth of mappings."""
    if isinstance(value, Mapping):
        known = {key: _known(item, f"{name}.{key}") for key, item in value.items() if _exists(item)}
        return {str(key): item for key, item in known.items()}
    if isinstance(value, (list, tuple)):
        return [_known(item, name) for item in value]
    if isinstance(value, (str, bool, int, float)) and _exists(value):
        return value
    raise TypeError(f"{name}: Kubeflow cannot store {value!r} in metadata")


def _exists(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
