"""Take backbone: called directly, and run by kfp.local, on a real object store."""

from __future__ import annotations

from typing import Any

import pytest

from esvit_components.data.prepare_data import prepare_data
from esvit_components.evaluation.import_backbone import import_backbone
from esvit_core.runs.run import Run, open_run


def test_a_run_is_measured_again_as_a_run_of_its_own(run_there: Run, components: Any) -> None:
    recipe = run_there.config.to_yaml()
    settings = "seed=3, bucket=measured"  # the session's store stays as its run left it
    arguments = {"backbone": run_there.uri, "source": "images", "recipe": recipe, "settings": settings}
    (uri,), artifacts = components.directly(import_backbone, **arguments)
    assert uri.startswith("s3://measured/runs/evaluate-micro-")
    model = artifacts["model"]
    assert model.uri == model.metadata["uri"] == f"{uri}/backbone"
    assert model.metadata["taken_from"] == run_there.at("backbone")
    assert components.through_kfp(import_backbone, **arguments)["run_uri"] == uri
    # The data are prepared for the run that is there, with its configuration.
    (prepared,), _ = components.directly(prepare_data, source="images", run_uri=uri)
    assert prepared == uri and open_run(uri).store.exists(f"{uri}/data/manifest.json")


def test_a_backbone_that_is_nowhere_is_told_in_a_line(
    run_there: Run, components: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        components.directly(import_backbone, backbone="nobody", source="images", recipe="demo")
    assert stop.value.code == 2 and "nobody: no such file" in capsys.readouterr().err
