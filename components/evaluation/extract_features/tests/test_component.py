"""Extract features: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.evaluation.extract_features import extract_features
from esvit_core.runs.run import Run


def test_features_of_both_networks_and_both_splits(run_there: Run, components: Any) -> None:
    run_there.store.remove_prefix(run_there.at("features"))
    _, artifacts = components.directly(extract_features, run_uri=run_there.uri)
    assert artifacts["features"].uri == run_there.at("features")
    assert sum(artifacts["features"].metadata["samples"].values()) == 48
    manifest = run_there.store.read_manifest(run_there.at("features"))
    parts = [f"{model}-{split}" for model in ("trained", "baseline") for split in ("train", "val")]
    assert set(manifest["files"]) == {f"{part}{kind}.safetensors" for part in parts for kind in ("", "-blocks")}


def test_again_it_finds_them(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(extract_features, run_uri=run_there.uri)
    assert outputs["features"]["uri"] == run_there.at("features")
