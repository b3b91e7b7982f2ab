"""Prepare the transfer sets, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.data.prepare_transfer import prepare_transfer
from esvit_core.runs.run import Run


def test_it_prepares_the_sets_that_the_configuration_names(run_there: Run, components: Any) -> None:
    run_there.store.remove_prefix(run_there.at("transfer/marks"))
    _, artifacts = components.directly(prepare_transfer, run_uri=run_there.uri)
    sets = artifacts["sets"]
    assert sets.uri == run_there.at("transfer")
    assert sets.metadata["marks"]["train"] + sets.metadata["marks"]["val"] == 24
    assert sets.metadata["marks"]["classes"] == 2


def test_again_it_finds_the_sets(run_there: Run, components: Any) -> None:
    before = [item.etag for item in run_there.store.list(run_there.at("transfer"))]
    outputs = components.through_kfp(prepare_transfer, run_uri=run_there.uri)
    assert outputs["sets"]["uri"] == run_there.at("transfer")
    assert [item.etag for item in run_there.store.list(run_there.at("transfer"))] == before
