"""Import weights of other projects as backbones and checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from esvit_core.config import Config, ModelConfig
from esvit_core.errors import UserError
from esvit_core.models import create_backbone
from esvit_core.models.multicrop import build_network
from esvit_core.training.initial_weights import read_source
from esvit_core.weights.backbone import load_backbone
from esvit_core.weights.esvit_checkpoint import write_published_checkpoint
from esvit_core.weights.import_checkpoint import import_weights
from esvit_core.weights.timm_names import to_timm
from esvit_pipelines.cli.import_command import import_file
from esvit_pipelines.cli.main import app

SMALL = {
    "model": {"arch": "swin", "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "augment": {"global_crops": {"size": 32}},
    "head": {"out_dim": 12, "hidden_dim": 10, "bottleneck_dim": 6},
}


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return create_backbone(ModelConfig(arch="deit_tiny")).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_architecture_is_found_by_the_weights(tiny, tmp_path):
    """As timm has it, with a classifier, and as published, with the command line."""
    whole = {**to_timm("deit_tiny", tiny), "head.weight": torch.zeros(3, 192), "head.bias": torch.zeros(3)}
    safetensors.torch.save_file(whole, tmp_path / "timm.safetensors")
    imported = import_weights(str(tmp_path / "timm.safetensors"), str(tmp_path / "a"))
    assert imported.arch == "deit_tiny" and "ignored: head.bias, head.weight" in imported.messages
    assert same(load_backbone(tmp_path / "a" / "backbone").state_dict(), tiny)

    payload = {
        "teacher": tiny,
        "args": argparse.Namespace(lr=0.002, use_dense_prediction=False, epochs=100),
        "epoch": 7,
    }
    torch.save(payload, tmp_path / "published.pth")
    imported = import_weights(str(tmp_path / "published.pth"), str(tmp_path / "b"))
    description: Any = load_backbone(tmp_path / "b" / "backbone").backbone_config
    assert (imported.arch, description["recipe"]) == ("deit_tiny", "imported")
    assert description["imported"]["kind"] == "state dict (teacher)" and len(description["imported"]["sha256"]) == 64
    assert "trained for 7 epochs" in imported.messages


def small_checkpoint(path: Path) -> tuple[Config, dict[str, Any]]:
    config = Config.from_mapping(SMALL)
    student, teacher = build_network(config), build_network(config)
    optimizer = torch.optim.AdamW(student.parameters())
    centers = {"center_view.value": torch.ones(1, 12), "center_region.value": torch.ones(1, 12)}
    states = {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "objective": centers,
        "optimizer": optimizer.state_dict(),
    }
    write_published_checkpoint(path, states, config, 3)
    return config, states


def test_the_students_backbone_can_be_taken(tmp_path):
    config, states = small_checkpoint(tmp_path / "checkpoint.pth")
    for network in ("teacher", "student"):
        out = tmp_path / network
        import_weights(str(tmp_path / "checkpoint.pth"), str(out), config=config, network=network)
        expected = {n.removeprefix("backbone."): v for n, v in states[network].items() if n.startswith("backbone.")}
        assert same(load_backbone(out / "backbone").state_dict(), expected)


def test_a_checkpoint_in_the_store_holds_what_the_file_held(store_env, tmp_path):
    config, states = small_checkpoint(tmp_path / "checkpoint.pth")
    out = store_env.uri("imported")
    for _ in range(2):
        imported = import_weights(str(tmp_path / "checkpoint.pth"), out, store_env, config, checkpoint=True)
    assert same(
        load_backbone(imported.backbone, store_env).state_dict(),
        load_backbone(f"{out}/backbone", store_env).state_dict(),
    )
    init = config.init.model_copy(update={"source": imported.checkpoint, "load": "all"})
    snapshot = read_source(init, config, store_env)
    assert (
        snapshot.epoch == 3 and same(snapshot.student, states["student"]) and same(snapshot.teacher, states["teacher"])
    )
    assert same(snapshot.centers, states["objective"])


def test_errors_are_reported(tiny, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({name: value for name, value in tiny.items() if "blocks.11" not in name}, path)
    with pytest.raises(UserError, match="match no known architecture at its default size; use --arch"):
        import_weights(path, str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"do not fit model.arch deit_tiny; missing: blocks\.11\.\* \(12\)\."):
        import_weights(path, str(tmp_path / "a"), config=Config.from_mapping({"model": {"arch": "deit_tiny"}}))
    torch.save(tiny, path)
    with pytest.raises(UserError, match=r"do not fit model.arch swin; .*They fit deit_tiny\."):
        import_weights(path, str(tmp_path / "a"), config=Config.from_mapping(SMALL))
    with pytest.raises(UserError, match="a checkpoint can only be written to the object store"):
        import_weights(path, str(tmp_path / "a"), checkpoint=True)
    with pytest.raises(UserError, match="it contains one network, no student"):
        import_weights(path, str(tmp_path / "a"), network="student")
    import_weights(path, str(tmp_path / "a"))
    with pytest.raises(UserError, match="backbone already exists"):
        import_weights(path, str(tmp_path / "a"))


def test_the_command_lists_what_it_imported(tiny, tmp_path):
    torch.save({"module.backbone." + name: value for name, value in tiny.items()}, tmp_path / "weights.pth")
    done = CliRunner().invoke(app, ["import", str(tmp_path / "weights.pth"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("state dict, deit_tiny: the only network's backbone, 150 entries\n")
    assert f"esvit_core.load_backbone('{tmp_path}/out/backbone')" in done.stdout


def test_conflicting_options_are_reported(tmp_path):
    for options, message in (
        (("deit_tiny", "demo", ()), "give only one of --arch and --recipe"),
        ((None, None, ("model.depths=[1]",)), "give --recipe too"),
        ((None, None, ()), "the file does not exist; expected a .pth"),
    ):
        with pytest.raises(UserError, match=message):
            import_file(str(tmp_path / "none.pth"), str(tmp_path / "a"), *options, student=False, checkpoint=False)
