"""Find, list, terminate and retry the runs of a cluster."""

from __future__ import annotations

import datetime
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_pipelines.cluster.client import Connection, pages, server_message
from esvit_pipelines.settings import program

ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
SUCCESSFUL = ("SUCCEEDED", "SKIPPED")
_PAGE = 100
_UUID = 36  # characters of a run's id
_SEARCH_LIMIT = 1000  # runs that are searched for a name


def get_run(connection: Connection, run_id: str) -> Any:
    """Return a run as the server describes it; see :meth:`Connection.request` for errors."""
    import kfp_server_api

    text = connection.request("GET", f"/apis/v2beta1/runs/{run_id}").decode()
    return kfp_server_api.ApiClient().deserialize(SimpleNamespace(data=text), "V2beta1Run")


def find_run(connection: Connection, name: str) -> Any:
    """Find a run by its id, a prefix of the id, its name, or its link in the user interface.

    Raises:
        UserError: none of the newest thousand runs matches, or several do.
    """
    name = name.rstrip("/").rpartition("/")[2]
    if len(name) == _UUID and name.count("-") == 4:
        return get_run(connection, name)
    known = []
    for run in _all_runs(connection, None, _PAGE):
        known.append(run)
        if len(known) == _SEARCH_LIMIT:
            break
    matches = [run for run in known if run.display_name == name]
    matches = matches or [run for run in known if str(run.run_id).startswith(name)]
    if len(matches) == 1:
        return get_run(connection, matches[0].run_id)
    if matches:
        ids = ", ".join(run.run_id for run in matches[:5])
        raise UserError(f"run {name}: {len(matches)} runs match; give the id of one: {ids}")
    raise UserError(
        f"run {name}: it does not exist at {connection.host}; give the name, the id or a prefix of the id of a run "
        "that `esvit runs` lists (`esvit status` and `esvit logs` show the runs of this machine's store)"
    )


def terminate(connection: Connection, run: Any) -> None:
    """Terminate an active run.

    Raises:
        UserError: it has already ended.
    """
    if run.state in ENDED:
        raise UserError(f"run {run.display_name}: it has already ended ({state(run)}) and cannot be terminated")
    connection.request("POST", f"/apis/v2beta1/runs/{run.run_id}:terminate")


def retry(connection: Connection, run: Any) -> None:
    """Retry the failed steps of a run; steps that succeeded are kept.

    Raises:
        UserError: the run has not failed, or the server cannot retry it.
    """
    import kfp_server_api

    if run.state not in ("FAILED", "CANCELED"):
        raise UserError(f"run {run.display_name}: it is {state(run)}; only a failed or canceled run can be retried")
    try:
        connection.request("POST", f"/apis/v2beta1/runs/{run.run_id}:retry")
    except kfp_server_api.ApiException as error:
        if error.status in (401, 403):
            raise
        raise UserError(
            f"run {run.display_name}: the server cannot retry it ({server_message(error)}); submit it again: "
            "finished steps are reused"
        ) from None


def command_for(connection: Connection, *words: str) -> str:
    """Return a command line for the same server, quoted for use in a shell."""
    server = connection.server
    known_options = (
        ("--host", server.host, "KF_PIPELINES_ENDPOINT"),
        ("--namespace", server.namespace, "ESVIT_KFP_NAMESPACE"),
        ("--token-file", server.token_file, "KF_PIPELINES_SA_TOKEN_PATH"),
        ("--ca-file", server.ca_file, "ESVIT_KFP_CA_FILE"),
    )
    options = [
        word
        for option, value, variable in known_options
        if value is not None and os.environ.get(variable) != str(value)
        for word in (option, str(value))
    ]
    return f"{program()} {shlex.join([*words, *options])}"


def runs(connection: Connection, experiment: str | None, number: int) -> list[Any]:
    """List the newest runs.

    Args:
        experiment: id of the experiment; None: all experiments of the namespace.
    """
    newest = []
    for run in _all_runs(connection, experiment, min(number, _PAGE)):
        newest.append(run)
        if len(newest) == number:
            break
    return newest


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


def show_runs(connection: Connection, listed: Sequence[Any], as_json: bool) -> None:
    """Print the runs as a table or as JSON."""
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
        for run in listed
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("no runs")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "state", "started", "duration", "link", box=None, pad_edge=False)
    for row, run in zip(rows, listed, strict=True):
        started = f"{run.created_at.astimezone():%Y-%m-%d %H:%M}" if run.created_at else ""
        took = "" if row["seconds"] is None else format_duration(row["seconds"])
        table.add_row(row["name"], row["state"], started, took, row["link"], style=_STYLES.get(run.state))
    # Do not wrap links in a narrow terminal, so that they can be copied.
    Console(width=max(Console().width, table_width(table)), soft_wrap=True).print(table)


_STYLES = {"FAILED": "red", "RUNNING": "cyan"}


def table_width(table: Any) -> int:
    """Return the width of a table without line breaks, in columns."""
    from rich.console import Console

    wide = Console(width=10_000)
    return int(wide.measure(table).maximum)


def state(run: Any) -> str:
    """Return the state of a run in one word."""
    return str(run.state or "unknown").removeprefix("RUNTIME_STATE_").lower()


def duration(run: Any) -> float | None:
    """Return the seconds from the creation of a run until its end or now; None before it is created."""
    if run.created_at is None:
        return None
    # The server reports its zero time for a run that has not ended.
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else None
    until = ended or datetime.datetime.now(datetime.UTC)
    return max(0.0, round((until - run.created_at).total_seconds(), 1))
