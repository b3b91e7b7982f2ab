"""Linear probe: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.evaluation.linear_probe import linear_probe
from esvit_core.runs.run import Run


def test_it_measures_and_logs_the_confusion(run_there: Run, components: Any) -> None:
    run_there.store.remove(run_there.at("evaluation/linear.json"))
    outputs, artifacts = components.directly(linear_probe, run_uri=run_there.uri)
    assert outputs == (run_there.at("evaluation/linear.json"),)
    assert {"linear", "linear (baseline)"} <= artifacts["metrics"].metadata.keys()
    confusion = artifacts["confusion"].metadata["confusionMatrix"]
    assert [c["displayName"] for c in confusion["annotationSpecs"]] == ["bars", "lines", "waves"]
    held_out = run_there.store.get_json(run_there.at("data/manifest.json"))["splits"]["val"]["samples"]
    assert sum(sum(row["row"]) for row in confusion["rows"]) == held_out


def test_again_it_finds_the_result(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(linear_probe, run_uri=run_there.uri)
    assert outputs["result"] == run_there.at("evaluation/linear.json")
    assert outputs["confusion"]["metadata"]["confusionMatrix"]["rows"]
