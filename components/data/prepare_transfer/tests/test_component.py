"""Prepare a transfer set: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

import pytest

from esvit_components.data.prepare_transfer import prepare_transfer
from esvit_core.runs import Run


def test_it_prepares_the_set_that_the_configuration_names(run_there: Run, components: Any) -> None:
    run_there.store.remove_prefix(run_there.at("transfer/marks"))
    _, artifacts = components.directly(prepare_transfer, run_uri=run_there.uri, set_name="marks")
    dataset = artifacts["dataset"]
    assert dataset.uri == run_there.at("transfer/marks")
    assert dataset.metadata["train"] + dataset.metadata["val"] == 24
    assert dataset.metadata["classes"] == 2


def test_again_it_finds_the_set(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(prepare_transfer, run_uri=run_there.uri, set_name="marks")
    assert outputs["dataset"]["uri"] == run_there.at("transfer/marks")


def test_an_unknown_set_is_one_line(run_there: Run, components: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        components.directly(prepare_transfer, run_uri=run_there.uri, set_name="flags")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: prepare flags: transfer set flags: the run's configuration does not have it; it has marks"
    ]
