"""`esvit submit` and `esvit runs`: run a pipeline on a cluster, and see how the runs there are doing."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.monitoring.progress import format_duration
from esvit_pipelines.kubeflow import Connection, pages

ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
GOOD = ("SUCCEEDED", "SKIPPED")
_PAGE = 100


@dataclass(frozen=True)
class Package:
    """A compiled pipeline in a file.

    Attributes:
        path: of the file.
        name: of the pipeline.
        parameters: its parameters as KFP describes them.
    """

    path: Path
    name: str
    parameters: Mapping[str, Mapping[str, Any]]


@contextlib.contextmanager
def package(pipeline: str, config: Config) -> Iterator[Package]:
    """A pipeline to send: compiled now, or a file that was compiled before.

    Args:
        pipeline: one of the pipelines' names, or a file ending with ``.yaml``.
        config: for the former.

    Raises:
        UserError: there is no such pipeline or file, or the file holds none.
    """
    from esvit_pipelines.compile import compile_pipeline

    if pipeline.endswith((".yaml", ".yml")):
        yield _read(Path(pipeline))
        return
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_pipeline(pipeline, config, path)
        yield _read(path)


def _read(path: Path) -> Package:
    try:
        spec = next(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        name = spec["pipelineInfo"]["name"]
        parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    except OSError as error:
        raise UserError(f"pipeline {path}: cannot be read ({error.strerror}); `esvit compile` makes one") from None
    except (yaml.YAMLError, UnicodeDecodeError, StopIteration, KeyError, TypeError, AttributeError):
        raise UserError(f"pipeline {path}: no compiled pipeline of KFP 2; `esvit compile` makes one") from None
    return Package(path, name, parameters)


def arguments(pipeline: Package, given: Sequence[str]) -> dict[str, Any]:
    """The pipeline's arguments, each of its parameter's type.

    Args:
        given: ``name=value`` each; of a list or a structure the value is YAML.

    Raises:
        UserError: a parameter is unknown or missing, or a value is not of its type.
    """
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or name not in pipeline.parameters:
            near = difflib.get_close_matches(name, pipeline.parameters, n=1)
            meant = f", did you mean {near[0]!r}?" if near else ""
            known = ", ".join(pipeline.parameters) or "none"
            raise UserError(f"parameter {item}: expected name=value with a name of {pipeline.name}{meant}: {known}")
        values[name] = _typed(item, text, str(pipeline.parameters[name]["parameterType"]))
    missing = [n for n, p in pipeline.parameters.items() if not p.get("isOptional") and n not in values]
    if missing:
        flags = ", ".join(f"--{n}" if n == "data" else f"-p {n}=..." for n in missing)
        raise UserError(f"pipeline {pipeline.name}: it needs {', '.join(missing)}; give {flags}")
    return values


def _typed(item: str, text: str, kind: str) -> Any:
    if kind == "STRING":
        return text
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "NUMBER_INTEGER": ((int,), "a whole number"),
        "NUMBER_DOUBLE": ((int, float), "a number"),
        "BOOLEAN": ((bool,), "true or false"),
        "LIST": ((list,), "a list"),
        "STRUCT": ((dict,), "a mapping"),
    }
    types, words = kinds[kind]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UserError(f"parameter {item}: expected {words}")
    return value


def submit(
    connection: Connection,
    pipeline: Package,
    values: Mapping[str, Any],
    name: str | None,
    experiment: str,
    service_account: str | None,
    caching: bool | None,
) -> Any:
    """Run a pipeline once, as `kfp run create` does.

    Args:
        values: the arguments.
        name: of the run; None: the pipeline's and the time.
        experiment: its id.
        service_account: of the steps; None: the server's default.
        caching: None: as compiled.

    Returns:
        The run, as the server describes it.
    """
    name = name or f"{pipeline.name} {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the link, and so does the caller
        return connection.client.run_pipeline(
            experiment_id=experiment,
            job_name=name,
            pipeline_package_path=str(pipeline.path),
            params=dict(values),
            enable_caching=caching,
            service_account=service_account,
        )


def wait(connection: Connection, run_id: str, seconds: float = 5.0) -> Any:
    """Wait until a run has ended, and tell each change of its state.

    Returns:
        The run, as the server describes it.
    """
    before = None
    while True:
        run = connection.client.get_run(run_id)
        if run.state != before:
            print(f"{datetime.datetime.now():%H:%M:%S}  {state(run)}", flush=True)
            before = run.state
        if run.state in ENDED:
            return run
        time.sleep(seconds)


def runs(connection: Connection, experiment: str | None, number: int) -> list[Any]:
    """The newest runs.

    Args:
        experiment: its id; None: of all of the namespace.
    """

    def page(token: str) -> Any:
        return connection.client.list_runs(
            page_token=token,
            page_size=min(number, _PAGE),
            sort_by="created_at desc",
            experiment_id=experiment,
            namespace=connection.namespace or "",
        )

    found = []
    for run in pages(page, "runs"):
        found.append(run)
        if len(found) == number:
            break
    return found


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
