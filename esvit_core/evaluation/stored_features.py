"""Features in the object store: extracted once per run, and reused by other runs with the same network and images.

A set of features is a published folder, ``features/`` of a run for its own images and ``features/transfer-<set>/`` for a transfer
set, with a file for each backbone and split. The features of the last blocks, which only the linear probe reads, have a file
of their own.

An entry ``features/<key>.json`` of the bucket names the folder that has the features of a network, images and protocol. Its
key is a digest of all that determines them, so a champion or another existing backbone is not run again on images that it has
seen. An entry whose run was removed is replaced.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from esvit_core.config import Config
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.evaluation.features import SPLITS, Features, empty_features, features_of, load_model, split_datasets
from esvit_core.evaluation.imported_features import has_network, match_features, read_named_features
from esvit_core.evaluation.results import MODELS
from esvit_core.runs.run import FEATURE_ENTRIES
from esvit_core.storage import IntegrityError, NotFound, ObjectStore, join_uri
from esvit_core.storage.disk import explain_write_errors
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.store_errors import StoreRefused
from esvit_core.storage.uri import split_uri

_VERSION = 1  # of what determines the features beside the key's content
_KIND = "features"


def extract_features(run_uri: str, store: ObjectStore, config: Config) -> dict[str, Any]:
    """Write the features of the run's images with both backbones to ``features/`` of the run.

    If the output is already complete, it is returned unchanged.

    Returns:
        The manifest; its ``samples`` holds the number of images in each split.

    Raises:
        UserError: the run has no prepared data or no exported backbone.
    """
    prefix = join_uri(run_uri, "features")
    if (existing := store.read_manifest(prefix)) is not None:
        return existing
    datasets = split_datasets(store, join_uri(run_uri, "data"))
    if not has_network(store, run_uri):
        return _publish_imported(store, run_uri, prefix, datasets)
    return _extract(store, prefix, _networks(run_uri, store), datasets, config, blocks=True, what="")


def stored_models(store: ObjectStore, run_uri: str) -> tuple[str, ...]:
    """Return which of :data:`MODELS` have extracted features; a run that evaluates a file of features has no baseline."""
    manifest = store.read_manifest(join_uri(run_uri, "features"))
    stored = (
        [] if manifest is None else [model for model in MODELS if any(f.startswith(model) for f in manifest["files"])]
    )
    return tuple(stored) or MODELS


def transfer_features(
    run_uri: str, store: ObjectStore, config: Config, set_name: str, networks: Mapping[str, nn.Module] | None = None
) -> dict[str, tuple[Features, Features]]:
    """Return the view features of a transfer set, for training and for testing, by model.

    Args:
        networks: networks whose features are not kept in the run; None: those of the run, whose features are.
    """
    datasets = split_datasets(store, join_uri(run_uri, "transfer", set_name))
    what = f"{set_name}: "
    found: dict[str, tuple[Features, Features]] = {}
    if networks is not None:
        for model, network in networks.items():
            train, val = (
                find_or_compute(store, run_uri, network, datasets[split], config, f"{what}{_label(model, split)}")
                for split in SPLITS
            )
            found[model] = train, val
        return found
    prefix = join_uri(run_uri, "features", f"transfer-{set_name}")
    if store.read_manifest(prefix) is None:
        _extract(store, prefix, _networks(run_uri, store), datasets, config, blocks=False, what=what)
    for model in MODELS:
        train, val = (_read(store, prefix, f"{model}-{split}") for split in SPLITS)
        found[model] = train, val
    return found


def load_features(
    store: ObjectStore,
    run_uri: str,
    model: str,
    split: str,
    *,
    blocks: bool = False,
    most_bytes: float = float("inf"),
) -> Features:
    """Load features that :func:`extract_features` wrote; empty if the data has no such split.

    Args:
        model: ``trained`` or ``baseline``.
        split: ``train`` or ``val``.
        blocks: load the features of the last blocks too; without them they have no columns.
        most_bytes: size of the largest file to read.

    Raises:
        UserError: the features have not been extracted, or are larger than ``most_bytes``.
    """
    prefix = join_uri(run_uri, "features")
    manifest = store.read_manifest(prefix)
    if manifest is None:
        raise UserError(f"features of {run_uri}: not extracted yet; run the step extract_features first")
    name = f"{model}-{split}"
    if _file(name) not in manifest["files"]:
        return empty_features()
    if (size := manifest["files"][_file(name)]["bytes"]) > most_bytes:
        raise UserError(f"features of {run_uri}: {_file(name)} has {size / 1e9:.1f} GB, more than is read here")
    return _read(store, prefix, name, blocks=blocks)


def find_or_compute(
    store: ObjectStore,
    run_uri: str,
    network: nn.Module,
    dataset: ShardDataset,
    config: Config,
    label: str,
    *,
    blocks: bool = False,
) -> Features:
    """Return the features of a network that any run of the bucket has kept; if none has, compute them.

    Args:
        run_uri: a run of the bucket.
        blocks: the features of the last blocks are needed.
        label: first word of the progress lines.
    """
    key = feature_key(network, dataset, config, blocks)
    return _find_or_compute(store, run_uri, key, network, dataset, config, label, blocks)


def _find_or_compute(
    store: ObjectStore,
    uri: str,
    key: str,
    network: nn.Module,
    dataset: ShardDataset,
    config: Config,
    label: str,
    blocks: bool,
) -> Features:
    if (found := _find(store, uri, key, dataset, blocks)) is not None:
        print(f"{label}: those of an earlier run", flush=True)
        return found
    return features_of(network, dataset, config, label)


def feature_key(network: nn.Module, dataset: ShardDataset, config: Config, blocks: bool) -> str:
    """Return a digest of all that determines features: weights, images, preprocessing and precision."""
    description = getattr(network, "backbone_config", {})
    content = [
        _VERSION,
        _weights_digest(network),
        description.get("model"),
        dataset.content,
        [config.evaluation.resize, config.evaluation.crop, list(config.augment.mean), list(config.augment.std)],
        "bfloat16" if config.training.precision == "bfloat16" else "float32",
        config.evaluation.linear.last_blocks if blocks else 0,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _extract(
    store: ObjectStore,
    prefix: str,
    networks: Mapping[str, Callable[[], nn.Module]],
    datasets: Mapping[str, ShardDataset],
    config: Config,
    *,
    blocks: bool,
    what: str,
) -> dict[str, Any]:
    """Publish the features of every network and split, and make entries for them."""
    keys = {}
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        files: dict[str, Path | bytes] = {}
        for model, load in networks.items():
            network = load()
            for split, dataset in datasets.items():
                name = f"{model}-{split}"
                keys[name] = feature_key(network, dataset, config, blocks)
                label = f"{what}{_label(model, split)}"
                features = _find_or_compute(store, prefix, keys[name], network, dataset, config, label, blocks)
                files |= _save(features, Path(folder), name, blocks)
        samples = {split: len(dataset) for split, dataset in datasets.items()}
        manifest = store.publish(prefix, files, _KIND, {"samples": samples})
    try:
        for name, key in keys.items():
            store.put_bytes(_entry(prefix, key), encode_json({"prefix": prefix, "name": name}))
    except StoreRefused as error:
        print(f"features are not kept for other runs: {error}", flush=True)
    return manifest


def _publish_imported(
    store: ObjectStore, run_uri: str, prefix: str, datasets: Mapping[str, ShardDataset]
) -> dict[str, Any]:
    """Publish the features of a file for the run's images, of which they have no other form."""
    named = read_named_features(store, join_uri(run_uri, "backbone"))
    ends = [0, *np.cumsum([len(dataset) for dataset in datasets.values()])]
    names = [dataset.name(i) for dataset in datasets.values() for i in range(len(dataset))]
    view = match_features(named, names)
    print(f"features of {named.origin}: {len(view):,} of {len(named.names):,} rows are of these images", flush=True)
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        files: dict[str, Path | bytes] = {}
        for number, (split, dataset) in enumerate(datasets.items()):
            part = view[ends[number] : ends[number + 1]]
            features = Features(part, part[:, :0], np.asarray(dataset.labels, dtype=np.int64))
            files |= _save(features, Path(folder), f"{MODELS[0]}-{split}", True)
        samples = {split: len(dataset) for split, dataset in datasets.items()}
        return store.publish(prefix, files, _KIND, {"samples": samples})


