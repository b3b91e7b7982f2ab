"""`esvit schedule`: recurring runs of a pipeline on a cluster, as `kfp recurring-run create` makes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_pipelines.cluster.client import Connection, pages
from esvit_pipelines.cluster.package import Package
from esvit_pipelines.cluster.runs import ENDED, table_width
from esvit_pipelines.cluster.submit import explain_refused_account, pipeline_reference

if TYPE_CHECKING:
    from esvit_pipelines.cluster.registration import Registered

_PAGE = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def cron(text: str) -> str:
    """Check the number of fields of a KFP cron expression: second, minute, hour, day, month, weekday.

    The server validates the fields. It would accept the usual five fields, and run at other times than intended.

    Raises:
        UserError: the expression does not have six fields.
    """
    fields = text.split()
    if len(fields) == 5:
        raise UserError(f"--cron '{text}': the first field of KFP's cron is the second; write '0 {text}'")
    if len(fields) != 6:
        raise UserError(
            f"--cron '{text}': expected six fields, second minute hour day month weekday, such as '0 0 3 * * 1' "
            "(Mondays at 3:00)"
        )
    return " ".join(fields)


def interval(text: str) -> int:
    """Convert an interval such as ``12h`` or ``7d`` to seconds.

    Raises:
        UserError: the text is not an interval.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhdw])", text)
    if match is None:
        raise UserError(f"--every {text}: expected a number with the unit s, m, h, d or w, such as 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def schedules(connection: Connection, experiment: str | None = None) -> list[Any]:
    """List the schedules of the namespace, or of one experiment, given by its id."""

    def page(token: str) -> Any:
        return connection.client.list_recurring_runs(
            page_token=token,
            page_size=_PAGE,
            sort_by="created_at desc",
            experiment_id=experiment,
            namespace=connection.namespace or "",
        )

    return list(pages(page, "recurring_runs"))


def schedules_to_replace(connection: Connection, experiment: str, name: str, replace: bool) -> list[Any]:
    """Find the schedules of that name in an experiment, which a new one replaces.

    Args:
        replace: allow such schedules to exist.

    Raises:
        UserError: one exists and ``replace`` is false, or one has an active run.
    """
    existing = [one for one in schedules(connection, experiment) if one.display_name == name]
    if existing and not replace:
        raise UserError(f"schedule {name}: it exists already; add --replace, or give another --name")
    for one in existing:
        require_no_active_run(connection, one)
    return existing


def require_no_active_run(connection: Connection, schedule: Any) -> None:
    """Raise an error if a run of the schedule is active.

    The schedule owns the runs' workflows: Kubernetes deletes them and their pods together with it.

    Raises:
        UserError: a run has not ended.
    """
    predicate = {"operation": "EQUALS", "key": "recurring_run_id", "stringValue": schedule.recurring_run_id}
    newest = connection.client.list_runs(
        page_size=_PAGE,
        sort_by="created_at desc",
        namespace=connection.namespace or "",
        filter=json.dumps({"predicates": [predicate]}),
    )
    for run in newest.runs or []:
        if run.state not in ENDED:
            raise UserError(
                f"schedule {schedule.display_name}: its run {run.display_name} ({run.run_id}) is active, and its pods "
                "would be deleted with the schedule; run `esvit schedule pause` to start no more runs and wait until this "
                "one has ended, or delete with --now"
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
    replaced: Sequence[Any] = (),
) -> Any:
    """Create a schedule that starts one run at a time and does not catch up on missed times.

    Args:
        values: arguments of every run.
        name: name of the schedule.
        experiment: id of the experiment.
        trigger: ``cron_expression`` or ``interval_second``.
        service_account: service account of the steps; None: the server's default.
        paused: create the schedule disabled.
        version: registered version that its runs refer to; None: the schedule stores the pipeline.
        replaced: schedules to delete afterwards. KFP cannot change a schedule.

    Returns:
        The schedule, as the server describes it.

    Raises:
        UserError: the server does not permit, or does not store, the service account.
    """
    with explain_refused_account(connection, service_account):
        created = connection.client.create_recurring_run(
            experiment_id=experiment,
            job_name=name,
            max_concurrency=1,
            no_catchup=True,
            params=dict(values),
            enabled=not paused,
            service_account=service_account,
            **pipeline_reference(pipeline, version),
            **trigger,
        )
    if service_account is not None and created.service_account != service_account:
        connection.client.delete_recurring_run(created.recurring_run_id)
        created = _create_without_version(connection, pipeline, created, service_account, version)
    for schedule in replaced:
        connection.client.delete_recurring_run(schedule.recurring_run_id)
    return created


def _create_without_version(
    connection: Connection, pipeline: Package, lost: Any, service_account: str, version: Registered | None
) -> Any:
    """Recreate a schedule whose service account the server has not stored.

    For a schedule that names a version, KFP 2.16.1 and older compile the pipeline when the schedule is created, with the
    server's default account. For one that names no version, they compile when a run starts, with the requested account.
    Such a schedule follows the newest version of its pipeline, so it gets a pipeline of its own with a single version.

    Raises:
        UserError: the server does not permit registering the pipeline.
    """
    import kfp_server_api

    from esvit_pipelines.cluster.registration import register

    name = str(lost.display_name)
    if version is None:
        raise UserError(
            f"schedule {name}: {connection.host} does not store the service account {service_account} of a schedule "
            f"with an inline pipeline (KFP 2.16.1 and older; its runs would use {lost.service_account}); omit --inline, "
            "or give --service-account '' for the server's default"
        )
    alone = register(connection, pipeline, f"{pipeline.name}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}")
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        experiment_id=lost.experiment_id,
        mode=lost.mode,
        trigger=lost.trigger,
        runtime_config=lost.runtime_config,
        max_concurrency=lost.max_concurrency,
        no_catchup=lost.no_catchup,
        service_account=service_account,
        pipeline_version_reference={"pipeline_id": alone.pipeline_id},
    )
    with connection.api() as api:
        return kfp_server_api.RecurringRunServiceApi(api).recurring_run_service_create_recurring_run(body)


