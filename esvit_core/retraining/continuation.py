"""The configuration of a run that continues from a champion.

The run trains with a lower learning rate and for fewer epochs, because its weights are trained already. If the heads are
the champion's too, it omits what protects random weights at the start: a low teacher temperature, frozen prototypes and a
low weight decay.
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

_ONLY_IN_TRAINING = {"drop_path", "mode", "mode_switch"}  # settings that do not change the network's weights


def continuation_config(config: Config, champion: Mapping[str, Any] | None, store: ObjectStore) -> Config:
    """Return the configuration of a run that continues from a champion, with its weights resolved and pinned.

    Args:
        config: configuration of a training from scratch. If it sets ``init.source``, the run starts from that instead.
        champion: value of the champion's pointer; None: there is no champion, and the run starts from scratch.
        store: object store of the champion.

    Raises:
        UserError: the champion is another network, or its weights were deleted.
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
        # The optimizer state starts from zero, so warm-up is needed as in any training.
        "warmup_epochs": math.ceil(config.optimizer.warmup_epochs * share),
    }
    objective = {"warmup_teacher_temp_epochs": math.ceil(config.objective.warmup_teacher_temp_epochs * share)}
    if with_heads:
        optimizer |= {"freeze_last_layer_epochs": 0, "weight_decay": config.optimizer.weight_decay_end}
        objective = {"warmup_teacher_temp_epochs": 0}
    continuation = config.model_copy(
        update={
            "init": config.init.model_copy(update=init),
            "optimizer": config.optimizer.model_copy(update=optimizer),
            "objective": config.objective.model_copy(update=objective),
            "training": config.training.model_copy(update={"epochs": epochs}),
        }
    )
    return pin_source(continuation, store)


def _start(config: Config, champion: Mapping[str, Any], store: ObjectStore) -> tuple[dict[str, Any], bool]:
    """Find the weights: the last checkpoint, which includes the heads, or else the published backbone."""
    try:
        source, _ = find(champion["run"], "heads", config.bucket, store)
    except WeightsNotFound:
        return {"source": champion["backbone"], "load": "backbone"}, False
    return {"source": source, "load": "heads"}, True


def _require_same_network(config: Config, champion: Mapping[str, Any], store: ObjectStore) -> None:
    try:
        champion_model = store.get_json(join_uri(champion["backbone"], "backbone.json"))["model"]
    except NotFound:
        raise UserError(
            f"champion {champion['run']}: its backbone at {champion['backbone']} was deleted; roll back to a former "
            "champion with `esvit rollback`, or set another promotion.pointer"
        ) from None
    model = config.model.model_dump(mode="json")
    for key in sorted(model.keys() - _ONLY_IN_TRAINING):
        if model[key] != champion_model.get(key):
            raise UserError(
                f"retrain: the champion {champion['run']} is not the network of the recipe (model.{key}: "
                f"{champion_model.get(key)} in the champion, {model[key]} in the recipe); use the champion's recipe, or "
                "set another promotion.pointer"
            )
