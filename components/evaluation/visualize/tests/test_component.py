"""Images: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.evaluation.visualize import visualize
from esvit_core.runs.run import Run


def test_it_draws_and_measures(run_there: Run, components: Any) -> None:
    run_there.store.remove_prefix(run_there.at("visualization"))
    outputs, artifacts = components.directly(visualize, run_uri=run_there.uri)
    assert outputs == (run_there.at("visualization/visualization.json"),)
    assert artifacts["drawings"].uri == run_there.at("visualization")
    assert {"correspondence", "correspondence (baseline)"} <= artifacts["metrics"].metadata.keys()
    drawn = run_there.store.get_json(outputs[0])["images"]
    assert drawn and run_there.store.get_bytes(run_there.at("visualization", drawn[0]["file"])).startswith(b"\x89PNG")


def test_again_it_finds_them(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(visualize, run_uri=run_there.uri)
    assert outputs["drawings"]["uri"] == run_there.at("visualization")
