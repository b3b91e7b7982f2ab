"""`esvit schedule`: a pipeline that runs again and again on a cluster, as `kfp recurring-run create` has it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_pipelines.cluster.client import Connection, pages
from esvit_pipelines.cluster.runs import ENDED, table_width
from esvit_pipelines.cluster.submit import Package, account_allowed, source

if TYPE_CHECKING:
    from esvit_pipelines.cluster.registration import Registered

_PAGE = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
# Seconds come first: KFP reads cron with github.com/robfig/cron.
_FIELDS: tuple[tuple[str, int, int, list[str]], ...] = (
    ("second", 0, 59, []),
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of the month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)


def cron(text: str) -> str:
    """A cron expression as KFP wants it: second, minute, hour, day of the month, month, day of the week.

    Raises:
        UserError: it is not one. Five fields, as everywhere else, would run at other times than meant.
    """
    fields = text.split()
    if len(fields) == 5:
        raise UserError(f"--cron '{text}': KFP's cron begins with the second; write '0 {text}'")
    if len(fields) != 6:
        raise UserError(
            f"--cron '{text}': expected six fields, second minute hour day month weekday, such as '0 0 3 * * 1' "
            "(Mondays at 3:00)"
        )
    for field, (what, low, high, names) in zip(fields, _FIELDS, strict=True):
        if not all(_fits(part, low, high, names, what.startswith("day")) for part in field.split(",")):
            raise UserError(f"--cron '{text}': {field} is no {what}; expected {low} to {high}, *, a-b, or */n")
    return " ".join(fields)


def _fits(part: str, low: int, high: int, names: list[str], day: bool) -> bool:
    span, slash, step = part.partition("/")
    if slash and not (step.isdecimal() and step.isascii() and int(step) > 0):
        return False
    if span == "*" or (span == "?" and day):
        return True
    values = [_value(end, low, names) for end in span.split("-")]
    if len(values) > 2 or any(value is None or not low <= value <= high for value in values):
        return False
    return values == sorted(v for v in values if v is not None)


def _value(text: str, low: int, names: list[str]) -> int | None:
    if text.upper() in names:
        return names.index(text.upper()) + low
    return int(text) if text.isdecimal() and text.isascii() else None


def interval(text: str) -> int:
    """Seconds of an interval such as ``12h`` or ``7d``.

    Raises:
        UserError: it is not one.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhdw])", text)
    if match is None:
        raise UserError(f"--every {text}: expected a number and s, m, h, d or w, such as 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def schedules(connection: Connection, experiment: str | None = None) -> list[Any]:
    """The schedules of the namespace, or of one experiment."""

    def page(token: str) -> Any:
        return connection.client.list_recurring_runs(
            page_token=token,
            page_size=_PAGE,
            sort_by="created_at desc",
            experiment_id=experiment,
            namespace=connection.namespace or "",
        )

    return list(pages(page, "recurring_runs"))


def of_name(connection: Connection, experiment: str, name: str, replace: bool) -> list[Any]:
    """The schedules of that name in an experiment.

    Args:
        replace: they may be there.

    Raises:
        UserError: they may not, or a run of one has not ended.
    """
    there = [one for one in schedules(connection, experiment) if one.display_name == name]
    if there and not replace:
        raise UserError(f"schedule {name}: there is one of that name; --replace puts the new one in its place")
    for one in there:
        without_runs(connection, one)
    return there


def without_runs(connection: Connection, schedule: Any) -> None:
    """Refuse to delete a schedule while one of its runs is under way.

    The runs' workflows belong to the schedule: Kubernetes deletes them with it, and their pods.

    Raises:
        UserError: a run has not ended.
    """
    wanted = {"operation": "EQUALS", "key": "recurring_run_id", "stringValue": schedule.recurring_run_id}
    newest = connection.client.list_runs(
        page_size=_PAGE,
        sort_by="created_at desc",
        namespace=connection.namespace or "",
        filter=json.dumps({"predicates": [wanted]}),
    )
    for run in newest.runs or []:
        if run.state not in ENDED:
            raise UserError(
                f"schedule {schedule.display_name}: its run {run.display_name} ({run.run_id}) has not ended, and would be "
                "deleted with the schedule; expected: no run under way. `esvit schedule pause` starts no more of them: "
                "wait for the end of this one, or delete with --now"
            )


def create(
    connection: Connection,
    pipeline: Package,
    values: Mapping[str, Any],
    name: str,
    experiment: str,
    trigger: Mapping[str, Any],
    service_account: str | None,
    paused: bool,
    version: Registered | None,
    there: Sequence[Any] = (),
) -> Any:
    """Make a schedule: one run at a time, and none for the times that were missed.

    Args:
        values: the arguments of every run.
        experiment: its id.
        trigger: ``cron_expression`` or ``interval_second``.
        service_account: of the steps; None: the server's default.
        paused: it waits to be resumed.
        version: that its runs refer to; None: the pipeline is kept with the schedule.
        there: schedules that give way to it. KFP cannot change a schedule.

    Returns:
        The schedule, as the server describes it.

    Raises:
        UserError: the server does not allow, or does not keep, the service account.
    """
    with account_allowed(connection, service_account):
        made = connection.client.create_recurring_run(
            experiment_id=experiment,
            job_name=name,
            max_concurrency=1,
            no_catchup=True,
            params=dict(values),
            enabled=not paused,
            service_account=service_account,
            **source(pipeline, version),
            **trigger,
        )
    if service_account is not None and made.service_account != service_account:
        connection.client.delete_recurring_run(made.recurring_run_id)
        made = _create_without_version(connection, pipeline, made, service_account, version)
    for one in there:
        connection.client.delete_recurring_run(one.recurring_run_id)
    return made


def _create_without_version(
    connection: Connection, pipeline: Package, made: Any, service_account: str, version: Registered | None
) -> Any:
    """Make a schedule again whose service account the server has not kept.

    KFP 2.16.1 and older compile a pipeline that is pinned to a version when the schedule is made, with the server's
    default account. A schedule that names no version is compiled when a run begins, with the account that was asked
    for. It would follow the newest version of its pipeline, and so it gets a pipeline of its own with one version.

    Raises:
        UserError: the pipeline may not be registered.
    """
    import kfp_server_api

    from esvit_pipelines.cluster.registration import register

    name = str(made.display_name)
    if version is None:
        raise UserError(
            f"schedule {name}: {connection.host} does not keep the service account {service_account} of a schedule "
            f"that holds its pipeline (KFP 2.16.1 and older; it would run as {made.service_account}); leave --inline "
            "out, or give --service-account '' for the server's default"
        )
    alone = register(connection, pipeline, f"{pipeline.name}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}")
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        experiment_id=made.experiment_id,
        mode=made.mode,
        trigger=made.trigger,
        runtime_config=made.runtime_config,
        max_concurrency=made.max_concurrency,
        no_catchup=made.no_catchup,
        service_account=service_account,
        pipeline_version_reference={"pipeline_id": alone.pipeline_id},
    )
    with connection.api() as api:
        return kfp_server_api.RecurringRunServiceApi(api).recurring_run_service_create_recurring_run(body)


