"""The recipe `auto` with initial weights: their network, crops that the time allows, and settings that protect them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_core.config import Config, ModelConfig
from esvit_core.errors import UserError
from esvit_core.models import create_backbone
from esvit_core.planning.auto_recipe import resolve_auto
from esvit_core.planning.start_network import StartNetwork, find_network, needs_store
from esvit_core.storage import ObjectStore
from esvit_core.weights.backbone import describe_backbone, save_backbone, write_backbone
from esvit_core.weights.timm_names import to_timm

SMALL = Config.from_mapping(
    {
        "model": {
            **{"arch": "swin", "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]},
            "window_size": 4,
        },
        "augment": {"global_crops": {"size": 48}},
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    made = tmp_path_factory.mktemp("start")
    images.folder(made / "images", ["a", "b"], 30)
    backbone = create_backbone(SMALL.model, 48)
    write_backbone(made / "backbone", backbone, describe_backbone(backbone, SMALL))
    return made


def test_a_folder_names_its_network(folder: Path) -> None:
    start = find_network(str(folder / "backbone"), "esvit", None)
    assert (start.model["embed_dim"], start.side) == (8, 48)
    found = resolve_auto(str(folder / "images"), [f"init.source={folder / 'backbone'}"])
    config = found.config
    assert config.model.model_dump(exclude={"drop_path"}) == SMALL.model.model_dump(exclude={"drop_path"})
    assert config.augment.global_crops.size == 48
    plain = resolve_auto(str(folder / "images")).config
    assert config.optimizer.lr == pytest.approx(plain.optimizer.lr / 10)
    assert (config.optimizer.layer_decay, config.optimizer.freeze_backbone_epochs) == (0.9, 1)
    assert (plain.optimizer.layer_decay, plain.optimizer.freeze_backbone_epochs) == (1, 0)
    assert any("protection" in line for line in found.lines())


def test_a_run_and_a_pointer_name_their_network(store_env: ObjectStore) -> None:
    run = store_env.uri("runs/a")
    save_backbone(store_env, f"{run}/backbone", create_backbone(SMALL.model, 48), SMALL)
    store_env.swap_pointer(store_env.uri("pointers/champion"), {"run": run, "backbone": f"{run}/backbone"}, None)
    for source in (run, f"{run}/backbone", "champion"):
        assert needs_store(source)
        assert find_network(source, store_env.bucket, store_env).side == 48


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("swin_tiny_patch4_window7_224", "swin_tiny_w7"),
        ("vit_small_patch16_224.dino", "deit_small"),
        ("resnet50", "resnet50"),
        ("convnext_atto", "timm:convnext_atto"),
    ],
)
def test_a_network_of_timm_is_ours_where_there_is_one(name: str, arch: str) -> None:
    start = find_network(f"timm:{name}:somewhere.pth", "esvit", None)
    assert (start.model, start.side) == ({"arch": arch}, 224)
    assert not needs_store(f"timm:{name}")


@pytest.mark.parametrize("side", [224, 96])
def test_the_network_of_a_file_is_recognized_at_any_image_size(side: int, tmp_path: Path) -> None:
    state = create_backbone(ModelConfig(arch="deit_tiny"), side).state_dict()
    torch.save({"state_dict": {f"model.{n}": v for n, v in to_timm("deit_tiny", state).items()}}, tmp_path / "a.ckpt")
    start = find_network(str(tmp_path / "a.ckpt"), "esvit", None)
    assert (start.model, start.side) == ({"arch": "deit_tiny"}, side)


def test_a_network_that_is_not_known_has_to_be_named(folder: Path, tmp_path: Path) -> None:
    torch.save(create_backbone(SMALL.model, 48).state_dict(), tmp_path / "own.pth")
    with pytest.raises(UserError, match=r"match no known architecture.*model\.arch.*--init timm:NAME:"):
        find_network(str(tmp_path / "own.pth"), "esvit", None)
    model = "model={arch: swin, patch_size: 4, embed_dim: 8, depths: [1, 1], num_heads: [1, 1], window_size: 4}"
    config = resolve_auto(str(folder / "images"), [f"init.source={tmp_path / 'own.pth'}", model]).config
    assert config.model.embed_dim == 8 and config.optimizer.layer_decay == 0.9


def test_heads_of_another_run_need_its_recipe(folder: Path) -> None:
    with pytest.raises(UserError, match=r"init\.load heads: recipe auto starts from a backbone"):
        resolve_auto(str(folder / "images"), ["init.source=champion", "init.load=heads"])


def test_crops_follow_the_image_size_of_the_weights_and_the_images() -> None:
    large = StartNetwork({"arch": "swin_tiny_w7"}, 224)
    assert [side for side, _ in large.crops(500)] == [224, 112, 64]
    assert [side for side, _ in large.crops(64)] == [112, 64]
    assert [side for side, _ in large.crops(8)] == [64]
    assert [side for side, _ in StartNetwork({}, 48).crops(500)] == [48]
