"""`esvit retrain` without a recipe takes the champion's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.runs.run import CONFIG, RETRAINING
from esvit_core.storage import ObjectStore
from esvit_pipelines.local.retrain import default_recipe
from esvit_pipelines.local.run import REQUESTED
from esvit_pipelines.settings import Settings, resolve


@pytest.fixture
def folder(tmp_path: Path, images: Any) -> Path:
    images.folder(tmp_path / "images", ["a", "b"], 25)
    return tmp_path


def settings_in(folder: Path, store: ObjectStore, *overrides: str) -> Settings:
    return Settings(str(folder / "images"), None, overrides, (), folder / "out", store.bucket)


def requested(folder: Path, store: ObjectStore, *overrides: str) -> Config:
    settings = settings_in(folder, store, *overrides)
    return default_recipe(settings, resolve(settings), store)


def make_champion(store: ObjectStore, *settings: str) -> str:
    run = store.uri("runs/auto-1")
    store.put_bytes(f"{run}/{CONFIG}", Config.load("demo", ["recipe=auto", *settings]).to_yaml().encode())
    store.swap_pointer(store.uri("pointers/champion"), {"run": run, "backbone": f"{run}/backbone"}, None)
    return run


def test_the_recipe_is_the_champions_and_the_options_precede_it(folder: Path, store_env: ObjectStore) -> None:
    make_champion(store_env, "training.epochs=7", "seed=3", "init.source=old.pth")
    config = requested(folder, store_env, "seed=4")
    assert (config.recipe, config.training.epochs, config.seed) == ("auto", 7, 4)
    assert config.init.source is None, "it continues from the champion"
    assert config.bucket == store_env.bucket


def test_without_a_champion_auto_chooses(folder: Path, store_env: ObjectStore, capsys: Any) -> None:
    config = requested(folder, store_env, "training.epochs=2")
    assert (config.recipe, config.training.epochs) == ("auto", 2)
    assert "recipe auto" in capsys.readouterr().out


def test_of_a_retraining_the_requested_recipe_is_taken(folder: Path, store_env: ObjectStore) -> None:
    run = make_champion(store_env, "training.epochs=1")
    store_env.put_json(f"{run}/{RETRAINING}", {})
    with pytest.raises(UserError, match=r"auto-1: it is a retraining whose recipe is not in .*out; name the recipe"):
        requested(folder, store_env)
    (folder / "out" / "auto-1").mkdir(parents=True)
    (folder / "out" / "auto-1" / REQUESTED).write_text(Config.load("demo", ["training.epochs=40"]).to_yaml())
    assert requested(folder, store_env).training.epochs == 40
