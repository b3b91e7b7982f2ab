"""The configuration of a run that continues from a champion."""

from __future__ import annotations

import pytest

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.retraining.continuation import continuation_config


def pointer(run: str) -> dict[str, str]:
    return {"run": run, "backbone": f"{run}/backbone"}


@pytest.fixture
def recipe(config) -> Config:
    return Config.from_mapping(config.model_dump(mode="json") | {"recipe": "long", "training": {"epochs": 300}})


def test_without_a_champion_nothing_changes(store, recipe) -> None:
    assert continuation_config(recipe, None, store) == recipe


def test_the_learning_rate_is_lower_and_the_epochs_are_fewer(store, recipe, crown) -> None:
    made = continuation_config(recipe, pointer(crown(store.uri("runs/a"))), store)
    assert (made.init.source, made.init.load) == (store.uri("runs/a/training/checkpoints/00000010"), "heads")
    assert made.init.sha256 is not None
    assert made.training.epochs == 30
    assert made.optimizer.lr == pytest.approx(recipe.optimizer.lr / 10)
    assert made.optimizer.warmup_epochs == 1
    # What protects drawn heads is not needed where they are the champion's.
    assert made.optimizer.freeze_last_layer_epochs == made.objective.warmup_teacher_temp_epochs == 0
    assert made.optimizer.weight_decay == recipe.optimizer.weight_decay_end
    changed = {"init", "optimizer", "objective", "training"}
    assert made.model_dump(exclude=changed) == recipe.model_dump(exclude=changed)


def test_without_a_checkpoint_the_heads_start_from_scratch(store, recipe, crown) -> None:
    made = continuation_config(recipe, pointer(crown(store.uri("runs/a"), checkpoint=False)), store)
    assert (made.init.source, made.init.load) == (store.uri("runs/a/backbone"), "backbone")
    assert made.optimizer.freeze_last_layer_epochs == 1 and made.objective.warmup_teacher_temp_epochs == 3


def test_the_recipe_sets_the_factors_of_epochs_and_learning_rate(store, recipe, crown) -> None:
    retrain = recipe.retrain.model_copy(update={"epochs_scale": 0.5, "lr_scale": 0.5})
    made = continuation_config(
        recipe.model_copy(update={"retrain": retrain}), pointer(crown(store.uri("runs/a"))), store
    )
    assert made.training.epochs == 150 and made.optimizer.lr == pytest.approx(recipe.optimizer.lr / 2)


def test_an_explicit_source_takes_precedence_over_the_champion(store, recipe, crown) -> None:
    run = crown(store.uri("runs/a"))
    init = recipe.init.model_copy(update={"source": f"{run}/backbone"})
    made = continuation_config(recipe.model_copy(update={"init": init}), pointer(run), store)
    assert made.init.source == f"{run}/backbone" and made.training.epochs == 300


def test_another_network_is_refused_with_the_difference(store, recipe, crown) -> None:
    model = recipe.model.model_dump(mode="json") | {"arch": "vil_tiny"}
    with pytest.raises(
        UserError, match=rf"not the network of.*model.arch: vil_tiny in the champion, {recipe.model.arch} in the recipe"
    ):
        continuation_config(recipe, pointer(crown(store.uri("runs/a"), model)), store)


def test_stochastic_depth_does_not_make_another_network(store, recipe, crown) -> None:
    model = recipe.model.model_dump(mode="json") | {"drop_path": 0.3}
    assert continuation_config(recipe, pointer(crown(store.uri("runs/a"), model)), store).model == recipe.model


def test_a_champion_without_its_backbone_is_refused(store, recipe) -> None:
    with pytest.raises(UserError, match=r"its backbone at .* was deleted.*esvit rollback"):
        continuation_config(recipe, pointer(store.uri("runs/gone")), store)