def find(connection: Connection, name: str) -> Any:
    """Find a schedule by its name, its id, or a prefix of the id.

    Raises:
        UserError: no schedule matches, or several do.
    """
    known = schedules(connection)
    matches = [schedule for schedule in known if schedule.display_name == name]
    matches = matches or [schedule for schedule in known if schedule.recurring_run_id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(schedule.recurring_run_id for schedule in matches)
        raise UserError(f"schedule {name}: {len(matches)} schedules match; give the id of one: {ids}")
    names = ", ".join(schedule.display_name for schedule in known) or "none"
    raise UserError(f"schedule {name}: it does not exist at {connection.host}; expected one of: {names}")


def show(connection: Connection, listed: Sequence[Any], as_json: bool) -> None:
    """Print schedules as a table or as JSON."""
    rows = [
        {
            "id": schedule.recurring_run_id,
            "name": schedule.display_name,
            "state": str(schedule.status or "unknown").lower(),
            "trigger": trigger_text(schedule),
            "link": connection.link("recurringrun", schedule.recurring_run_id),
        }
        for schedule in listed
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("no schedules")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("schedule", "state", "trigger", "link", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["state"], row["trigger"], row["link"])
    Console(width=max(Console().width, table_width(table)), soft_wrap=True).print(table)


def trigger_text(schedule: Any) -> str:
    """Describe what triggers the runs of a schedule."""
    if schedule.trigger and schedule.trigger.cron_schedule:
        return f"cron {schedule.trigger.cron_schedule.cron}"
    if schedule.trigger and schedule.trigger.periodic_schedule:
        return f"every {format_duration(float(schedule.trigger.periodic_schedule.interval_second))}"
    return "never"
