"""Compare with the champion: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from esvit_components.evaluation.compare_champion import compare_champion
from esvit_core.runs.run import RETRAINING, Run

POINTER = "s3://esvit/pointers/champion"


@pytest.fixture
def challenger(run_there: Run) -> Iterator[Run]:
    """The finished run as a retraining that is not decided, and that started from the champion."""
    store, decision = run_there.store, run_there.at("promotion.json")
    kept = {uri: store.get_bytes(uri) for uri in (decision, POINTER) if store.exists(uri)}
    store.remove(decision)
    store.put_json(run_there.at(RETRAINING), {})
    store.put_json(POINTER, {"run": "s3://esvit/runs/start", "backbone": run_there.at("baseline")})
    yield run_there
    for uri in (run_there.at(RETRAINING), run_there.at("comparison/start.json"), POINTER):
        store.remove(uri)
    for uri, data in kept.items():
        store.put_bytes(uri, data)


def test_a_run_that_is_decided_has_nothing_to_compare(run_there: Run, components: Any) -> None:
    (address,), artifacts = components.directly(compare_champion, run_uri=run_there.uri, results=["a"])
    assert address == "" and artifacts["metrics"].metadata == {}


def test_the_champion_s_figures_on_the_run_s_images(challenger: Run, components: Any) -> None:
    outputs = components.through_kfp(compare_champion, run_uri=challenger.uri, results=["a"])
    assert outputs["result"] == challenger.at("comparison/start.json")
    own = challenger.store.get_json(challenger.at("evaluation/knn.json"))["results"]["baseline"]
    assert own.items() <= outputs["metrics"]["metadata"].items()
