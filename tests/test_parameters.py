"""A configuration as a pipeline's parameters, and back: nothing is lost, null included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from esvit_core.config import Config
from esvit_core.config.parameters import (
    COMPILED_SECTIONS,
    compiled_sections_yaml,
    join_items,
    resolve,
    split_items,
    to_parameters,
    with_transfer,
)
from esvit_core.config.recipes import preset_names
from esvit_core.errors import UserError

SUBMIT_DOC = Path(__file__).parent.parent / "docs" / "submit.md"
CHANGES = [
    "promotion.max_loss=null",
    "diagnostics.entropy_stop=null",
    "augment.policy=deit",
    "augment.local_crops=[{size: 16, number: 2}, {size: 12, number: 1}]",
    "evaluation.knn_k=[1, 5]",
    "launch={scheduler: volcano, nodes: 4, env: {NCCL_DEBUG: INFO}}",
    "cluster.train.cpu_limit=null",
    "bucket=other",
    "training.checkpoint_minutes=0.5",
]


@pytest.mark.parametrize(
    ("line", "items"),
    [
        ("", []),
        ("training.epochs=50, seed=1", ["training.epochs=50", "seed=1"]),
        ("training.epochs=50 seed=1", ["training.epochs=50", "seed=1"]),
        ("a=1,b=2,\n c=3 ,", ["a=1", "b=2", "c=3"]),
        ("a.b = 5, c =6", ["a.b=5", "c=6"]),
        ("a=[1, 2],b={x: [1, 2], y: 'a, b'} c=3", ["a=[1, 2]", "b={x: [1, 2], y: 'a, b'}", "c=3"]),
        ("a='x, y' b=\"it's\"", ["a='x, y'", 'b="it\'s"']),
        ("'a=x y', \"b=1 2\"", ["a=x y", "b=1 2"]),
        ("a=s3://bucket/o'brien b=2", ["a=s3://bucket/o'brien", "b=2"]),
    ],
)
def test_items_have_commas_or_spaces_between_and_brackets_and_quotes_hold_together(line: str, items: list[str]) -> None:
    assert split_items(line, "settings") == items


@pytest.mark.parametrize("line", ["a=[1, 2", "a='x y", "a={b: [1}", 'a="'])
def test_what_is_not_closed_is_told(line: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"settings {line}: ")):
        split_items(line, "settings")


@pytest.mark.parametrize("items", [["a=1", "b=[1, 2]"], ["a=it's, here", "b=x y"], ["a='", 'b="x" y', "c=''"], []])
def test_a_line_made_of_items_splits_into_them(items: list[str]) -> None:
    assert split_items(join_items(items), "settings") == items


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_named_and_comes_back(name: str) -> None:
    config = Config.load(name)
    assert (to_parameters(config).recipe, to_parameters(config).settings) == (name, "")


@pytest.mark.parametrize("changes", [[], *([change] for change in CHANGES), CHANGES])
@pytest.mark.parametrize("recipe", ["demo", "imagenet_swin_tiny_w7", None])
def test_every_configuration_comes_back(recipe: str | None, changes: list[str]) -> None:
    config = Config.load(recipe, changes) if recipe else resolve("{recipe: own}", join_items(changes))
    config = with_transfer(config, ["marks=a folder/marks.zip", "flags=s3://b/flags"], "transfer")
    made = to_parameters(config)
    assert resolve(made.recipe, made.settings, made.transfer) == config
    assert "\n" not in made.recipe + made.settings + made.transfer, "a form's field holds one line"
    assert "{{" not in made.recipe + made.settings, "Argo would take it for a template"
    assert made.transfer == "'marks=a folder/marks.zip', flags=s3://b/flags"


def test_transfer_sets_with_a_metric_of_their_own_come_back_too() -> None:
    sets = [{"name": "pets", "source": "s3://b/pets", "metric": "mean_per_class"}]
    config = Config.load("demo", [f"evaluation.transfer={sets}"])
    made = to_parameters(config)
    assert made.transfer == "" and resolve(made.recipe, made.settings) == config
    moved = resolve(made.recipe, made.settings, "pets=s3://c/pets").evaluation.transfer
    assert [(s.source, s.metric) for s in moved] == [("s3://c/pets", "mean_per_class")]


def test_where_a_compiled_pipeline_runs_is_held_fast_and_a_recipe_s_own_launch_comes_first() -> None:
    config = Config.load("demo", [*CHANGES, "cluster.image=registry.example/esvit:1"])
    made = to_parameters(config, without=COMPILED_SECTIONS)
    assert resolve(made.recipe, made.settings, "", compiled_sections_yaml(config)) == config
    other = resolve("{recipe: own, launch: {nodes: 2}}", "", "", compiled_sections_yaml(config))
    assert (other.launch.scheduler, other.launch.nodes) == ("volcano", 2) and other.launch.env == {"NCCL_DEBUG": "INFO"}
    assert other.cluster == config.cluster and other.training.epochs == 300
    assert compiled_sections_yaml(Config()) == "{}"
    with pytest.raises(UserError, match=r"settings cluster\.train\.cpu=8: .*fixed when the pipeline was compiled"):
        resolve("demo", "cluster.train.cpu=8", "", compiled_sections_yaml(config))
    with pytest.raises(UserError, match=r"launch\.scheduler local: the pipeline was compiled for volcano"):
        resolve("demo", "launch={}", "", compiled_sections_yaml(config))
    with pytest.raises(UserError, match=r"launch\.scheduler trainjob: the pipeline was compiled for local"):
        resolve("demo", "launch.scheduler=trainjob", "", compiled_sections_yaml(Config()))


def test_a_recipe_is_a_name_an_address_yaml_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("recipe: own\ntraining: {epochs: 7}\n")
    text = (tmp_path / "own.yaml").read_text()
    objects = {"s3://b/own.yaml": text.encode()}
    for recipe in (text, "{recipe: own, training: {epochs: 7}}", "s3://b/own.yaml", str(tmp_path / "own.yaml")):
        assert resolve(recipe, read=objects.__getitem__) == Config.from_yaml(text)
    for wrong, message in {
        "": r"recipe \(empty\): neither a preset nor",
        "dmo": "did you mean 'demo'",
        "training: {epochs: [": "not valid YAML",
        "{training: {epoch: 1}}": "unknown key 'training.epoch'",
        "- a\n- b": "expected a mapping",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve(wrong)


def test_a_wrong_setting_or_set_is_told_with_the_parameter_s_name() -> None:
    for settings, message in {
        "training.epoch=1": "settings training.epoch=1: unknown key",
        "seed": "settings seed: exp",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve("demo", settings)
    for transfer in ("digits", "digits=", "=s3://b/x"):
        with pytest.raises(UserError, match=rf"transfer {transfer}: expected NAME=SOURCE"):
            resolve("demo", "", transfer)


def test_the_documented_settings_leave_the_recipe_s_nulls_alone() -> None:
    """KFP has no null, and the nulls of a recipe were once hidden in a default that the user's own settings replaced."""
    (settings,) = set(re.findall(r"-p settings='([^']*)'", SUBMIT_DOC.read_text(encoding="utf-8")))
    recipe = Config.load("demo", ["promotion.max_loss=null", "diagnostics.entropy_stop=null"])
    made = to_parameters(Config.from_mapping(recipe.model_dump(mode="json") | {"recipe": "own"}))
    changed = resolve(made.recipe, settings)
    assert changed.training.epochs == 50
    assert changed.promotion.max_loss is None and changed.diagnostics.entropy_stop is None
    assert resolve("demo", settings).promotion == Config.load("demo").promotion
    assert yaml.safe_load(made.recipe)["promotion"] == {"max_loss": None}
