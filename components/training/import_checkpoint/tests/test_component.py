"""Import checkpoint, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_components.training.import_checkpoint import import_checkpoint
from esvit_core.runs.run import Run
from esvit_core.weights.backbone import load_backbone


@pytest.fixture
def file(run_there: Run, tmp_path: Path) -> str:
    """The run's backbone as a plain state dict in the store."""
    backbone = load_backbone(run_there.at("backbone"), run_there.store)
    torch.save({"teacher": backbone.state_dict()}, tmp_path / "weights.pth")
    run_there.store.put_file("s3://esvit/imported/weights.pth", tmp_path / "weights.pth")
    return "s3://esvit/imported/weights.pth"


def test_the_backbone_and_the_checkpoint_are_in_the_store(run_there: Run, components: Any, file: str) -> None:
    recipe = run_there.config.to_yaml()
    arguments = {"file": file, "out": "s3://esvit/imported/a", "recipe": recipe, "arch": ""}
    (backbone, checkpoint), artifacts = components.directly(import_checkpoint, **arguments)
    ours = load_backbone(run_there.at("backbone"), run_there.store).state_dict()
    theirs = load_backbone(backbone, run_there.store).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert artifacts["model"].uri == backbone == "s3://esvit/imported/a/backbone"
    assert set(run_there.store.read_manifest(checkpoint)["files"]) == {"teacher.pt"}
    again = components.through_kfp(import_checkpoint, **arguments)
    assert (again["backbone"], again["checkpoint"]) == (backbone, checkpoint)
