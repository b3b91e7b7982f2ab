"""`esvit status` and `esvit logs`: read the state of runs from the object store."""

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
from esvit_core.runs.events import Event, read_events
from esvit_core.runs.log import read_log
from esvit_core.runs.run import run_uri
from esvit_core.runs.status import ACTIVE_STATES, RunStatus, read_status, run_names
from esvit_core.storage import ObjectStore
from esvit_core.storage.address import ENDPOINT
from esvit_core.storage.session import open_store
from esvit_pipelines.settings import LOG, program, store_in

REFRESH_SECONDS = 3.0


@dataclass(frozen=True)
class RunLocation:
    """The store and bucket that hold the runs.

    Args:
        out: folder of the embedded store and of the files that runs write on this machine.
        bucket: bucket in the store.
        known: cache of log pieces by address; a piece never changes once it is written.
    """

    out: Path
    bucket: str
    known: dict[str, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def open(self) -> Iterator[ObjectStore]:
        """Open the store; an embedded store that does not run is started until the block ends.

        Raises:
            UserError: there is no store, or it lacks the bucket.
        """
        if not os.environ.get(ENDPOINT) and not store_in(self.out).is_dir():
            raise UserError(f"--out {self.out}: there is no store; name the folder of a run, or set {ENDPOINT}")
        with open_store(store_in(self.out)) as store:
            if self.bucket not in store.buckets():
                raise UserError(f"bucket {self.bucket}: it is not in the store; name another one with --bucket")
            yield store

    def find(self, store: ObjectStore, name: str | None) -> str:
        """Find a run by its name or a prefix of it; None: the newest run.

        Raises:
            UserError: no run matches, or several do.
        """
        names = run_names(store, self.bucket)
        if name is None:
            if not names:
                raise UserError(
                    f"s3://{self.bucket}/runs: there are no runs yet; `{program()} run --data ...` starts one"
                )
            return names[0]
        name = name.rstrip("/").rsplit("/", 1)[-1]  # s3://bucket/runs/<name> is accepted too
        matching = [name] if name in names else [n for n in names if n.startswith(name)]
        if len(matching) > 1:
            raise UserError(
                f"run {name}: {len(matching)} runs have this prefix ({', '.join(matching)}); give a longer one"
            )
        if not matching:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise UserError(
                f"run {name}: it is not in s3://{self.bucket}/runs{hint} `{program()} status` lists the runs"
            )
        return matching[0]

    def status(self, store: ObjectStore, name: str, brief: bool = False) -> RunStatus:
        """Read the status of one run."""
        return read_status(store, run_uri(self.bucket, name), brief=brief, alive=self._alive(name), known=self.known)

    def hints(self, run: RunStatus) -> list[str]:
        """List the last lines of a failed run and where its log is; empty if it has not failed."""
        if run.failure is None:
            return []
        last_lines = str((run.failure.facts or {}).get("log_tail", "")).splitlines()
        log = self.out / run.name / LOG
        where = (
            f"the log is {log}"
            if log.exists()
            else f"see the log of step {run.failure.component} on {run.failure.host}"
        )
        return [*last_lines[-12:], f"{where}; `{program()} logs {run.name}` prints the training metrics"]

    def _alive(self, name: str) -> bool | None:
        """Return whether `esvit run` is running it here; None if it was not started on this machine."""
        lock = self.out / name / ".lock"
        if not lock.exists():
            return None
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def show_runs(location: RunLocation, as_json: bool) -> None:
    """Print the runs of the store, newest first."""
    from rich.console import Console

    from esvit_core.reporting.terminal import runs_table

    with location.open() as store:
        runs = [location.status(store, name, brief=True) for name in run_names(store, location.bucket)]
    if as_json:
        print(json.dumps([run.as_json() for run in runs], indent=1))
    elif runs:
        Console().print(runs_table(runs))
    else:
        print(f"no runs yet in s3://{location.bucket}/runs")


def show_status(location: RunLocation, name: str | None, follow: bool, as_json: bool) -> None:
    """Print the status of one run, by default the newest; with ``follow``, refresh it until the run ends."""
    from rich.console import Console
    from rich.live import Live

    from esvit_core.reporting.terminal import status_view

    with location.open() as store:
        found = location.find(store, name)
        run = location.status(store, found)
        if as_json:
            print(json.dumps(run.as_json(), indent=1))
            return
        if follow:
            with Live(status_view(run), console=Console(), auto_refresh=False) as live:
                while run.state in ACTIVE_STATES:
                    time.sleep(REFRESH_SECONDS)
                    run = location.status(store, found)
                    live.update(status_view(run), refresh=True)
        else:
            Console().print(status_view(run))
        for hint in location.hints(run):
            print(hint)  # not with rich, which would wrap long paths


def show_logs(location: RunLocation, name: str | None, follow: bool, as_json: bool) -> None:
    """Print the events and the training log of a run in order; with ``follow``, until the run ends."""
    with location.open() as store:
        found = location.find(store, name)
        uri = run_uri(location.bucket, found)
        shown: set[tuple[float, str]] = set()
        while True:
            active = follow and location.status(store, found, brief=True).state in ACTIVE_STATES
            for entry in _entries(store, uri, location.known, as_json):
                if entry not in shown:  # the time alone is ambiguous: steps of a fast run share it
                    print(entry[1], flush=True)
                    shown.add(entry)
            if not active:
                return
            time.sleep(REFRESH_SECONDS)


def _entries(store: ObjectStore, uri: str, known: dict[str, bytes], as_json: bool) -> list[tuple[float, str]]:
    """Return time and text of every event and log line, in order."""
    from esvit_core.reporting.terminal import event_line, log_line

    def text(entry: Event) -> str:
        return json.dumps(entry.as_json()) if as_json else event_line(entry)

    entries = [(entry.time, text(entry)) for entry in read_events(store, uri)]
    lines = [
        (float(line.get("time", 0)), json.dumps({"kind": "log", **line}) if as_json else log_line(line))
        for line in read_log(store, uri, known)
    ]
    return sorted([*entries, *lines], key=lambda item: item[0])
