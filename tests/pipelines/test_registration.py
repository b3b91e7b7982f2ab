"""Registering pipelines over HTTP, runs that refer to a version, and the service accounts of runs and schedules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cli_checks import Call, assert_error, only
from kfp_server import KfpServer

DIGEST = "1f" * 32


def test_the_three_pipelines_are_registered_once(server: KfpServer, call: Call) -> None:
    code, out, error = call("register")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == ["esvit-pretrain", "esvit-evaluate", "esvit-retrain"]
    assert all(line.endswith("registered") for line in lines[::2])
    assert {one.display_name for one in server.kept["pipelines"].values()} == {
        line.split(":")[0] for line in lines[::2]
    }
    assert all(one.description for one in server.kept["pipelines"].values())
    code, out, _ = call("register")
    assert code == 0 and all(line.endswith("exists already") for line in out.splitlines()[::2])
    assert len(server.kept["pipelines"]) == len(server.kept["versions"]) == 3
    pipeline_id = next(iter(server.kept["pipelines"]))
    assert f"{server.url}/#/pipelines/details/{pipeline_id}/version/" in out


def test_a_version_is_named_after_package_image_and_text(server: KfpServer, call: Call) -> None:
    from esvit_core import __version__

    call("register", "evaluate")
    call("register", "evaluate", "--set", f"cluster.image=registry.example:5000/team/trainer@sha256:{DIGEST}")
    call("register", "evaluate", "--set", "cluster.evaluate.cpu=3")
    names = [one.name for one in server.kept["versions"].values()]
    assert names[0].startswith(f"esvit-evaluate-{__version__}-trainer-")
    assert names[1].startswith(f"esvit-evaluate-{__version__}-trainer-{DIGEST[:12]}-")
    assert len(set(names)) == 3 and names[0][:-12] == names[2][:-12]
    described = [one.description for one in server.kept["versions"].values()]
    assert DIGEST in described[1]


def test_runs_of_the_same_pipeline_refer_to_one_version(server: KfpServer, call: Call) -> None:
    call("register", "evaluate")
    for options in ([], ["--set", "seed=3", "--transfer", "digits=s3://b/digits"]):
        _, out, _ = call("submit", "evaluate", "--data", "s3://b/p", *options)
        assert out.splitlines()[0] == f"pipeline esvit-evaluate, version {only(server.kept['versions']).name}"
    version = only(server.kept["versions"])
    for run in server.kept["runs"].values():
        assert run.pipeline_spec is None
        assert run.pipeline_version_reference.pipeline_id == version.pipeline_id
        assert run.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id


def test_a_foreign_pipeline_is_sent_inline(server: KfpServer, call: Call, compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(compiled.read_text().replace("name: esvit-evaluate", "name: theirs"))
    assert call("submit", tmp_path / "theirs.yaml", "--data", "s3://b/p")[0] == 0
    assert only(server.kept["runs"]).pipeline_spec["pipeline_spec"]["pipelineInfo"]["name"] == "theirs"
    assert not server.kept["pipelines"]


def test_inline_needs_no_rights_on_pipelines(server: KfpServer, call: Call, compiled: Path) -> None:
    server.closed = True
    assert_error(
        call("submit", compiled, "--data", "s3://b/p"), "pipeline esvit-evaluate", "403", "not authorized", "--inline"
    )
    assert call("submit", compiled, "--data", "s3://b/p", "--inline")[0] == 0
    assert only(server.kept["runs"]).pipeline_spec is not None
    server.closed = False
    call("register", "evaluate")
    server.closed = True
    assert_error(
        call("register", "evaluate", "--set", "cluster.evaluate.cpu=3"), "pipeline esvit-evaluate", "400", "--inline"
    )


def test_a_version_that_was_registered_concurrently_is_used(server: KfpServer, call: Call, compiled: Path) -> None:
    call("submit", compiled, "--data", "s3://b/p")
    server.unlisted = 1
    assert call("submit", compiled, "--data", "s3://b/p")[0] == 0
    assert only(server.kept["versions"]).pipeline_version_id == (
        list(server.kept["runs"].values())[1].pipeline_version_reference.pipeline_version_id
    )


def test_each_namespace_has_its_own_pipelines(server: KfpServer, call: Call) -> None:
    server.multi_user = True
    for namespace in ("one", "two"):
        assert call("register", "evaluate", "--namespace", namespace)[0] == 0
    assert [one.namespace for one in server.kept["pipelines"].values()] == ["one", "two"]
    assert len(server.kept["versions"]) == 2


# Service accounts


def test_a_refused_service_account_is_an_error(server: KfpServer, call: Call, compiled: Path) -> None:
    server.accounts = {"other"}
    message = ["service account esvit-pipeline", "403", "ALLOWEDSERVICEACCOUNTS=esvit-pipeline", "--service-account ''"]
    assert_error(call("submit", compiled, "--data", "s3://b/p"), *message)
    schedule = ["schedule", "create", compiled, "--name", "daily", "--every", "1d", "--data", "s3://b/p"]
    assert_error(call(*schedule), *message)
    for options in (["--service-account", "other"], ["--service-account", ""]):
        assert call("submit", compiled, "--data", "s3://b/p", *options)[0] == 0
    accounts = [run.service_account for run in server.kept["runs"].values()]
    assert accounts == ["other", "pipeline-runner"]


def test_without_a_service_account_the_server_uses_its_default(server: KfpServer, call: Call) -> None:
    server.accounts = set()
    assert call("submit", "evaluate", "--data", "s3://b/p", "--set", "cluster.service_account=null")[0] == 0
    assert only(server.kept["runs"]).service_account == "pipeline-runner"


def schedule(call: Call, compiled: Path, *options: Any) -> tuple[int, str, str]:
    arguments = ["schedule", "create", compiled, "--name", "Weekly run", "--every", "7d", "--data", "s3://b/p"]
    return call(*arguments, *options)


def test_a_schedule_keeps_its_account_on_an_old_server(server: KfpServer, call: Call, compiled: Path) -> None:
    """KFP 2.16.1 loses the account of a schedule that refers to a version; its response shows the default account."""
    server.forgetful = True
    code, _, error = schedule(call, compiled)
    assert (code, error) == (0, "")
    made = only(server.kept["recurringruns"])
    assert made.service_account == "esvit-pipeline" and made.pipeline_version_reference.pipeline_version_id is None
    own = server.kept["pipelines"][made.pipeline_version_reference.pipeline_id]
    assert own.display_name == "esvit-evaluate-weekly-run"
    versions = [one for one in server.kept["versions"].values() if one.pipeline_id == own.pipeline_id]
    assert len(versions) == 1  # later registrations do not change what it runs
    assert made.runtime_config.parameters == {"data": "s3://b/p"}
    assert (made.no_catchup, made.max_concurrency, made.mode) == (True, "1", "ENABLE")
    assert made.trigger.periodic_schedule.interval_second == str(7 * 86400)


def test_a_schedule_refers_to_its_version(server: KfpServer, call: Call, compiled: Path) -> None:
    assert schedule(call, compiled)[0] == 0
    made = only(server.kept["recurringruns"])
    assert made.pipeline_version_reference.pipeline_version_id == only(server.kept["versions"]).pipeline_version_id
    server.forgetful = True
    assert schedule(call, compiled, "--replace", "--service-account", "")[0] == 0
    assert only(server.kept["recurringruns"]).pipeline_version_reference.pipeline_version_id is not None


def test_a_schedule_that_is_refused_registers_nothing(server: KfpServer, call: Call, compiled: Path) -> None:
    assert schedule(call, compiled, "--inline")[0] == 0
    assert_error(schedule(call, compiled), "it exists already")
    assert not server.kept["pipelines"]


def test_an_inline_schedule_that_would_lose_its_account_is_not_made(
    server: KfpServer, call: Call, compiled: Path
) -> None:
    server.forgetful = True
    assert_error(schedule(call, compiled, "--inline"), "schedule Weekly run", "does not store", "omit --inline")
    assert not server.kept["recurringruns"]
