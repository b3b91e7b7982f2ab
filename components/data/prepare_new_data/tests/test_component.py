"""Prepare new data, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.data.prepare_new_data import prepare_new_data
from esvit_core.runs.run import Run


def test_of_a_finished_run_it_finds_the_shards(run_there: Run, components: Any) -> None:
    before = [item.etag for item in run_there.store.list(run_there.at("data"))]
    _, artifacts = components.directly(prepare_new_data, run_uri=run_there.uri)
    assert artifacts["dataset"].uri == run_there.at("data") and artifacts["dataset"].metadata["images"] == 48
    assert [item.etag for item in run_there.store.list(run_there.at("data"))] == before


def test_through_a_pipeline(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(prepare_new_data, run_uri=run_there.uri)
    assert outputs["dataset"]["uri"] == run_there.at("data")
