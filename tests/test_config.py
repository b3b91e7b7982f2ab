"""The configuration tree: YAML in and out, overrides, and what it says of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.config import Config, valid_keys
from esvit_core.errors import ERROR_FILE_VARIABLE, USER_ERROR_EXIT_CODE, UserError, step
from esvit_core.recipe_files import preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_yaml(name: str) -> None:
    config = Config.load(name)
    assert Config.from_yaml(config.to_yaml()) == config
    assert config.recipe == name


def test_the_defaults_are_the_published_imagenet_recipe() -> None:
    assert Config.load("imagenet_swin_tiny_w7", ["recipe=custom"]) == Config()


def test_overrides_reach_every_level_and_take_scientific_notation() -> None:
    config = Config.load(
        "demo", ["seed=7", "optimizer.lr=1e-3", "augment.local_crops.number=4", "model.depths=[2, 2, 6]"]
    )
    assert config.seed == 7
    assert config.optimizer.lr == pytest.approx(1e-3)
    assert config.augment.local_crops.number == 4
    assert config.augment.local_crops.size == Config.load("demo").augment.local_crops.size
    assert config.model.depths == (2, 2, 6)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.epoch=3", "did you mean 'training.epochs'?"),
        ("epochs=3", "did you mean 'training.epochs'?"),
        ("training.epochs=many", "training.epochs: input should be a valid integer"),
        ("training.epochs", "expected key=value"),
        ("training.epochs=[", "not valid YAML"),
        ("training.epochs=0", "greater than 0"),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        Config.load("demo", [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trainng: {epochs: 3}", "did you mean 'training'?"),
        ("training: {epoch: 3}", "did you mean 'training.epochs'?"),
        ("- a list", "expected a mapping"),
        ("training: {epochs: 3", "not valid YAML"),
        ("evaluation: {transfer: [{name: a, source: x}, {name: a, source: y}]}", "distinct names"),
    ],
)
def test_wrong_recipe_files_are_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        Config.load(recipe)
    assert says in str(caught.value)
    assert str(recipe) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"did you mean 'demo'.*presets: .*imagenet_swin_tiny_w7"):
        Config.load("demoo")


@given(st.sampled_from(sorted(valid_keys())), st.integers(0, 3), st.characters(categories=["Ll"]))
def test_a_key_with_a_typing_error_is_never_accepted(key: str, position: int, letter: str) -> None:
    typo = key[:position] + letter + key[position:]
    if typo in set(valid_keys()):
        return
    with pytest.raises(UserError, match="unknown key"):
        Config.load("demo", [f"{typo}=1"])


def test_the_digest_depends_on_every_value() -> None:
    digests = {Config.load("demo", [o]).digest() for o in ("seed=0", "seed=1", "training.epochs=3", "head.out_dim=64")}
    assert len(digests) == 4


def test_a_step_ends_with_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "error.txt"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(record))
    with pytest.raises(SystemExit) as caught, step("prepare_data"):
        raise UserError("data/: no pictures;\n expected jpg or png")
    assert caught.value.code == USER_ERROR_EXIT_CODE
    assert capsys.readouterr().err == "error: prepare_data: data/: no pictures; expected jpg or png\n"
    assert record.read_text() == "prepare_data: data/: no pictures; expected jpg or png"
