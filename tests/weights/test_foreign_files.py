"""Files as other tools write them: Lightning, timm's training script, torch.compile, DataParallel, transformers, users."""

from __future__ import annotations

import sys
import types
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm.utils
import torch
from torch import Tensor, nn

from esvit_core.config import ModelConfig
from esvit_core.errors import UserError
from esvit_core.models import create_backbone
from esvit_core.weights.fit import fit_weights, recognize_architecture
from esvit_core.weights.read_file import read_file, weights_address
from esvit_core.weights.resize_weights import resize_weights
from esvit_core.weights.snapshot import part_of
from esvit_core.weights.timm_names import to_timm

SWIN = ModelConfig(arch="swin", patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4)
VIT = ModelConfig(arch="deit_tiny")


def network(model: ModelConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    backbone = create_backbone(model, 16 if model.arch == "swin" else 32)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter)
    return backbone


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def lightning(state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``Trainer.save_checkpoint`` of a module with ``save_hyperparameters`` and a backbone in ``self.model``."""
    name = "lightning_fabric.utilities.data"
    module = types.ModuleType(name)
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": name})  # type: ignore[attr-defined]
    for part in ("lightning_fabric", "lightning_fabric.utilities"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    payload = {
        "epoch": 3,
        "global_step": 300,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**with_prefix("model.", state), "classifier.weight": torch.zeros(2, 3)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_path": "a.ckpt", "current_score": torch.tensor(0.5)}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": module.AttributeDict(lr=0.1),  # type: ignore[attr-defined]
    }
    torch.save(payload, path)
    monkeypatch.undo()


def timm_training(state: dict[str, Tensor], folder: Path) -> Path:
    """As timm's train.py writes it, with the moving average of the weights."""
    model, averaged = network(SWIN, seed=9), network(SWIN)
    averaged.load_state_dict(state)
    ema = timm.utils.ModelEmaV3(averaged)
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        Namespace(model="swin", lr=0.1),
        ema,
        checkpoint_dir=str(folder),
    )
    saver.save_checkpoint(0, metric=0.5)
    return folder / "last.pth.tar"


