"""Prepare data, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

import pytest

from esvit_components.data.prepare_data import prepare_data
from esvit_core.data.shards.manifest import Manifest
from esvit_core.runs.run import Run


def test_it_starts_the_run_and_finds_the_shards(run_there: Run, components: Any) -> None:
    recipe = run_there.config.to_yaml()
    before = [item.etag for item in run_there.store.list(run_there.at("data"))]
    outputs, artifacts = components.directly(prepare_data, source="images", recipe=recipe, run_uri=run_there.uri)
    assert outputs == (run_there.uri,)
    dataset = artifacts["dataset"]
    assert dataset.uri == dataset.metadata["uri"] == run_there.at("data")
    assert dataset.metadata["train"] + dataset.metadata["val"] == 48
    assert dataset.metadata["classes"] == 3
    assert [item.etag for item in run_there.store.list(run_there.at("data"))] == before


def test_without_an_address_the_run_lies_where_its_content_says(run_there: Run, components: Any) -> None:
    recipe = run_there.config.to_yaml()
    outputs = components.through_kfp(prepare_data, source="images", recipe=recipe)
    assert outputs["run_uri"] == run_there.uri
    assert outputs["dataset"]["uri"] == run_there.at("data")


def test_another_configuration_is_refused(run_there: Run, components: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run_there.config.model_copy(update={"seed": 5}).to_yaml()
    with pytest.raises(SystemExit) as stop:
        components.directly(prepare_data, source="images", recipe=recipe, run_uri=run_there.uri)
    assert stop.value.code == 2
    assert "another configuration (seed: 0 there, 5 here)" in capsys.readouterr().err


def test_on_a_cluster_the_artifact_keeps_the_address_it_was_given(
    run_there: Run, components: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP's launcher rejects other addresses, and would download everything at the address before every step."""
    from kfp import dsl

    dataset = dsl.Dataset(name="dataset", uri="s3://kfp/v2/artifacts/dataset")
    dataset.custom_path = str(components.folder / "dataset")
    recipe = run_there.config.to_yaml()
    prepare_data.python_func("images", dataset, recipe, run_uri=run_there.uri)
    assert dataset.uri == "s3://kfp/v2/artifacts/dataset"
    assert dataset.metadata["uri"] == run_there.at("data")
    assert run_there.at("data") in (components.folder / "dataset").read_text()


def test_shares_and_a_last_step_make_the_same_data(run_there: Run, components: Any) -> None:
    """What the pods of `cluster.prepare.parallelism` do, one after the other."""
    arguments = {"source": "images", "recipe": run_there.config.to_yaml(), "run_uri": f"{run_there.uri}-in-shares"}
    assert components.through_kfp(prepare_data, **arguments, share="1/2")["run_uri"] == arguments["run_uri"]
    components.directly(prepare_data, **arguments, share="2/2")
    assert not run_there.store.exists(f"{arguments['run_uri']}/data/manifest.json")
    _, artifacts = components.directly(prepare_data, **arguments)
    shared, alone = (Manifest.read(run_there.store, f"{uri}/data") for uri in (arguments["run_uri"], run_there.uri))
    assert artifacts["dataset"].metadata["images"] == 48 and shared == alone
