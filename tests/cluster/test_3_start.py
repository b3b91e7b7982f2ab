"""Every way to start a run: a schedule, KFP's own command line, and the user interface."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser
from cluster_settings import Settings
from evidence import Saw
from kube import wait_for
from runs import Cli, Runs

from esvit_core.storage import ObjectStore


@pytest.fixture
def stored_recipe(cli: Cli, store: ObjectStore, stamp: str) -> str:
    """The suite's recipe in the store, where a run that is created in the user interface finds it."""
    address = f"s3://esvit/test/{stamp}/few-steps.yaml"
    store.put_bytes(address, cli.recipe.read_bytes())
    return address


def test_register(cli: Cli, saw: Saw) -> None:
    """`esvit register` puts the pipelines on the Pipelines page, and finds them there the second time."""
    changes = [item for one in cli.short for item in ("--set", one)]
    for _ in range(2):
        done = cli.run("register", *changes)
        saw.command(done)
        assert done.returncode == 0


@pytest.fixture(scope="module")
def by_kfp(cli: Cli, settings: Settings, unlabelled: str, stamp: str, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The output of `kfp run create` for a file that `esvit compile` wrote; its run goes on beside the other tests."""
    changes = [item for one in cli.short for item in ("--set", one)]
    file = tmp_path_factory.mktemp("compiled") / "pretrain.yaml"
    compiled = cli.run("compile", "pretrain", "--recipe", str(cli.recipe), *changes, "-o", str(file))
    assert compiled.returncode == 0, compiled.stderr
    kfp = str(Path(sys.executable).with_name("kfp"))
    return subprocess.run(
        ["kfp", "--endpoint", settings.kfp, "run", "create", "--experiment-name", "esvit",
         "--run-name", f"kfp run create {stamp}", "--package-file", str(file), f"data={unlabelled}"],
        executable=kfp, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def _run_of(runs: Runs, schedule: str):  # type: ignore[no-untyped-def]
    found = runs.client.list_runs(page_size=20, sort_by="created_at desc").runs or []
    return next((run for run in found if schedule in run.display_name), None)


@pytest.fixture(scope="module")
def schedule(cli: Cli, stamp: str) -> Iterator[str]:
    """Name of the schedule that is made; what is left of it is deleted."""
    name = f"every-minute-{stamp}"
    yield name
    cli.run("schedule", "delete", name, "--now")


def test_schedule(
    cli: Cli, runs: Runs, by_kfp: subprocess.CompletedProcess[str], labelled: str, schedule: str, saw: Saw
) -> None:
    """A schedule starts a run by itself with the service account that was asked for, and stays while that goes on."""
    changes = [item for one in cli.short for item in ("--set", one)]
    made = cli.run(
        "schedule", "create", "retrain", "--name", schedule, "--every", "1m", "--data", labelled,
        "--recipe", str(cli.recipe), *changes,
    )  # fmt: skip
    saw.command(made)
    assert made.returncode == 0
    run = wait_for("a run of the schedule", lambda: _run_of(runs, schedule), 240, every=5)
    paused = cli.run("schedule", "pause", schedule)
    assert paused.returncode == 0, paused.stderr
    refused = cli.run("schedule", "delete", schedule)
    saw.command(refused)
    assert refused.returncode == 2 and run.run_id in refused.stderr
    pod = wait_for("a pod of the run", lambda: next(iter(runs.pods(run.run_id, phase=None)), None), 300)
    account = pod["spec"]["serviceAccountName"]
    saw(f"run {run.display_name} was started by the schedule; its pods have the account {account}")
    assert account == "esvit-pipeline"


def test_user_interface(
    settings: Settings, cli: Cli, runs: Runs, labelled: str, stored_recipe: str, stamp: str, saw: Saw,
    needs: Callable[..., None],
) -> None:  # fmt: skip
    """A run is created in the user interface, and its graph, report and comparison are looked at."""
    needs("ui")
    changes = [item for one in cli.short for item in ("--set", one)]
    registered = cli.run("register", *changes).stdout
    found = re.search(r"esvit-pretrain: .*\n.*#(/pipelines/details/\S+)", registered)
    assert found, registered
    version = found[1]
    with Browser(settings) as browser:
        name = f"from the page {stamp}"
        parameters = {"data": labelled, "recipe": stored_recipe, "settings": "seed=3"}
        browser.create_run(version, name, "esvit", parameters, saw)
        run = wait_for("the run", lambda: _run_of(runs, name), 90)
        saw(f"SUCCEEDED after {runs.wait(run.run_id):.0f} s")
        browser.graph(run.run_id, saw)
        browser.step(run.run_id, "knn", saw)
        browser.artifact(run.run_id, "report", "html", "Lineage", saw)
        browser.artifact(run.run_id, "report", "metrics", "knn/1 (baseline)", saw)
        browser.artifact(run.run_id, "linear-probe", "confusion", "Predicted label", saw)
        ended = [one.run_id for one in runs.client.list_runs(page_size=50, sort_by="created_at desc").runs or []
                 if one.state == "SUCCEEDED" and ("labelled" in one.display_name or one.run_id == run.run_id)]  # fmt: skip
        assert "knn/5" in browser.compare(ended[:3], saw)


def test_kfp_run_create(runs: Runs, by_kfp: subprocess.CompletedProcess[str], stamp: str, saw: Saw) -> None:
    """`kfp run create` runs what `esvit compile` wrote."""
    saw.command(by_kfp, last=8)
    assert by_kfp.returncode == 0
    run = wait_for("the run", lambda: _run_of(runs, f"kfp run create {stamp}"), 60)
    runs.wait(run.run_id)
    saw("SUCCEEDED")


def test_scheduled_run_ends(cli: Cli, runs: Runs, schedule: str, saw: Saw) -> None:
    """The schedule's run succeeds, and the schedule can be deleted then."""
    run = wait_for("a run of the schedule", lambda: _run_of(runs, schedule), 10)
    runs.wait(run.run_id)
    saw(f"{run.display_name}: SUCCEEDED")
    deleted = cli.run("schedule", "delete", schedule)
    saw.command(deleted)
    assert deleted.returncode == 0