def find(connection: Connection, name: str) -> Any:
    """The schedule of that name, or of that id or its beginning.

    Raises:
        UserError: there is none, or more than one.
    """
    known = schedules(connection)
    found = [one for one in known if one.display_name == name]
    found = found or [one for one in known if one.recurring_run_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(one.recurring_run_id for one in found)
        raise UserError(f"schedule {name}: there are {len(found)} of that name; give the id of one: {ids}")
    names = ", ".join(one.display_name for one in known) or "none"
    raise UserError(f"schedule {name}: there is none at {connection.host}; it has {names}")


def show(connection: Connection, found: Sequence[Any], as_json: bool) -> None:
    """Print schedules: a table, or JSON for programs."""
    rows = [
        {
            "id": one.recurring_run_id,
            "name": one.display_name,
            "state": str(one.status or "unknown").lower(),
            "when": when(one),
            "link": connection.link("recurringrun", one.recurring_run_id),
        }
        for one in found
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("no schedules")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("schedule", "state", "when", "link", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["state"], row["when"], row["link"])
    Console(width=max(Console().width, table_width(table)), soft_wrap=True).print(table)


def when(one: Any) -> str:
    """What starts the runs of a schedule, in words."""
    if one.trigger and one.trigger.cron_schedule:
        return f"cron {one.trigger.cron_schedule.cron}"
    if one.trigger and one.trigger.periodic_schedule:
        return f"every {format_duration(float(one.trigger.periodic_schedule.interval_second))}"
    return "never"
