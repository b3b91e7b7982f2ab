"""`esvit champions` and `esvit rollback`: list the champions, and make a former one current again."""

from __future__ import annotations

import getpass
import json
import os
import socket
from dataclasses import asdict

from esvit_core.registry.champions import Champion, champions, roll_back
from esvit_core.registry.kubeflow_registry import URL_VARIABLE, register_champions, registry_of
from esvit_pipelines.cli.status_commands import RunLocation


def show_champions(location: RunLocation, pointer: str, as_json: bool) -> None:
    """Print the champions of a pointer, newest first."""
    with location.open() as store:
        history = champions(store, location.bucket, pointer)
    if as_json:
        print(json.dumps([asdict(champion) for champion in history], indent=1))
        return
    for champion in history:
        print(_line(champion))


def register(location: RunLocation, pointer: str, url: str | None) -> None:
    """Register the champions of a pointer in the Kubeflow Model Registry, and print the result."""
    registry = registry_of(url=url)
    with location.open() as store:
        names = register_champions(registry, store, location.bucket, pointer)
    print(f"{pointer} in {registry.url}: {len(names)} version{'s' * (len(names) > 1)}, champion {names[-1]}")


def roll_back_champion(location: RunLocation, pointer: str, to: str | None, why: str) -> None:
    """Make a former champion the current one, and print it."""
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    with location.open() as store:
        champion = roll_back(store, location.bucket, pointer, to, who, why)
    print(f"{pointer} is {champion.name} again ({_metric(champion)}); {champion.reason}")
    if os.environ.get(URL_VARIABLE):
        register(location, pointer, None)


def _line(champion: Champion) -> str:
    state = "current" if champion.current else "former "
    text = f"{state}  {champion.time[:16].replace('T', ' ')}  {champion.name}  {_metric(champion)}  {champion.reason}"
    if undone := champion.rolled_back:
        text += f"; rolled back {undone['time'][:16].replace('T', ' ')} by {undone['who']}"
        text += f": {undone['why']}" if undone["why"] else ""
    return text


def _metric(champion: Champion) -> str:
    return f"{champion.metric} {champion.value:.2f} %" if champion.value is not None else "not measured"