def written(how: str, state: dict[str, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the state of a backbone as a tool does."""
    path = folder / "weights.pth"
    match how:
        case "lightning":
            lightning(state, path, monkeypatch)
        case "lightning, student and teacher":
            other = with_prefix("student_backbone.", {name: value + 1 for name, value in state.items()})
            torch.save({"state_dict": {**other, **with_prefix("teacher_backbone.", state)}}, path)
        case "timm's train.py":
            return timm_training(state, folder)
        case "torch.compile":
            model = network(SWIN)
            model.load_state_dict(state)
            torch.save(torch.compile(model).state_dict(), path)
        case "DataParallel of torch.compile":
            model = network(SWIN)
            model.load_state_dict(state)
            torch.save({"model": nn.DataParallel(torch.compile(model)).state_dict()}, path)  # type: ignore[arg-type]
        case "safetensors":
            path = folder / "model.safetensors"
            safetensors.torch.save_file(with_prefix("encoder.", {n: v.contiguous() for n, v in state.items()}), path)
        case "names of timm":
            torch.save({"state_dict": with_prefix("backbone.", to_timm("swin", state))}, path)
        case _:
            torch.save({**with_prefix(how, state), "decoder.weight": torch.zeros(3)}, path)
    return path


TOOLS = [
    *(
        "lightning",
        "lightning, student and teacher",
        "timm's train.py",
        "torch.compile",
        "safetensors",
        "names of timm",
    ),
    *("DataParallel of torch.compile", "model.", "backbone.", "vit.", "encoder.", "net.module.", "model.encoder.vit."),
]


@pytest.mark.parametrize("how", TOOLS)
def test_a_backbone_is_found_in_the_file_of_a_tool(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = network(SWIN)
    expected = dict(backbone.state_dict())
    path = written(how, expected, tmp_path, monkeypatch)
    weights = part_of(read_file(path, "swin").teacher, "backbone")
    fresh = network(SWIN, seed=5)
    given = {name: value for name, value in weights.items() if name != "decoder.weight"}
    fresh.load_state_dict(fit_weights(fresh, given, str(path), "the network"))
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())


def huggingface(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The names of transformers' ViT and Swin, after its own conversion scripts from timm."""
    pairs = [
        *(("patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("patch_embed.norm.", "embeddings.norm.")),
        *(("pos_embed", "embeddings.position_embeddings"), ("cls_token", "embeddings.cls_token")),
        *((".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.self.")),
        *((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after.")),
        *((".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense.")),
    ]
    inner = ".attention.attention." if "cls_token" in state else ".attention.self."
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            before, _, kind = name.partition(".attn.qkv.")
            block = f"encoder.{before.replace('blocks', 'layer', 1) if 'cls_token' in state else before}"
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{prefix}{block}{inner}{part}.{kind}"] = third
            continue
        for timms, theirs in pairs:
            name = name.replace(timms, theirs)
        if name.startswith("blocks."):
            name = f"encoder.layer.{name.removeprefix('blocks.')}"
        elif name.startswith("layers."):
            name = f"encoder.{name}"
        elif name.startswith("norm."):
            name = f"layernorm.{name.removeprefix('norm.')}"
        found[prefix + name] = value
    return {**found, "classifier.weight": torch.zeros(2, 3)} if prefix else found


@pytest.mark.parametrize(("model", "prefix"), [(SWIN, "swin."), (VIT, "vit."), (VIT, ""), (SWIN, "")])
def test_the_names_of_transformers_are_read(model: ModelConfig, prefix: str, tmp_path: Path) -> None:
    backbone = network(model)
    state = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    safetensors.torch.save_file(huggingface(state, prefix), tmp_path / "model.safetensors")
    snapshot = read_file(tmp_path / "model.safetensors", model.arch)
    fresh = network(model, seed=5)
    fresh.load_state_dict(fit_weights(fresh, part_of(snapshot.teacher, "backbone"), "file", "the network"))
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    assert snapshot.ignored == (("classifier.weight",) if prefix else ())


def test_what_lies_beside_the_backbone_is_listed(tmp_path: Path) -> None:
    state = with_prefix("model.", network(SWIN).state_dict())
    beside = {"loss.center": torch.zeros(1), "head.fc.weight": torch.zeros(2), "head.fc.bias": torch.zeros(2)}
    torch.save({"state_dict": {**state, **beside}, "note": "x"}, tmp_path / "a.ckpt")
    assert read_file(tmp_path / "a.ckpt", "swin").ignored == ("loss.center", "head.* (2)", "note")


def test_sizes_that_follow_from_image_and_window_are_resized() -> None:
    small, large = network(VIT), create_backbone(VIT, 64)
    weights, resized = resize_weights(large.state_dict(), small.state_dict())
    assert resized == ["pos_embed 1x5x192 to 1x17x192"]
    large.load_state_dict(fit_weights(large, weights, "file", "the network"))
    assert torch.equal(large.pos_embed[:, 0], small.pos_embed[:, 0]), "the class token's is not a position"
    wide = create_backbone(SWIN.model_copy(update={"window_size": 8}), 32)
    weights, resized = resize_weights(wide.state_dict(), network(SWIN).state_dict())
    assert len(resized) == 3 and all("relative_position_bias_table" in change for change in resized)
    wide.load_state_dict(fit_weights(wide, weights, "file", "the network"))


def test_a_constant_embedding_stays_constant() -> None:
    there = {"pos_embed": torch.zeros(1, 50, 4), "a.relative_position_bias_table": torch.zeros(13**2, 2)}
    here = {"pos_embed": torch.full((1, 17, 4), 3.0), "a.relative_position_bias_table": torch.full((7**2, 2), 2.0)}
    resized, _ = resize_weights(there, here)
    torch.testing.assert_close(resized["pos_embed"], torch.full((1, 50, 4), 3.0))
    torch.testing.assert_close(resized["a.relative_position_bias_table"], torch.full((169, 2), 2.0))


def test_other_shapes_are_left_to_the_error() -> None:
    there = {"pos_embed": torch.zeros(1, 50, 4), "norm.weight": torch.zeros(4)}
    here = {"pos_embed": torch.zeros(1, 17, 6), "norm.weight": torch.zeros(6)}
    assert resize_weights(there, here) == (here, [])


def test_an_architecture_is_recognized_at_another_image_size() -> None:
    with torch.device("meta"):
        state = create_backbone(ModelConfig(arch="deit_small"), 96).state_dict()
    assert recognize_architecture(state) is None
    assert recognize_architecture(state, resizable=True) == "deit_small"


def test_without_network_access_the_file_to_fetch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from esvit_core.weights import read_file as module

    assert weights_address("swin_tiny_patch4_window7_224").endswith(
        "timm/swin_tiny_patch4_window7_224.ms_in1k/resolve/main/model.safetensors"
    )

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(module.timm, "create_model", no_network)
    with pytest.raises(UserError) as caught:
        module.from_timm_registry("swin_tiny_patch4_window7_224", "swin_tiny_w7")
    message = str(caught.value)
    assert "no route to host" in message and "model.safetensors" in message
    assert "timm:swin_tiny_patch4_window7_224:FILE" in message
