"""Features are kept per run, and found again by every other run with the same network, images and protocol."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from esvit_core.config import Config
from esvit_core.evaluation import stored_features
from esvit_core.evaluation.features import Features, features_of, split_datasets
from esvit_core.evaluation.stored_features import (
    extract_features,
    feature_key,
    find_or_compute,
    load_features,
    transfer_features,
)
from esvit_core.runs.retention import remove_feature_entries
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import StoreRefused
from esvit_core.weights.backbone import load_backbone, save_backbone

from .conftest import draw, split


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the features that were computed."""
    labels: list[str] = []

    def record(*arguments: object, label: str = "", **more: object) -> Features:
        labels.append(str(arguments[3]) if len(arguments) > 3 else label)
        return features_of(*arguments[:3], labels[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(stored_features, "features_of", record)
    return labels


@pytest.fixture(scope="module")
def first(make_run: Callable[..., str], bucket: ObjectStore, config: Config) -> str:
    run = make_run("features-first", split, {"stripes": split})
    extract_features(run, bucket, config)
    return run


def names(uri: str, store: ObjectStore) -> set[str]:
    return {stat.uri.removeprefix(f"{uri}/") for stat in store.list(uri)}


def test_only_what_is_asked_for_is_read(first: str, bucket: ObjectStore) -> None:
    view, both = (load_features(bucket, first, "trained", "val", blocks=blocks) for blocks in (False, True))
    assert np.array_equal(view.view, both.view) and np.array_equal(view.labels, both.labels)
    assert view.blocks.shape == (11, 0) and both.blocks.shape[1] > both.view.shape[1]
    assert names(f"{first}/features", bucket) >= {"trained-val.safetensors", "trained-val-blocks.safetensors"}


def test_another_run_with_the_same_networks_and_images_computes_nothing(
    first: str, make_run: Callable[..., str], bucket: ObjectStore, config: Config, computed: list[str]
) -> None:
    second = make_run("features-second", split)
    extract_features(second, bucket, config)
    assert computed == []
    for model in ("trained", "baseline"):
        a, b = (load_features(bucket, run, model, "train", blocks=True) for run in (first, second))
        assert np.array_equal(a.view, b.view) and np.array_equal(a.blocks, b.blocks)
    bucket.remove_prefix(f"{first}/features")  # the second one has files of its own
    assert len(load_features(bucket, second, "trained", "train")) == 25
    extract_features(first, bucket, config)
    assert computed == []  # found in the second one, which replaced the entries


def test_the_features_of_a_transfer_set_are_kept_for_a_repeated_step(
    first: str, bucket: ObjectStore, config: Config, computed: list[str]
) -> None:
    found = transfer_features(first, bucket, config, "stripes")
    before = len(computed)
    again = transfer_features(first, bucket, config, "stripes")
    assert len(computed) == before and set(again) == {"trained", "baseline"}
    assert all(np.array_equal(found[m][i].view, again[m][i].view) for m in found for i in (0, 1))
    assert names(f"{first}/features/transfer-stripes", bucket) == {
        "manifest.json",
        *(f"{model}-{part}.safetensors" for model in found for part in ("train", "val")),
    }
    champion = {"champion": load_backbone(f"{first}/backbone", bucket)}
    theirs = transfer_features(first, bucket, config, "stripes", champion)["champion"]
    assert len(computed) == before and np.array_equal(theirs[1].view, found["trained"][1].view)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.evaluation.model_copy(update={"crop": 24}),
        lambda c: c.evaluation.model_copy(update={"resize": 48}),
        lambda c: c.evaluation.model_copy(update={"linear": c.evaluation.linear.model_copy(update={"last_blocks": 1})}),
    ],
    ids=["crop", "resize", "blocks"],
)
def test_another_protocol_has_another_key(
    first: str, bucket: ObjectStore, config: Config, change: Callable[[Config], object]
) -> None:
    network, dataset = load_backbone(f"{first}/backbone", bucket), split_datasets(bucket, f"{first}/data")["val"]
    changed = config.model_copy(update={"evaluation": change(config)})
    assert feature_key(network, dataset, config, True) != feature_key(network, dataset, changed, True)


