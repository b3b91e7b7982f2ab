"""`esvit retrain`: retrain the champion on new images on this machine."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import psutil

from esvit_core.config import Config, InitConfig
from esvit_core.errors import UserError
from esvit_core.planning.feasibility import require_metric
from esvit_core.retraining.find_new_data import find_new
from esvit_core.runs.run import RETRAINING, name_of_run, open_run
from esvit_core.storage import ObjectStore, join_uri
from esvit_pipelines.local.run import REQUESTED, open_run_store, run_pipeline
from esvit_pipelines.settings import Settings, resolve, resolve_run


def retrain(settings: Settings) -> None:
    """Look for new images in the source, and retrain the champion if there are enough.

    Raises:
        UserError: the settings, the data or the environment are invalid, or another retraining holds the lease.
        InfrastructureError: a failure that may not happen again.
        CrashError: a step failed unexpectedly.
        StoppedError: a signal stopped the run; its state is saved.
    """
    config, owner = resolve(settings), _owner(settings.out)
    with open_run_store(settings, config) as store:
        if settings.recipe is None:
            config = default_recipe(settings, config, store)
        require_metric(config)
        found = find_new(config, settings.data, owner, store)
        if found.nothing:
            print(found.message)
            return
        print(found.message)
        run_pipeline(settings, open_run(found.run, store), config, owner=owner)


def default_recipe(settings: Settings, config: Config, store: ObjectStore) -> Config:
    """Return the configuration if no recipe is named: that of the champion, or without a champion what ``auto`` chooses.

    Args:
        settings: options of the command, which precede the recipe.
        config: the default recipe with these options; it names the bucket and the pointer.
        store: object store of the champion.

    Raises:
        UserError: the champion's recipe is not known any more.
    """
    pointer = store.read_pointer(join_uri(f"s3://{config.bucket}", "pointers", config.promotion.pointer))
    if pointer is None:
        resolved = resolve_run(settings)
        print(*resolved.explanation, sep="\n", flush=True)
        return resolved.config
    run = str(pointer.value["run"])
    name = name_of_run(run)
    requested = settings.out / name / REQUESTED
    if requested.is_file():  # a retraining; the configuration of its run is derived from this one
        champion = Config.load(requested)
    elif store.exists(join_uri(run, RETRAINING)):
        raise UserError(
            f"champion {name}: it is a retraining whose recipe is not in {settings.out}; name the recipe with --recipe"
        )
    else:
        champion = open_run(run, store).config
    print(f"recipe of the champion {name}", flush=True)
    base = champion.model_copy(update={"init": InitConfig()})  # the run continues from the champion, not from its start
    return resolve(replace(settings, recipe=base.to_yaml()))


def _owner(out: Path) -> str:
    """Name this folder as the owner of the lease; the lock of the run in it lets only one command work there."""
    return f"{psutil.Process().username()}@{socket.gethostname()}:{out.resolve()}"
