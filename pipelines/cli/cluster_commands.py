"""The commands that are about a cluster: `esvit compile`, `register`, `submit`, `runs`, `schedule`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

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
    account_of,
    asked_of,
    config_of,
    note_local_places,
    note_misfits,
    sent,
    server_at,
    suited,
    version_of,
)
from esvit_pipelines.cli.options import BucketOption, RecipeOption, SetOption, TransferOption
from esvit_pipelines.cli.run_commands import runs_app
from esvit_pipelines.cli.schedule_commands import schedule_app


def register(app: typer.Typer) -> None:
    """Add the commands to the program's."""
    app.command("compile")(compile_)
    app.command("register")(register_)
    app.command("submit")(submit)
    app.add_typer(runs_app, name="runs")
    app.add_typer(schedule_app, name="schedule")


def compile_(
    pipeline: PipelineArgument = "pretrain",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write; default: esvit-<pipeline>.yaml."),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    bucket: BucketOption = None,
) -> None:
    """Write a pipeline as YAML for Kubeflow Pipelines.

    The steps run in the image cluster.image, take the object store's address and keys from Kubernetes secrets, one for
    each kind of step unless cluster.secret names one for all, and get the resources, nodes and volumes that the section
    cluster says. The recipe, the changes of it and the transfer sets are the defaults of the pipeline's parameters, so
    that the one pipeline serves other runs too.
    """
    from esvit_pipelines.cluster.capacity import size_lines
    from esvit_pipelines.cluster.compile import compile_pipeline

    config = config_of(recipe, set_, transfer, bucket)
    output = output or Path(f"esvit-{pipeline}.yaml")
    steps = compile_pipeline(pipeline, config, output)
    print(f"{output}: {len(steps)} steps")
    for number, name in enumerate(steps, 1):
        print(f"  {number:2} {name}")
    print("its pods ask for, and have at most:")
    print("\n".join(size_lines(config)))
    note_local_places(config)


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
    """Put the pipelines on KFP's page "Pipelines", each as a version of what is there.

    The version is named after the package's version, the image and a digest of the compiled pipeline, so that the same
    is registered once. `esvit submit` and `esvit schedule create` refer to it, and register it if it is not there.
    """
    from esvit_pipelines.cluster.compile import PIPELINES
    from esvit_pipelines.cluster.registration import register
    from esvit_pipelines.cluster.submit import package

    asked = asked_of(recipe, set_, transfer, bucket)
    with ExitStack() as stack:
        names = list(pipelines or PIPELINES)
        packages = [stack.enter_context(package(name, asked.pipeline)) for name in names]
        server = stack.enter_context(server_at(host, namespace, token_file, ca_file, ui))
        for name, compiled in zip(names, packages, strict=True):
            ready = stack.enter_context(suited(server, name, compiled, asked))
            found = register(server, ready)
            print(f"{found.pipeline}: version {found.version} {'registered' if found.new else 'is there'}")
            print(f"    {server.link('pipelines', f'{found.pipeline_id}/version/{found.version_id}')}", flush=True)


def submit(
    pipeline: SentArgument = "pretrain",
    data: DataOption = None,
    parameter: ParameterOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the run; default: the pipeline's and the time.")
    ] = None,
    experiment: ExperimentOption = DEFAULT_EXPERIMENT,
    new_experiment: NewExperimentOption = False,
    service_account: AccountOption = None,
    caching: Annotated[
        bool | None,
        typer.Option("--caching/--no-caching", help="Of all steps, with --inline; default: as compiled."),
    ] = None,
    inline: InlineOption = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Show its steps until it has ended; exit code 1 if it failed.")
    ] = False,
    resubmit: Annotated[
        int,
        typer.Option(
            "--resubmit",
            min=0,
            metavar="N",
            help="With --wait: submit it again, at most N times, if it fails for another reason than its input.",
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
    """Run a pipeline on a cluster, once. It is compiled first, as `esvit compile` does.

    The run refers to a version of the pipeline that `esvit register` makes. Ctrl-C while it waits leaves the run alone.
    A session's cookie, where a login page stands before the server, is taken from ESVIT_KFP_COOKIE.
    """
    from esvit_pipelines.cli.run_commands import followed
    from esvit_pipelines.cluster import submit as work
    from esvit_pipelines.cluster.client import experiment_id
    from esvit_pipelines.cluster.follow import Patience

    if resubmit and not wait:
        raise UserError("--resubmit: it needs --wait, since somebody has to see that the run failed")
    if caching is not None and not inline:
        raise UserError(
            "--caching, --no-caching: they change the pipeline, which a version does not allow; add --inline"
        )
    asked = asked_of(recipe, set_, transfer, bucket)
    with (
        sent(pipeline, asked, data, parameter) as (ready, values),
        server_at(host, namespace, token_file, ca_file, ui) as server,
        suited(server, pipeline, ready, asked) as package,
    ):
        note_misfits(server, pipeline, asked)
        folder = experiment_id(server, experiment, new_experiment or experiment == DEFAULT_EXPERIMENT)
        account = account_of(service_account, asked.config)
        version = version_of(server, package, inline)
        name = name or work.run_name(package)
        before = ""
        for attempt in range(1, resubmit + 2):
            title = name if attempt == 1 else f"{name} (attempt {attempt})"
            send = partial(work.submit, server, package, values, title, folder, account, caching, version)
            run = Patience(server, before).ask(send) if before else send()
            before = run.run_id
            print(f"submitted {run.display_name}\n{server.link('runs', run.run_id)}", flush=True)
            if not wait:
                return
            outcome = followed(server, run.run_id)
            if outcome.good:
                return
            if not resubmit:
                break
            if not outcome.worth_repeating:
                print("not submitted again: another attempt would end in the same way")
                break
            if attempt <= resubmit:
                print(f"submitting it again, {attempt} of {resubmit}: its steps find what is done", flush=True)
        raise typer.Exit(1)
