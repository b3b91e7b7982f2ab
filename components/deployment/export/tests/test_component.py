"""Export, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

import pytest

from esvit_components.deployment.export import export
from esvit_core.runs.run import Run

DESTINATION = "s3://esvit/exports/onnx"


def test_an_onnx_file_with_its_differences(run_there: Run, components: Any) -> None:
    run_there.store.remove_prefix(DESTINATION)
    arguments = {"backbone": run_there.at("backbone"), "format": "onnx", "destination": DESTINATION, "regions": True}
    _, artifacts = components.directly(export, **arguments)
    assert artifacts["exported"].uri == DESTINATION
    facts = artifacts["exported"].metadata
    assert facts["view_difference"] < 1e-4 and facts["regions_difference"] < 1e-4
    assert set(run_there.store.read_manifest(DESTINATION)["files"]) == {"backbone.onnx"}


def test_again_it_finds_the_export(run_there: Run, components: Any, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = {"backbone": run_there.at("backbone"), "format": "timm", "destination": "s3://esvit/exports/timm"}
    run_there.store.remove_prefix(arguments["destination"])
    components.directly(export, **arguments)
    outputs = components.through_kfp(export, **arguments)
    assert outputs["exported"]["metadata"]["backbone"] == run_there.at("backbone")
    assert "already done: found s3://esvit/exports/timm" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        components.directly(export, **{**arguments, "backbone": run_there.at("baseline")})
    assert "choose another destination" in capfd.readouterr().err
