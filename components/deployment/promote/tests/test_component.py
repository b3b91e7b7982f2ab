"""Promote, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.deployment.promote import promote
from esvit_core.runs.run import Run


def test_it_decides_and_says_why(run_there: Run, components: Any) -> None:
    run_there.store.remove(run_there.at("promotion.json"))
    run_there.store.remove("s3://esvit/pointers/champion")
    (promoted, reason), artifacts = components.directly(promote, run_uri=run_there.uri)
    difference = run_there.store.get_json(run_there.at("evaluation/knn.json"))["differences"]["knn/5"]
    assert promoted == (difference["decision"] == "better")
    assert "knn/5" in reason
    assert artifacts["decision"].uri == run_there.at("promotion.json")
    pointer = run_there.store.read_pointer("s3://esvit/pointers/champion")
    assert (pointer is not None) == promoted


def test_again_it_finds_the_decision(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(promote, run_uri=run_there.uri)
    assert outputs["reason"] == run_there.store.get_json(run_there.at("promotion.json"))["reason"]
    assert outputs["decision"]["uri"] == run_there.at("promotion.json")
