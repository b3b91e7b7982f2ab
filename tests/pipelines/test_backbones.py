"""`esvit export` and `esvit embed` on the backbone of a finished run; the printed lines work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esvit_core.config import ModelConfig
from esvit_core.errors import UserError
from esvit_core.models import create_backbone
from esvit_core.runs.run import Run
from esvit_core.storage.address import VARIABLES
from esvit_core.weights.backbone import load_backbone
from esvit_pipelines.cli.main import app


def esvit(*arguments: object) -> None:
    """Run the command line in this process."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def pasted(output: str) -> dict[str, Any]:
    """Run the lines after `Use it:` and return their variables."""
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in output.partition("Use it:\n")[2].splitlines()), names)
    return names


@pytest.fixture
def backbone(run_there: Run) -> str:
    return run_there.at("backbone")


@pytest.mark.parametrize("format", ["safetensors", "timm"])
def test_the_printed_lines_load_the_export(
    format: str, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "an export"
    esvit("export", backbone, "--format", format, "--out", out)
    output = capsys.readouterr().out
    assert output.startswith(f"{out}  ") and "largest difference of a view feature" in output
    assert pasted(output)["view"].shape == (1, 32)


@pytest.mark.parametrize("out", ["features.parquet", "features.npz"])
def test_the_printed_lines_read_the_features(
    out: str, backbone: str, finished_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    esvit("embed", "--model", backbone, "--data", finished_run.folder / "images", "--out", tmp_path / out, "--regions")
    output = capsys.readouterr().out
    assert "48 images, view feature 32, regions 4 x 4 x 32, computed in float32" in output
    made = pasted(output)
    view, regions = (made.get(name, made.get("features", {}).get(name)) for name in ("view", "regions"))
    assert view.shape == (48, 32) and regions.shape == (48, 4, 4, 32)
    np.testing.assert_allclose(regions.astype(np.float32).mean((1, 2)), view, atol=5e-3)


def test_the_exported_checkpoint_of_a_run_loads_in_the_published_code(
    run_there: Run, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    esvit("export", backbone, "--format", "published", "--out", tmp_path / "a.pth")
    assert "epoch 2: student, teacher and centers were read back bit for bit" in capsys.readouterr().out
    esvit("export", run_there.uri, "--format", "published", "--out", tmp_path / "b.pth")
    a, b = (torch.load(tmp_path / name, weights_only=False) for name in ("a.pth", "b.pth"))
    assert a.keys() == b.keys() >= {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"}
    assert a["epoch"] == 2 and all(name.startswith("module.") for name in a["student"])


def test_a_weights_file_of_the_published_code_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = create_backbone(ModelConfig(arch="deit_tiny"))
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in network.state_dict().items()}}, tmp_path / "a.pth"
    )
    esvit("export", tmp_path / "a.pth", "--format", "safetensors", "--out", tmp_path / "a")
    assert "deit_tiny" in capsys.readouterr().out
    assert torch.equal(load_backbone(tmp_path / "a").cls_token, network.cls_token)


def test_runs_option_selects_the_store(
    run_there: Run, finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    esvit("export", run_there.at("baseline"), "--format", "safetensors", "--out", tmp_path / "b", "--runs", "out")
    assert (tmp_path / "b" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "champion", "--format", "onnx", "--out", "a.onnx", "--runs", "nowhere"],
            "name the folder of a run",
        ),
        (["export", "no folder", "--format", "onnx", "--out", "a.onnx"], "backbone no folder: no such folder"),
        (["export", "no folder", "--format", "onx", "--out", "a"], "--format onx: unknown; expected one of"),
        (["export", ".", "--format", "published", "--out", "a.pth"], r"name the run, s3://bucket/runs/<run id>"),
        (["embed", "--model", "no folder", "--data", "nowhere", "--out", "a.npz"], "nowhere: does not exist"),
        (["embed", "--model", "no folder", "--data", "nowhere", "--out", "a.csv"], "ends in .parquet or .npz"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "ESVIT_STORE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        esvit(*arguments)
    assert not list(tmp_path.iterdir())
