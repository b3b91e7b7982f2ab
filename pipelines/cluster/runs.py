"""The runs of a cluster: find, list, end and repeat them."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_pipelines.cluster.client import Connection, pages, words_of

ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
GOOD = ("SUCCEEDED", "SKIPPED")
_PAGE = 100
_UUID = 36  # characters of a run's id
_LOOKED_THROUGH = 1000  # runs, for one of a given name


def get_run(connection: Connection, run_id: str) -> Any:
    """A run as the server describes it, asked for once; see :meth:`Connection.ask` for errors."""
    import kfp_server_api

    text = connection.ask("GET", f"/apis/v2beta1/runs/{run_id}").decode()
    return kfp_server_api.ApiClient().deserialize(SimpleNamespace(data=text), "V2beta1Run")


def find_run(connection: Connection, name: str) -> Any:
    """The run of that id or name, or whose id begins so, or that a link of the user interface shows.

    Raises:
        UserError: there is none among the newest thousand, or there are several.
    """
    name = name.rstrip("/").rpartition("/")[2]
    if len(name) == _UUID and name.count("-") == 4:
        return get_run(connection, name)
    known = []
    for run in _all_runs(connection, None, _PAGE):
        known.append(run)
        if len(known) == _LOOKED_THROUGH:
            break
    found = [run for run in known if run.display_name == name]
    found = found or [run for run in known if str(run.run_id).startswith(name)]
    if len(found) == 1:
        return get_run(connection, found[0].run_id)
    if found:
        ids = ", ".join(run.run_id for run in found[:5])
        raise UserError(f"run {name}: there are {len(found)} of that name; give the id of one: {ids}")
    raise UserError(
        f"run {name}: there is none at {connection.host}; give the name, the id or the beginning of the id of one "
        "that `esvit runs` lists (`esvit status` and `esvit logs` show the runs of this machine's store)"
    )


def terminate(connection: Connection, run: Any) -> None:
    """End a run that is under way.

    Raises:
        UserError: it has ended.
    """
    if run.state in ENDED:
        raise UserError(f"run {run.display_name}: it has ended ({state(run)}); there is nothing to terminate")
    connection.ask("POST", f"/apis/v2beta1/runs/{run.run_id}:terminate")


def retry(connection: Connection, run: Any) -> None:
    """Start the failed steps of a run again; what is done stays.

    Raises:
        UserError: the run has not failed, or the server cannot start it again.
    """
    import kfp_server_api

    if run.state not in ("FAILED", "CANCELED"):
        raise UserError(f"run {run.display_name}: it is {state(run)}; only a run that failed can be tried again")
    try:
        connection.ask("POST", f"/apis/v2beta1/runs/{run.run_id}:retry")
    except kfp_server_api.ApiException as error:
        if error.status in (401, 403):
            raise
        raise UserError(
            f"run {run.display_name}: the server cannot try it again ({words_of(error)}); submit it anew: "
            "its steps find what is done"
        ) from None


def again(connection: Connection, *words: str) -> str:
    """A command line about the same server, to be pasted."""
    import os

    from esvit_pipelines.cli.settings import program

    server = connection.server
    given = (
        ("--host", server.host, "KF_PIPELINES_ENDPOINT"),
        ("--namespace", server.namespace, "ESVIT_KFP_NAMESPACE"),
        ("--token-file", server.token_file, "KF_PIPELINES_SA_TOKEN_PATH"),
        ("--ca-file", server.ca_file, "ESVIT_KFP_CA_FILE"),
    )
    options = [
        word
        for option, value, variable in given
        if value is not None and os.environ.get(variable) != str(value)
        for word in (option, str(value))
    ]
    return f"{program()} {shlex.join([*words, *options])}"


def runs(connection: Connection, experiment: str | None, number: int) -> list[Any]:
    """The newest runs.

    Args:
        experiment: its id; None: of all of the namespace.
    """

    found = []
    for run in _all_runs(connection, experiment, min(number, _PAGE)):
        found.append(run)
        if len(found) == number:
            break
    return found


def _all_runs(connection: Connection, experiment: str | None, size: int) -> Iterator[Any]:
    def page(token: str) -> Any:
        return connection.client.list_runs(
            page_token=token,
            page_size=size,
            sort_by="created_at desc",
            experiment_id=experiment,
            namespace=connection.namespace or "",
        )

    return pages(page, "runs")


def show_runs(connection: Connection, found: Sequence[Any], as_json: bool) -> None:
    """Print the runs: a table, or JSON for programs."""
    rows = [
        {
            "id": run.run_id,
            "name": run.display_name,
            "state": state(run),
            "started": run.created_at.isoformat() if run.created_at else None,
            "seconds": duration(run),
            "error": run.error.message if run.error else None,
            "link": connection.link("runs", run.run_id),
        }
        for run in found
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("no runs")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "state", "started", "took", "link", box=None, pad_edge=False)
    for row, run in zip(rows, found, strict=True):
        started = f"{run.created_at.astimezone():%Y-%m-%d %H:%M}" if run.created_at else ""
        took = "" if row["seconds"] is None else format_duration(row["seconds"])
        table.add_row(row["name"], row["state"], started, took, row["link"], style=_STYLES.get(run.state))
    # Links are to be copied: they are not broken where the terminal is narrow.
    Console(width=max(Console().width, table_width(table)), soft_wrap=True).print(table)


_STYLES = {"FAILED": "red", "RUNNING": "cyan"}


def table_width(table: Any) -> int:
    """Columns that a table takes if nothing is broken."""
    from rich.console import Console

    wide = Console(width=10_000)
    return int(wide.measure(table).maximum)


def state(run: Any) -> str:
    """Of a run, in a word."""
    return str(run.state or "unknown").removeprefix("RUNTIME_STATE_").lower()


def duration(run: Any) -> float | None:
    """Seconds that a run has taken until now; None before it has begun."""
    if run.created_at is None:
        return None
    # The server's zero time stands for a run that has not ended.
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else None
    until = ended or datetime.datetime.now(datetime.UTC)
    return max(0.0, round((until - run.created_at).total_seconds(), 1))
