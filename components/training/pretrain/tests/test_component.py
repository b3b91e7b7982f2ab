"""Pre-train, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

from esvit_components.training.pretrain import pretrain
from esvit_core.runs.run import Run


def test_it_goes_on_from_the_checkpoint_and_publishes_the_teacher(run_there: Run, components: Any) -> None:
    before = run_there.store.get_bytes(run_there.at("backbone/model.safetensors"))
    run_there.store.remove(run_there.at("training/summary.json"))
    run_there.store.remove_prefix(run_there.at("backbone"))
    _, artifacts = components.directly(pretrain, run_uri=run_there.uri)
    assert artifacts["model"].uri == run_there.at("backbone")
    assert artifacts["metrics"].metadata["epochs"] == 2
    assert run_there.store.read_manifest(run_there.at("backbone")) is not None
    assert run_there.store.get_bytes(run_there.at("backbone/model.safetensors")) == before


def test_a_finished_training_is_found(run_there: Run, components: Any) -> None:
    outputs = components.through_kfp(pretrain, run_uri=run_there.uri)
    assert outputs["model"]["uri"] == run_there.at("backbone")
    assert outputs["model"]["metadata"]["arch"] == "swin"
    assert outputs["metrics"]["metadata"]["images"] == 64
