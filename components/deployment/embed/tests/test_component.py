"""Embed, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

import pytest

from esvit_components.deployment.embed import embed
from esvit_core.runs.run import Run

DESTINATION = "s3://esvit/features/images"


def test_features_are_published_and_found_again(
    run_there: Run, finished_run: Any, components: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run_there.store.remove_prefix(DESTINATION)
    data = str(finished_run.folder / "images")
    arguments = {"backbone": run_there.at("backbone"), "data": data, "destination": DESTINATION, "regions": True}
    outputs = components.through_kfp(embed, **arguments)
    assert outputs["features"]["metadata"]["images"] == 48 and outputs["features"]["metadata"]["bad"] == 0
    assert set(run_there.store.read_manifest(DESTINATION)["files"]) == {"features.parquet"}
    _, artifacts = components.directly(embed, **arguments)
    assert artifacts["features"].uri == DESTINATION
    assert f"already done: found {DESTINATION}" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        components.directly(embed, **{**arguments, "regions": False})
    assert "choose another destination" in capfd.readouterr().err
