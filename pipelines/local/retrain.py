"""`esvit retrain`: from new images to a champion that has seen them, or the reason why there is none."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from esvit_core.planning.feasibility import require_metric
from esvit_core.retraining.find_new_data import find_new
from esvit_core.runs.run import open_run
from esvit_pipelines.cli.settings import Settings, resolve
from esvit_pipelines.local.run import Retraining, carry_out, opened, say_if_no_recipe


def retrain(settings: Settings) -> None:
    """Look at the source, and if there is something new retrain the champion with it on this machine.

    Raises:
        UserError: in the settings, the data, or the surroundings; or another one is at it.
        InfrastructureError: something failed that may work later.
        CrashError: a step failed unexpectedly.
        StoppedError: it was asked to stop; its state is saved.
    """
    config, owner = resolve(settings), _owner(settings.out)
    require_metric(config)
    with opened(settings, config) as store:
        found = find_new(config, settings.data, owner, store)
        if found.nothing:
            print(found.told)
            return
        say_if_no_recipe(settings)
        print(found.told)
        carry_out(settings, open_run(found.run, store), Retraining(owner, config))


def _owner(out: Path) -> str:
    """Whoever works in this folder: the run in it is locked, so that of two commands one has it."""
    return f"{psutil.Process().username()}@{socket.gethostname()}:{out.resolve()}"
