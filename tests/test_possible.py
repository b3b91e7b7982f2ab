"""Mistakes that used to show after the training are refused before anything is prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_core.config import Config
from esvit_core.config.recipes import preset_names
from esvit_core.errors import UserError
from esvit_core.models.factory import create_backbone
from esvit_core.planning.feasibility import require_metric, require_possible
from esvit_core.weights.backbone import describe_backbone, write_backbone

IMPOSSIBLE = {
    "training.processes=0": r"training\.processes",
    "training.processes=-1": r"training\.processes",
    "evaluation.knn_k=[0]": r"evaluation\.knn_k",
    "evaluation.knn_k=[5, 5]": r"knn_k: expected distinct numbers",
    "promotion.metric=knn/7": r"promotion\.metric knn/7: the run does not measure it.*expected one of knn/10, knn/20",
    "promotion.metric=transfer/cars": r"promotion\.metric transfer/cars: the run does not measure it",
    "promotion.metric=linera": r"did you mean 'linear'",
    "evaluation.knn_k=[5]": r"promotion\.metric knn/20: .*did you mean 'knn/5'",
    "training.processes=65": r"training\.batch_size 64: expected at least training\.processes, 65",
    "model.arch=swin_tony_w7": r"model\.arch swin_tony_w7: unknown, did you mean 'swin_tiny_w7'",
    "model.num_heads=[3, 4]": r"model swin: ",
    "model.depths=[2, 2, 2]": r"model swin: ",
    "model.stages=l1": r"model\.stages: swin has no such setting",
}


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_what_is_impossible_is_told_with_the_name_of_the_setting(change: str) -> None:
    with pytest.raises(UserError, match=IMPOSSIBLE[change]):
        require_possible(Config.load("demo", [change]))


@pytest.mark.parametrize("name", ["demo", "imagenet_vil_2262", "imagenet_cvt_tiny", "imagenet_resnet50"])
def test_a_recipe_of_every_kind_of_network_is_possible(name: str) -> None:
    require_possible(Config.load(name))


@pytest.mark.parametrize("name", preset_names())
def test_every_recipe_measures_the_metric_that_decides(name: str) -> None:
    require_metric(Config.load(name))


def test_a_metric_of_a_transfer_set_that_is_there_is_possible() -> None:
    sets = "evaluation.transfer=[{name: cars, source: s3://b/cars}]"
    require_metric(Config.load("demo", [sets, "promotion.metric=transfer/cars"]))


@pytest.mark.parametrize("settings", ["promotion.metric=knn/7", "model.num_heads=[3, 4]"])
def test_the_first_step_refuses_it_and_writes_nothing(
    settings: str, store_env: Any, images: Any, tmp_path: Path, components: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from esvit_components.data.prepare_data import prepare_data

    folder = str(images.folder(tmp_path / "images", ["a"], 6))
    with pytest.raises(SystemExit) as stop:
        components.directly(
            prepare_data, source=folder, recipe="demo", settings=f"{settings}, bucket={store_env.bucket}"
        )
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: prepare data: ")
    assert list(store_env.list(f"s3://{store_env.bucket}")) == []


def test_initial_weights_that_cannot_be_read_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    torch.save({"layers.0.blocks.0.norm1.weight": torch.zeros(5)}, tmp_path / "other.pth")
    for source, message in (
        (tmp_path / "garbage.pth", "not a file of torch.save"),
        (tmp_path / "other.pth", "do not fit"),
        ("timm:no-such-network", "timm has no such network"),
    ):
        with pytest.raises(UserError, match=message):
            require_possible(Config.load("demo", [f"init.source={source}"]))


def test_initial_weights_that_fit_or_are_elsewhere_are_possible(tmp_path: Path) -> None:
    config = Config.load("demo")
    network = create_backbone(config.model, config.augment.global_crops.size, drop_path=0.0)
    write_backbone(tmp_path / "backbone", network, describe_backbone(network, config))
    for source in (tmp_path / "backbone", "timm:resnet18", "s3://bucket/runs/a"):
        require_possible(Config.load("demo", [f"init.source={source}"]))
    with pytest.raises(UserError, match=r"it has no heads; set init\.load=backbone"):
        require_possible(Config.load("demo", [f"init.source={tmp_path / 'backbone'}", "init.load=heads"]))