def _find(store: ObjectStore, uri: str, key: str, dataset: ShardDataset, blocks: bool) -> Features | None:
    try:
        entry = store.get_json(_entry(uri, key))
        found = _read(store, entry["prefix"], entry["name"], blocks=blocks)
    except (NotFound, IntegrityError, KeyError, TypeError):  # removed or damaged: computed again
        return None
    if len(found) != len(dataset):
        return None
    return replace(found, labels=np.asarray(dataset.labels, dtype=np.int64))


def _networks(run_uri: str, store: ObjectStore) -> dict[str, Callable[[], nn.Module]]:
    return {model: lambda model=model: load_model(run_uri, model, store) for model in MODELS}  # type: ignore[misc]


def _weights_digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _entry(uri: str, key: str) -> str:
    return join_uri(f"s3://{split_uri(uri)[0]}", FEATURE_ENTRIES, f"{key}.json")


def _label(model: str, split: str) -> str:
    return f"features of the {model} backbone, {split}"


def _file(name: str, blocks: bool = False) -> str:
    return f"{name}{'-blocks' if blocks else ''}.safetensors"


def _save(features: Features, folder: Path, name: str, blocks: bool) -> dict[str, Path]:
    """Write the files of a split; return their paths by name."""
    contents = {_file(name): {"view": features.view, "labels": features.labels}}
    if blocks:
        contents[_file(name, True)] = {"blocks": features.blocks}
    for file, arrays in contents.items():
        with explain_write_errors(folder / file, SafetensorError):
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / file)
    return {file: folder / file for file in contents}


def _read(store: ObjectStore, prefix: str, name: str, *, blocks: bool = False) -> Features:
    files = [_file(name), *([_file(name, True)] if blocks else [])]
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        store.fetch(prefix, Path(folder), names=files)
        for file in files:
            arrays |= load_file(Path(folder) / file)
    view = arrays["view"]
    return Features(view, arrays.get("blocks", np.zeros((len(view), 0), view.dtype)), arrays["labels"])
