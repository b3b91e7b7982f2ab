"""`esvit submit`: run a pipeline on a cluster."""

from __future__ import annotations

import contextlib
import datetime
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from esvit_core.errors import UserError
from esvit_pipelines.cluster.client import Connection, server_message
from esvit_pipelines.cluster.package import Package
from esvit_pipelines.cluster.registration import Registered


def submit(
    connection: Connection,
    pipeline: Package,
    values: Mapping[str, Any],
    name: str,
    experiment: str,
    service_account: str | None,
    version: Registered | None,
) -> Any:
    """Run a pipeline once, as `kfp run create` does.

    Args:
        values: arguments of the pipeline.
        name: name of the run.
        experiment: id of the experiment.
        service_account: service account of the steps; None: the server's default.
        version: registered version that the run refers to; None: the pipeline is sent with the run.

    Returns:
        The run, as the server describes it.

    Raises:
        UserError: the server does not permit the service account.
    """
    with (
        contextlib.redirect_stdout(io.StringIO()),
        explain_refused_account(connection, service_account),
    ):  # it prints a link
        return connection.client.run_pipeline(
            experiment_id=experiment,
            job_name=name,
            params=dict(values),
            service_account=service_account,
            **pipeline_reference(pipeline, version),
        )


def pipeline_reference(pipeline: Package, version: Registered | None) -> dict[str, str]:
    """Return the arguments of KFP's client that name the pipeline of a run."""
    if version is None:
        return {"pipeline_package_path": str(pipeline.path)}
    return {"pipeline_id": version.pipeline_id, "version_id": version.version_id}


@contextlib.contextmanager
def explain_refused_account(connection: Connection, account: str | None) -> Iterator[None]:
    """Explain what to change if the server refuses, within the block, to run steps with a service account.

    Servers after KFP 2.17.0 permit only their default account and those that ALLOWEDSERVICEACCOUNTS lists. With one
    namespace per user, the user also needs the verb ``use`` on the account.

    Raises:
        UserError: the server refuses the account.
    """
    import kfp_server_api

    try:
        yield
    except kfp_server_api.ApiException as error:
        message = server_message(error)
        about = re.search(r"service ?account", message, re.IGNORECASE) is not None
        if account is None or error.status not in (400, 403) or not about:
            raise
        raise UserError(
            f"service account {account}: {connection.host} does not permit it ({error.status}: {message}); add it "
            f"to the server's list (kubectl -n kubeflow set env deployment/ml-pipeline ALLOWEDSERVICEACCOUNTS={account}; with "
            "one namespace per user, also grant the verb `use` on it), or give --service-account '' for the server's "
            "default"
        ) from None


def run_name(pipeline: Package) -> str:
    """Return the default name of a run: pipeline name and timestamp."""
    return f"{pipeline.name} {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