def test_other_weights_precision_and_images_have_other_keys_and_settings_of_execution_do_not(
    first: str, bucket: ObjectStore, config: Config
) -> None:
    datasets = split_datasets(bucket, f"{first}/data")
    network, dataset = load_backbone(f"{first}/backbone", bucket), datasets["val"]
    key = feature_key(network, dataset, config, True)
    bfloat16 = config.model_copy(update={"training": config.training.model_copy(update={"precision": "bfloat16"})})
    batches = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": 3})})
    assert key == feature_key(network, dataset, batches, True)
    others = [
        feature_key(network, dataset, bfloat16, True),
        feature_key(network, datasets["train"], config, True),
        feature_key(network, dataset, config, False),
        feature_key(load_backbone(f"{first}/baseline", bucket), dataset, config, True),
    ]
    assert len({key, *others}) == 5
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-6
    assert feature_key(network, dataset, config, True) not in (key, *others)


@pytest.mark.parametrize("damage", ["removed", "not an entry", "other images"])
def test_features_that_are_gone_are_computed_again(
    make_run: Callable[..., str],
    bucket: ObjectStore,
    config: Config,
    computed: list[str],
    damage: str,
    tmp_path: Path,
) -> None:
    run = make_run(
        f"features-{damage.replace(' ', '-')}", lambda folder: draw(folder, {"a": 9, "b": 9}, seed=len(damage))
    )
    extract_features(run, bucket, config)
    count = len(computed)
    network, dataset = load_backbone(f"{run}/backbone", bucket), split_datasets(bucket, f"{run}/data")["val"]
    expected = load_features(bucket, run, "trained", "val", blocks=True)
    entry = f"s3://evaluation/features/{feature_key(network, dataset, config, True)}.json"
    if damage == "removed":
        bucket.remove_prefix(f"{run}/features")
    elif damage == "not an entry":
        bucket.put_bytes(entry, b"[]")
    else:
        bucket.put_json(entry, bucket.get_json(entry) | {"name": "trained-train"})
    found = find_or_compute(bucket, run, network, dataset, config, "again", blocks=True)
    assert len(computed) == count + 1 and np.array_equal(found.view, expected.view)


def test_a_key_that_may_not_write_entries_still_extracts(
    make_run: Callable[..., str],
    bucket: ObjectStore,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run("features-refused", lambda folder: draw(folder, {"a": 5, "b": 5}, seed=9))
    put = ObjectStore.put_bytes

    def refuse(self: ObjectStore, uri: str, data: bytes, **more: str) -> None:
        if uri.startswith("s3://evaluation/features/"):
            raise StoreRefused(f"{uri}: access denied")
        put(self, uri, data, **more)

    monkeypatch.setattr(ObjectStore, "put_bytes", refuse)
    assert extract_features(run, bucket, config)["samples"]["train"] == 8
    assert "not kept for other runs" in capsys.readouterr().out


def test_entries_of_removed_runs_are_removed(bucket: ObjectStore) -> None:
    for name, run in (("one", "s3://pruned/runs/a"), ("two", "s3://pruned/runs/ab")):
        bucket.ensure_bucket("pruned")
        bucket.put_json(join_uri("s3://pruned/features", f"{name}.json"), {"prefix": f"{run}/features", "name": "x"})
    bucket.put_bytes("s3://pruned/features/other.json", json.dumps("other").encode())
    remove_feature_entries(bucket, "pruned", {"s3://pruned/runs/a"})
    assert names("s3://pruned/features", bucket) == {"two.json", "other.json"}


def test_a_saved_backbone_has_the_key_of_its_network(first: str, bucket: ObjectStore, config: Config) -> None:
    network, dataset = load_backbone(f"{first}/backbone", bucket), split_datasets(bucket, f"{first}/data")["val"]
    save_backbone(bucket, "s3://evaluation/exports/copy", network, config, {"run": "s3://evaluation/runs/other"})
    copy = load_backbone("s3://evaluation/exports/copy", bucket)
    assert feature_key(copy, dataset, config, True) == feature_key(network, dataset, config, True)
