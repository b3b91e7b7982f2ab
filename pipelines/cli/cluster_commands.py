"""The cluster commands: `esvit compile`, `register`, `submit`, `runs`, `schedule`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from esvit_core.config.auto import AUTO, split_recipe
from esvit_core.config.parameters import Parameters
from esvit_core.data.ingest.source_lists import join_sources
from esvit_core.errors import UserError
from esvit_pipelines.cli.cluster_options import (
    DEFAULT_EXPERIMENT,
    AccountOption,
    CaOption,
    DataOption,
    ExperimentOption,
    HostOption,
    InlineOption,
    NamespaceOption,
    NewExperimentOption,
    ParameterOption,
    PipelineArgument,
    SentArgument,
    TokenOption,
    UiOption,
    compatible_package,
    config_of,
    connect,
    prepare_submission,
    registered_version,
    request_of,
    service_account_of,
    warn_about_capacity,
    warn_about_local_sources,
)
from esvit_pipelines.cli.options import BucketOption, RecipeOption, SetOption, TransferOption
from esvit_pipelines.cli.run_commands import runs_app
from esvit_pipelines.cli.schedule_commands import schedule_app


def register(app: typer.Typer) -> None:
    """Add the cluster commands to ``app``."""
    app.command("compile")(compile_)
    app.command("register")(register_)
    app.command("submit")(submit)
    app.add_typer(runs_app, name="runs")
    app.add_typer(schedule_app, name="schedule")


def compile_(
    pipeline: PipelineArgument = "pretrain",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Output file; default: esvit-<pipeline>.yaml."),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    bucket: BucketOption = None,
) -> None:
    """Compile a pipeline to YAML for Kubeflow Pipelines.

    The steps run in the image cluster.image. They take the object store's address and keys from Kubernetes secrets: one
    per kind of step, or a common one that cluster.secret names. Resources, nodes and volumes come from the section
    cluster. The recipe, its overrides and the transfer sets become the defaults of the pipeline's parameters, so that
    one compiled pipeline serves other runs too.
    """
    from esvit_pipelines.cluster.capacity import size_lines
    from esvit_pipelines.cluster.compile import compile_pipeline

    form = None
    if pipeline == "pretrain" and split_recipe(recipe or AUTO):
        request = request_of(pipeline, recipe, set_, transfer, bucket)
        config, form = request.compile_config, Parameters(**request.parameters)
    else:
        config = config_of(recipe, set_, transfer, bucket)
    output = output or Path(f"esvit-{pipeline}.yaml")
    steps = compile_pipeline(pipeline, config, output, form)
    print(f"{output}: {len(steps)} steps")
    for number, name in enumerate(steps, 1):
        print(f"  {number:2} {name}")
    print("requests and limits of its pods:")
    print("\n".join(size_lines(config)))
    warn_about_local_sources(config)


def register_(
    pipelines: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PIPELINE]...", show_default=False, help="pretrain, evaluate, retrain; default: all."),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    bucket: BucketOption = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Register the pipelines with Kubeflow Pipelines, each as a version on the page "Pipelines".

    The version is named after the package's version, the image and a digest of the compiled pipeline, so that the same
    pipeline is registered once. `esvit submit` and `esvit schedule create` refer to that version, and register it if it
    does not exist.
    """
    from esvit_pipelines.cluster.compile import PIPELINES
    from esvit_pipelines.cluster.package import package
    from esvit_pipelines.cluster.registration import register

    requests = {name: request_of(name, recipe, set_, transfer, bucket) for name in pipelines or PIPELINES}
    with ExitStack() as stack:
        packages = [stack.enter_context(package(n, r.compile_config, r.form)) for n, r in requests.items()]
        server = stack.enter_context(connect(host, namespace, token_file, ca_file, ui))
        for (name, request), compiled in zip(requests.items(), packages, strict=True):
            ready = stack.enter_context(compatible_package(server, name, compiled, request))
            version = register(server, ready)
            print(f"{version.pipeline}: version {version.version} {'registered' if version.new else 'exists already'}")
            print(f"    {server.link('pipelines', f'{version.pipeline_id}/version/{version.version_id}')}", flush=True)


def submit(
    pipeline: SentArgument = "pretrain",
    data: DataOption = None,
    parameter: ParameterOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Run name; default: pipeline name and timestamp.")] = None,
    experiment: ExperimentOption = DEFAULT_EXPERIMENT,
    new_experiment: NewExperimentOption = False,
    service_account: AccountOption = None,
    inline: InlineOption = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the run until it ends; exit code 1 if it failed.")
    ] = False,
    resubmit: Annotated[
        int,
        typer.Option(
            "--resubmit",
            min=0,
            metavar="N",
            help="With --wait: resubmit a run that failed at most N times, unless its input is invalid.",
        ),
    ] = 0,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    bucket: BucketOption = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Compile a pipeline as `esvit compile` does, and run it once on a cluster.

    The run refers to the version of the pipeline that `esvit register` creates. Ctrl-C stops waiting, not the run. For a
    server behind a login page, set ESVIT_KFP_COOKIE to the session cookie.
    """
    from esvit_pipelines.cli.run_commands import followed
    from esvit_pipelines.cluster import submit as work
    from esvit_pipelines.cluster.client import experiment_id
    from esvit_pipelines.cluster.follow import RetryOnOutage

    if resubmit and not wait:
        raise UserError("--resubmit: it needs --wait, which detects that the run failed; add --wait")
    request = request_of(pipeline, recipe, set_, transfer, bucket)
    with (
        prepare_submission(pipeline, request, join_sources(data) if data else None, parameter) as (made, values),
        connect(host, namespace, token_file, ca_file, ui) as server,
        compatible_package(server, pipeline, made, request) as package,
    ):
        warn_about_capacity(server, pipeline, request)
        experiment_key = experiment_id(server, experiment, new_experiment or experiment == DEFAULT_EXPERIMENT)
        account = service_account_of(service_account, request.config)
        version = registered_version(server, package, inline)
        name = name or work.run_name(package)
        previous = ""
        for attempt in range(1, resubmit + 2):
            title = name if attempt == 1 else f"{name} (attempt {attempt})"
            send = partial(work.submit, server, package, values, title, experiment_key, account, version)
            run = RetryOnOutage(server, previous).call(send) if previous else send()
            previous = run.run_id
            print(f"submitted {run.display_name}\n{server.link('runs', run.run_id)}", flush=True)
            if not wait:
                return
            outcome = followed(server, run.run_id)
            if outcome.succeeded:
                return
            if not resubmit:
                break
            if not outcome.retryable:
                print("not resubmitted: another attempt would fail in the same way")
                break
            if attempt <= resubmit:
                print(f"resubmitting, {attempt} of {resubmit}: finished steps are reused", flush=True)
        raise typer.Exit(1)
