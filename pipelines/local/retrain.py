"""`esvit retrain`: retrain the champion on new images on this machine."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from esvit_core.planning.feasibility import require_metric
from esvit_core.retraining.find_new_data import find_new
from esvit_core.runs.run import open_run
from esvit_pipelines.local.run import open_run_store, print_default_recipe, run_pipeline
from esvit_pipelines.settings import Settings, resolve


def retrain(settings: Settings) -> None:
    """Look for new images in the source, and retrain the champion if there are enough.

    Raises:
        UserError: the settings, the data or the environment are invalid, or another retraining holds the lease.
        InfrastructureError: a failure that may not happen again.
        CrashError: a step failed unexpectedly.
        StoppedError: a signal stopped the run; its state is saved.
    """
    config, owner = resolve(settings), _owner(settings.out)
    require_metric(config)
    with open_run_store(settings, config) as store:
        found = find_new(config, settings.data, owner, store)
        if found.nothing:
            print(found.message)
            return
        print_default_recipe(settings)
        print(found.message)
        run_pipeline(settings, open_run(found.run, store), config, owner=owner)


def _owner(out: Path) -> str:
    """Name this folder as the owner of the lease; the lock of the run in it lets only one command work there."""
    return f"{psutil.Process().username()}@{socket.gethostname()}:{out.resolve()}"
