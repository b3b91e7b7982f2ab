"""Transfer: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.evaluation.transfer import transfer
from esvit_core.runs.run import Run

FIGURES = {"transfer/marks", "transfer/marks (baseline)"}


def test_it_measures_both_networks(run_there: Run, components: Any) -> None:
    run_there.store.remove(run_there.at("evaluation/transfer-marks.json"))
    outputs, artifacts = components.directly(transfer, run_uri=run_there.uri)
    assert outputs == (run_there.at("evaluation"),)
    assert run_there.store.exists(run_there.at("evaluation/transfer-marks.json"))
    assert artifacts["metrics"].metadata.keys() == FIGURES


def test_again_it_finds_the_result(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(transfer, run_uri=run_there.uri)
    assert outputs["result"] == run_there.at("evaluation")
    assert outputs["metrics"]["metadata"].keys() == FIGURES
