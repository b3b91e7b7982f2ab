"""The configuration of a run that goes on from a champion.

Its weights are good already, so it learns with a lower rate and for fewer epochs; and what protects drawn weights at
the beginning (a low teacher temperature, frozen prototypes, a low weight decay) is left out where the heads are the
champion's too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import NotFound
from esvit_core.weights.weight_source import WeightsNotFound, find, pin_source

_ONLY_IN_TRAINING = {"drop_path", "mode", "mode_switch"}  # the same network with another of these


def continued(config: Config, champion: Mapping[str, Any] | None, store: ObjectStore) -> Config:
    """The configuration of a run that goes on from a champion, its weights looked up and held fast.

    Args:
        config: as the user wants it, from nothing. Where it names ``init.source`` that is what the run starts from.
        champion: what the pointer says; None: there is none, and the run begins from nothing.
        store: where the champion is.

    Raises:
        UserError: the champion is another network, or its weights are gone.
    """
    if champion is None or config.init.source is not None:
        return pin_source(config, store)
    _require_same_network(config, champion, store)
    init, with_heads = _start(config, champion, store)
    share = config.retrain.epochs_scale
    epochs = max(1, round(config.training.epochs * share))
    lr = config.optimizer.lr * config.retrain.lr_scale
    optimizer: dict[str, Any] = {
        "lr": lr,
        "min_lr": min(config.optimizer.min_lr, lr),
        # The optimizer starts anew, so its first steps are small, as in any training.
        "warmup_epochs": math.ceil(config.optimizer.warmup_epochs * share),
    }
    objective = {"warmup_teacher_temp_epochs": math.ceil(config.objective.warmup_teacher_temp_epochs * share)}
    if with_heads:
        optimizer |= {"freeze_last_layer_epochs": 0, "weight_decay": config.optimizer.weight_decay_end}
        objective = {"warmup_teacher_temp_epochs": 0}
    made = config.model_copy(
        update={
            "init": config.init.model_copy(update=init),
            "optimizer": config.optimizer.model_copy(update=optimizer),
            "objective": config.objective.model_copy(update=objective),
            "training": config.training.model_copy(update={"epochs": epochs}),
        }
    )
    return pin_source(made, store)


def _start(config: Config, champion: Mapping[str, Any], store: ObjectStore) -> tuple[dict[str, Any], bool]:
    """Where the weights are: the last checkpoint, which has the heads too, or else the published backbone alone."""
    try:
        source, _ = find(champion["run"], "heads", config.bucket, store)
    except WeightsNotFound:
        return {"source": champion["backbone"], "take": "backbone"}, False
    return {"source": source, "take": "heads"}, True


def _require_same_network(config: Config, champion: Mapping[str, Any], store: ObjectStore) -> None:
    try:
        there = store.get_json(join_uri(champion["backbone"], "backbone.json"))["model"]
    except NotFound:
        raise UserError(
            f"champion {champion['run']}: its backbone is not at {champion['backbone']} any more; "
            "go back to a former one with `esvit rollback`, or name another promotion.pointer"
        ) from None
    here = config.model.model_dump(mode="json")
    for key in sorted(here.keys() - _ONLY_IN_TRAINING):
        if here[key] != there.get(key):
            raise UserError(
                f"retrain: the champion {champion['run']} is another network than the recipe's (model.{key}: "
                f"{there.get(key)} there, {here[key]} here); take its recipe, or name another promotion.pointer"
            )
