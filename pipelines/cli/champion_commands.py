"""`esvit champions` and `esvit rollback`: which backbones were in use, and the way back to a former one."""

from __future__ import annotations

import getpass
import json
import os
import socket
from dataclasses import asdict

from esvit_core.registry.champions import Champion, champions, roll_back
from esvit_core.registry.kubeflow_registry import URL_VARIABLE, register_champions, registry_of
from esvit_pipelines.cli.status_commands import Place


def show_champions(place: Place, pointer: str, as_json: bool) -> None:
    """Print the champions of a pointer, the present one first."""
    with place.open() as store:
        found = champions(store, place.bucket, pointer)
    if as_json:
        print(json.dumps([asdict(champion) for champion in found], indent=1))
        return
    for champion in found:
        print(_line(champion))


def register(place: Place, pointer: str, url: str | None) -> None:
    """Register the champions of a pointer in the Kubeflow Model Registry, and say so."""
    registry = registry_of(url=url)
    with place.open() as store:
        names = register_champions(registry, store, place.bucket, pointer)
    print(f"{pointer} in {registry.url}: {len(names)} version{'s' * (len(names) > 1)}, the champion is {names[-1]}")


def go_back(place: Place, pointer: str, to: str | None, why: str) -> None:
    """Make a former champion the present one, and say so."""
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    with place.open() as store:
        champion = roll_back(store, place.bucket, pointer, to, who, why)
    print(f"{pointer} is {champion.name} again ({_figure(champion)}); {champion.reason}")
    if os.environ.get(URL_VARIABLE):
        register(place, pointer, None)


def _line(champion: Champion) -> str:
    state = "now" if champion.present else "was"
    told = f"{state}  {champion.time[:16].replace('T', ' ')}  {champion.name}  {_figure(champion)}  {champion.reason}"
    if taken := champion.rolled_back:
        told += f"; taken back {taken['time'][:16].replace('T', ' ')} by {taken['who']}"
        told += f": {taken['why']}" if taken["why"] else ""
    return told


def _figure(champion: Champion) -> str:
    return f"{champion.metric} {champion.value:.2f} %" if champion.value is not None else "not measured"
