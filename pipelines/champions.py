"""`esvit champions` and `esvit rollback`: which backbones were in use, and the way back to a former one."""

from __future__ import annotations

import getpass
import json
import socket
from dataclasses import asdict

from esvit_core.evaluation.champions import Champion, champions, roll_back
from esvit_pipelines.watch import Place


def show_champions(place: Place, pointer: str, as_json: bool) -> None:
    """Print the champions of a pointer, the present one first."""
    with place.open() as store:
        found = champions(store, place.bucket, pointer)
    if as_json:
        print(json.dumps([asdict(champion) for champion in found], indent=1))
        return
    for champion in found:
        print(_line(champion))


def go_back(place: Place, pointer: str, to: str | None, why: str) -> None:
    """Make a former champion the present one, and say so."""
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    with place.open() as store:
        champion = roll_back(store, place.bucket, pointer, to, who, why)
    print(f"{pointer} is {champion.name} again ({_figure(champion)}); {champion.reason}")


def _line(champion: Champion) -> str:
    state = "now" if champion.present else "was"
    told = f"{state}  {champion.time[:16].replace('T', ' ')}  {champion.name}  {_figure(champion)}  {champion.reason}"
    if taken := champion.rolled_back:
        told += f"; taken back {taken['time'][:16].replace('T', ' ')} by {taken['who']}"
        told += f": {taken['why']}" if taken["why"] else ""
    return told


def _figure(champion: Champion) -> str:
    return f"{champion.metric} {champion.value:.2f} %" if champion.value is not None else "not measured"
