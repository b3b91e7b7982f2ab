"""Options of the published command line convert to settings and back."""

from __future__ import annotations

from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.config.recipes import preset_names
from esvit_core.weights.arguments import published_arguments, settings_of

OPTIONS: dict[str, dict[str, Any]] = {
    "mixup": {"mixup": {"use": True, "mode": "pair"}, "objective": {"region": False}},
    "deit": {"augment": {"policy": "deit", "deit": {"erase": 0.1}}, "optimizer": {"name": "sgd"}},
    "local sizes": {"augment": {"local_crops": [{"size": 96, "number": 4}, {"size": 64, "number": 2}]}},
    "no local crops": {"augment": {"local_crops": {"number": 0}}},
    "heads": {"head": {"batch_norm": True, "norm_last_layer": True}, "optimizer": {"name": "lars"}},
}
# What a published command line says; the network is in its files, data and evaluation are elsewhere.
SECTIONS = {"augment", "mixup", "head", "objective", "optimizer"}


@pytest.mark.parametrize(
    "config",
    [Config.load(name) for name in preset_names() if name != "demo"]
    + [Config.from_mapping(values) for values in OPTIONS.values()],
    ids=[*(name for name in preset_names() if name != "demo"), *OPTIONS],
)
def test_a_command_line_round_trips_to_the_recipe(config: Config) -> None:
    again = Config.from_mapping(settings_of(published_arguments(config)))
    assert again.model_dump(include=SECTIONS) == config.model_dump(include=SECTIONS)
    for key in ("epochs", "batch_size"):
        assert getattr(again.training, key) == getattr(config.training, key)


def test_a_command_line_without_crops_leaves_them_out() -> None:
    assert settings_of({"lr": 0.1}) == {"optimizer": {"lr": 0.1}}
