"""The recipe `auto` on a cluster: chosen by the step that prepares the data, for the pods of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.config.auto import split_recipe
from esvit_core.config.kubernetes_names import quantity_bytes
from esvit_core.config.parameters import compiled_sections_yaml, resolve
from esvit_core.errors import UserError
from esvit_core.planning.auto_pods import pod_facts, resolve_parameters
from esvit_core.storage import ObjectStore
from esvit_pipelines.settings import Settings, cluster_request


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    made = tmp_path_factory.mktemp("pods")
    images.folder(made / "images", ["a", "b"], 30)
    return made


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("auto", (None, None)),
        ("auto:hours=8", (None, 8.0)),
        ("grey", ("grey", None)),
        ("grey:hours=0.5", ("grey", 0.5)),
        ("demo", None),
        ("s3://bucket/recipe.yaml", None),
        ("{training: {epochs: 5}}", None),
    ],
)
def test_the_name_of_a_recipe_says_whether_it_is_chosen(recipe: str, parts: Any) -> None:
    assert split_recipe(recipe) == parts


@pytest.mark.parametrize("recipe", ["auto:8", "auto:hours=many", "auto:hours=-1", "grey:days=2", "auto:"])
def test_wrong_hours_are_one_line(recipe: str) -> None:
    with pytest.raises(UserError, match=r"expected (auto|grey), or (auto|grey):hours=H"):
        split_recipe(recipe)


def test_other_commands_say_that_they_do_not_choose() -> None:
    with pytest.raises(UserError, match="only `esvit run` and the pipeline pretrain choose a recipe"):
        Config.load("auto")


def test_facts_are_those_of_the_pods() -> None:
    processors = pod_facts(Config.load("{}", ["cluster.train.cpu_limit='6'", "cluster.train.memory_limit=12Gi"]))
    assert (processors.device, processors.cores, processors.memory) == ("cpu", 6, quantity_bytes("12Gi"))
    nodes = ["cluster.train.accelerators=4", "launch.scheduler=volcano", "launch.nodes=2"]
    gpus = pod_facts(Config.load("{}", nodes))
    assert (gpus.device, gpus.devices) == ("cuda", 8)


def test_the_step_chooses_and_settings_win(folder: Path, store_env: ObjectStore) -> None:
    compiled = compiled_sections_yaml(
        Config.load("{}", ["cluster.train.cpu_limit='2'", "cluster.train.memory_limit=8Gi"])
    )
    source = str(folder / "images")
    config, lines = resolve_parameters("auto", "training.epochs=3, seed=5", "", compiled, source, store_env)
    assert (config.recipe, config.training.epochs, config.seed) == ("auto", 3, 5)
    assert config.cluster.train.memory_limit == "8Gi"
    assert any("batch" in line for line in lines)
    again, _ = resolve_parameters("auto", "training.epochs=3, seed=5", "", compiled, source, store_env)
    assert again == config
    grey, _ = resolve_parameters("grey:hours=2", "", "", compiled, source, store_env)
    assert grey.recipe == "grey" and grey.augment.hue == 0
    with pytest.raises(UserError, match="the section cluster was fixed when the pipeline was compiled"):
        resolve_parameters("auto", "cluster.train.cpu=2", "", compiled, source, store_env)


def test_another_recipe_is_resolved_as_before(folder: Path, store_env: ObjectStore) -> None:
    config, lines = resolve_parameters("demo", "seed=2", "", "", str(folder / "images"), store_env)
    assert config == resolve("demo", "seed=2") and lines == []


def test_pods_are_sized_for_the_largest_choice() -> None:
    def request(*overrides: str, recipe: str = "auto") -> Any:
        return cluster_request(Settings("", recipe, overrides, (), Path("out"), None))

    plain = request("training.epochs=5")
    assert plain.parameters["recipe"] == "auto" and plain.parameters["settings"] == "training.epochs=5"
    assert plain.complete and plain.explicit
    gpus = request("cluster.train.accelerators=8", recipe="auto:hours=100")
    assert gpus.config.model.arch == "swin_tiny_w7" and gpus.config.cluster.train.accelerators == 8
    assert gpus.parameters == {"recipe": "auto:hours=100", "settings": "", "transfer": ""}
