"""Evaluation of the champion on the images of its challenger.

A champion's own figures were measured on the images of its run. A retraining has more images, also held-out ones, so
both networks are evaluated on the challenger's: the same k-NN bank, held-out images and protocol.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from esvit_core.config import Config
from esvit_core.evaluation.outcomes import as_model
from esvit_core.evaluation.results import Result, left_out, read_result
from esvit_core.runs.run import RETRAINING
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.store_errors import NotFound

if TYPE_CHECKING:
    from torch import nn

CHAMPION = "champion"
_WEIGHTS = "model.safetensors"
Comparison = dict[str, Any]


def is_retraining(run_uri: str, store: ObjectStore) -> bool:
    """Whether the run is a retraining, which challenges the champion."""
    return store.exists(join_uri(run_uri, RETRAINING))


def comparison_uri(run_uri: str, champion: dict[str, Any]) -> str:
    """Return the address of a champion's figures on the run's images."""
    return join_uri(run_uri, "comparison", f"{str(champion['run']).rpartition('/')[2]}.json")


def read_comparison(run_uri: str, store: ObjectStore, champion: dict[str, Any]) -> Comparison | None:
    """Read a champion's figures on the run's images; None if it was not evaluated on them.

    Args:
        champion: value of the champion's pointer.
    """
    try:
        return store.get_json(comparison_uri(run_uri, champion))
    except NotFound:
        return None


def compare_with_champion(run_uri: str, store: ObjectStore, config: Config, champion: dict[str, Any]) -> Comparison:
    """Evaluate a champion on the run's images, with every evaluation that the run itself has.

    A run that started from this champion has its figures already: they are those of its baseline, the same network.
    The result is written once.

    Args:
        champion: value of the champion's pointer.

    Returns:
        ``run`` and ``backbone`` of the champion, ``how`` its figures were obtained, and ``results``: for each evaluation
        (``knn``, ``linear``, ``transfer-<set>``) a result whose only model is ``champion``.
    """
    if (found := read_comparison(run_uri, store, champion)) is not None:
        return found
    start = time.monotonic()
    names = ["knn", "linear", *(f"transfer-{s.name}" for s in config.evaluation.transfer)]
    own = {name: result for name in names if (result := read_result(store, run_uri, name)) is not None}
    weights = _weights(store, champion["backbone"])
    if weights is None:
        how = "it could not be measured"
        reason = f"its backbone at {champion['backbone']} was deleted"
        results = {name: left_out(result["headline"], reason) for name, result in own.items()}
    elif weights == _weights(store, join_uri(run_uri, "baseline")):
        how = "the run started from it"
        results = {name: _from_baseline(result) for name, result in own.items()}
    else:
        how = "measured on the images of the run"
        results = _measure(run_uri, store, config, champion["backbone"], list(own))
    record = {
        "run": champion["run"],
        "backbone": champion["backbone"],
        "how": how,
        "results": {name: {"name": name} | result for name, result in results.items()},
        "seconds": round(time.monotonic() - start, 2),
    }
    if store.put_if_absent(comparison_uri(run_uri, champion), encode_json(record)):
        return record
    return store.get_json(comparison_uri(run_uri, champion))


def _weights(store: ObjectStore, backbone: str) -> str | None:
    """SHA-256 of a published backbone's weights; None if it does not exist."""
    manifest = store.read_manifest(backbone)
    return None if manifest is None else str(manifest["files"][_WEIGHTS]["sha256"])


def _from_baseline(result: Result) -> Result:
    results = result["results"]
    champion = {**result, "results": {CHAMPION: results["baseline"]} if results else {}}
    champion.pop("differences", None)  # of the run's own backbone
    if "outcomes" in result:
        champion["outcomes"] = as_model(result["outcomes"], "baseline", CHAMPION)
    return champion


def _measure(
    run_uri: str, store: ObjectStore, config: Config, backbone_uri: str, names: list[str]
) -> dict[str, Result]:
    # Imported here, because most retrainings start from the champion and need none of it.
    from esvit_core.data.shards.manifest import Manifest
    from esvit_core.evaluation.features import SPLITS, empty_features, split_datasets
    from esvit_core.evaluation.knn import measure_knn
    from esvit_core.evaluation.labels import Task, task_of
    from esvit_core.evaluation.linear_probe import augmented_features, measure_linear
    from esvit_core.evaluation.stored_features import find_or_compute
    from esvit_core.evaluation.transfer import evaluate_task, transfer_task
    from esvit_core.weights.backbone import load_backbone

    network: nn.Module = load_backbone(backbone_uri, store)
    results: dict[str, Result] = {}
    if {"knn", "linear"} & set(names):
        data = join_uri(run_uri, "data")
        datasets = split_datasets(store, data)
        train, val = (
            find_or_compute(
                store, run_uri, network, datasets[split], config, f"features of the champion, {split}", blocks=True
            )
            if split in datasets
            else empty_features()
            for split in SPLITS
        )
        task: Task | str = task_of({CHAMPION: (train, val)}, Manifest.read(store, data))
        if "knn" in names:
            results["knn"] = measure_knn(task, config)
        if "linear" in names:
            results["linear"] = measure_linear(
                task, config, augmented_features({CHAMPION: network}, run_uri, store, config)
            )
    for transfer_set in config.evaluation.transfer:
        if (name := f"transfer-{transfer_set.name}") in names:
            found = transfer_task(run_uri, store, config, transfer_set.name, {CHAMPION: network})
            results[name] = evaluate_task(found, transfer_set, config.seed)
    return results
