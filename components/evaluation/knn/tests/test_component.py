"""k-NN: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.evaluation.knn import knn
from esvit_core.runs.run import Run

FIGURES = {f"knn/{k}{of}" for k in (1, 5) for of in ("", " (baseline)")}


def test_it_measures_both_networks(run_there: Run, components: Any) -> None:
    run_there.store.remove(run_there.at("evaluation/knn.json"))
    outputs, artifacts = components.directly(knn, run_uri=run_there.uri)
    assert outputs == (run_there.at("evaluation/knn.json"),)
    assert artifacts["metrics"].metadata.keys() == FIGURES
    result = run_there.store.get_json(run_there.at("evaluation/knn.json"))
    assert result["results"]["trained"]["knn/5"] == artifacts["metrics"].metadata["knn/5"]


def test_again_it_finds_the_result(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(knn, run_uri=run_there.uri)
    assert outputs["result"] == run_there.at("evaluation/knn.json")
    assert outputs["metrics"]["metadata"].keys() == FIGURES
