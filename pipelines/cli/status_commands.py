"""`esvit status` and `esvit logs`: look at runs in the object store, without disturbing them."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from esvit_core.errors import UserError
from esvit_core.runs.events import Entry, read_journal
from esvit_core.runs.log import read_log
from esvit_core.runs.run import run_uri
from esvit_core.runs.status import UNDER_WAY, RunStatus, read_status, run_names
from esvit_core.storage import ObjectStore
from esvit_core.storage.address import ENDPOINT
from esvit_core.storage.session import open_store
from esvit_pipelines.cli.settings import LOG, program, store_in

REFRESH_SECONDS = 3.0


@dataclass(frozen=True)
class Place:
    """Where runs are looked for.

    Args:
        out: folder of the embedded store and of what runs leave on this machine.
        bucket: in the store.
        known: pieces of logs that were read before; they are written once.
    """

    out: Path
    bucket: str
    known: dict[str, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def open(self) -> Iterator[ObjectStore]:
        """The store: the one that runs, else started for as long as it is looked at.

        Raises:
            UserError: there is none.
        """
        if not os.environ.get(ENDPOINT) and not store_in(self.out).is_dir():
            raise UserError(f"--out {self.out}: there is no store; name the folder of a run, or set {ENDPOINT}")
        with open_store(store_in(self.out)) as store:
            if self.bucket not in store.buckets():
                raise UserError(f"bucket {self.bucket}: not in the store; name one with --bucket")
            yield store

    def find(self, store: ObjectStore, name: str | None) -> str:
        """The run of that name, or whose name begins so; None: the newest.

        Raises:
            UserError: there is none, or there are several.
        """
        names = run_names(store, self.bucket)
        if name is None:
            if not names:
                raise UserError(
                    f"s3://{self.bucket}/runs: there are no runs yet; `{program()} run --data ...` makes one"
                )
            return names[0]
        name = name.rstrip("/").rsplit("/", 1)[-1]  # s3://bucket/runs/<name> is taken too
        begun = [name] if name in names else [n for n in names if n.startswith(name)]
        if len(begun) > 1:
            raise UserError(f"run {name}: {len(begun)} runs begin so ({', '.join(begun)}); write more of the name")
        if not begun:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise UserError(f"run {name}: not in s3://{self.bucket}/runs{hint} `{program()} status` lists the runs")
        return begun[0]

    def look(self, store: ObjectStore, name: str, brief: bool = False) -> RunStatus:
        """At one run."""
        return read_status(store, run_uri(self.bucket, name), brief=brief, alive=self._alive(name), known=self.known)

    def hints(self, run: RunStatus) -> list[str]:
        """Where to look when it has failed."""
        if run.failure is None:
            return []
        words = str((run.failure.facts or {}).get("last_words", "")).splitlines()
        log = self.out / run.name / LOG
        where = (
            f"the log is {log}" if log.exists() else f"look at the log of step {run.failure.part} on {run.failure.host}"
        )
        return [*words[-12:], f"{where}; `{program()} logs {run.name}` has the figures"]

    def _alive(self, name: str) -> bool | None:
        """Whether `esvit run` is at work on it here; None where it was not started on this machine."""
        lock = self.out / name / ".lock"
        if not lock.exists():
            return None
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def show_runs(place: Place, as_json: bool) -> None:
    """The runs of the store, the newest first."""
    from rich.console import Console

    from esvit_core.reporting.terminal import runs_table

    with place.open() as store:
        runs = [place.look(store, name, brief=True) for name in run_names(store, place.bucket)]
    if as_json:
        print(json.dumps([run.as_json() for run in runs], indent=1))
    elif runs:
        Console().print(runs_table(runs))
    else:
        print(f"no runs yet in s3://{place.bucket}/runs")


def show_status(place: Place, name: str | None, follow: bool, as_json: bool) -> None:
    """All about one run, by default the newest; ``follow``: again and again until it ends."""
    from rich.console import Console
    from rich.live import Live

    from esvit_core.reporting.terminal import status_view

    with place.open() as store:
        found = place.find(store, name)
        run = place.look(store, found)
        if as_json:
            print(json.dumps(run.as_json(), indent=1))
            return
        if follow:
            with Live(status_view(run), console=Console(), auto_refresh=False) as live:
                while run.state in UNDER_WAY:
                    time.sleep(REFRESH_SECONDS)
                    run = place.look(store, found)
                    live.update(status_view(run), refresh=True)
        else:
            Console().print(status_view(run))
        for hint in place.hints(run):
            print(hint)  # not through rich, which would break a path that is to be pasted


def show_logs(place: Place, name: str | None, follow: bool, as_json: bool) -> None:
    """What happened to a run, in order: journal and log; ``follow``: also what comes until it ends."""
    with place.open() as store:
        found = place.find(store, name)
        uri = run_uri(place.bucket, found)
        shown: set[tuple[float, str]] = set()
        while True:
            under_way = follow and place.look(store, found, brief=True).state in UNDER_WAY
            for happened in _happened(store, uri, place.known, as_json):
                if happened not in shown:  # not by the time: the steps of a fast run have the same
                    print(happened[1], flush=True)
                    shown.add(happened)
            if not under_way:
                return
            time.sleep(REFRESH_SECONDS)


def _happened(store: ObjectStore, uri: str, known: dict[str, bytes], as_json: bool) -> list[tuple[float, str]]:
    """Time and text of every entry and line."""
    from esvit_core.reporting.terminal import journal_line, log_line

    def text(entry: Entry) -> str:
        return json.dumps(entry.as_json()) if as_json else journal_line(entry)

    entries = [(entry.time, text(entry)) for entry in read_journal(store, uri)]
    lines = [
        (float(line.get("time", 0)), json.dumps({"kind": "log", **line}) if as_json else log_line(line))
        for line in read_log(store, uri, known)
    ]
    return sorted([*entries, *lines], key=lambda item: item[0])
