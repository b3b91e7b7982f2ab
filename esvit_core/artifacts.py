"""What a step tells Kubeflow about its outputs: artifacts, their metadata, and scalar metrics.

Kubeflow's launcher refuses null in metadata, and JSON has neither NaN nor infinity. This module is the only place that
writes metadata: a value that does not exist is left out, and a type that the launcher cannot store is an error here,
on every machine, and not only on a cluster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_REMOTE = ("s3://", "minio://", "gs://")


class Artifact(Protocol):
    """What is used of a KFP artifact (this package imports no kfp)."""

    uri: str
    metadata: dict[str, Any]

    @property
    def path(self) -> str: ...


def describe(artifact: Artifact, **values: Any) -> None:
    """Add ``values`` to an artifact's metadata, without those that are None or not finite.

    Raises:
        TypeError: a value is neither text, number, truth value, nor a list or mapping of these.
    """
    artifact.metadata.update(_known(values, "metadata"))


def log_metrics(metrics: Artifact, figures: Mapping[str, Any]) -> None:
    """Write scalar metrics, which the UI shows and compares between runs; a figure that is not finite is left out."""
    describe(metrics, **{name: float(value) for name, value in figures.items() if value is not None})
    write_preview(metrics)


def write_preview(artifact: Artifact) -> None:
    """Write the metadata as the artifact's content, which the UI shows: where there is none it shows an error."""
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(artifact.metadata, indent=1) + "\n", encoding="utf-8")


def point_to(artifact: Artifact, uri: str, **values: Any) -> None:
    """Make a KFP artifact stand for what lies at ``uri`` in the object store.

    The large things stay where they are. KFP's launcher on a cluster accepts only addresses below its own pipeline
    root for what a step puts out, and downloads everything at an input's address before a step starts. There the
    artifact keeps the address that it was given and holds a few bytes that say where the thing is; elsewhere the
    artifact's own ``uri`` says so. ``metadata["uri"]`` says so everywhere.

    Raises:
        TypeError: see :func:`describe`.
    """
    describe(artifact, uri=uri, **values)
    write_preview(artifact)
    if not artifact.uri.startswith(_REMOTE):
        artifact.uri = uri


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Print what an evaluation found, in a line, and return its figures by name.

    The trained network's figures have the bare name, such as ``knn/20``, and those of the network with its initial
    weights ``knn/20 (baseline)``. There are none if it was left out.
    """
    if result["status"] == "measured":
        values = {model: figures[result["headline"]] for model, figures in result["results"].items()}
        told = ", ".join(f"{value:.1f} {result['unit']} {model}" for model, value in values.items())
        print(f"{result['headline']}: {told}", flush=True)
    else:
        print(f"left out: {result['reason']}", flush=True)
    return {
        name if model == "trained" else f"{name} (baseline)": value
        for model, values in result.get("results", {}).items()
        for name, value in values.items()
    }


def _known(value: Any, name: str) -> Any:
    """``value`` without what is None or not finite, at any depth of mappings."""
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
