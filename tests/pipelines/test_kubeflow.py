"""Submitting and scheduling over HTTP, against a fake server that uses KFP's own types."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from cli_checks import Call, assert_error, only
from kfp_server import KfpServer

from esvit_pipelines.cluster.schedule import cron, interval

# Submitting


def test_a_pipeline_is_compiled_and_sent_with_what_kubernetes_needs(server: KfpServer, call: Call) -> None:
    options = ["--data", "s3://images/all", "--set", "cluster.train.accelerators=2", "--set", "seed=4"]
    options += ["--transfer", "digits=s3://b/digits", "-p", "run_uri=s3://b/runs/x"]
    code, out, error = call("submit", *options, "--name", "first")
    assert (code, error) == (0, "")
    run = only(server.kept["runs"])
    version = only(server.kept["versions"])
    assert out.splitlines() == [
        f"pipeline esvit-pretrain, version {version.name} (new)",
        "submitted first",
        f"{server.url}/#/runs/details/{run.run_id}",
    ]
    assert run.runtime_config.parameters == {
        "data": "s3://images/all",
        "recipe": "auto",
        "settings": "seed=4",
        "transfer": "digits=s3://b/digits",
        "run_uri": "s3://b/runs/x",
    }
    assert run.service_account == "esvit-pipeline"
    assert run.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id
    assert version.pipeline_spec["pipeline_spec"]["pipelineInfo"]["name"] == "esvit-pretrain"
    pods = version.pipeline_spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert pods["exec-pretrain"]["secretAsEnv"][0]["secretName"] == "esvit-object-store-train"
    form = version.pipeline_spec["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert form["recipe"]["defaultValue"] == "auto" and form["settings"]["defaultValue"] == ""
    assert only(server.kept["experiments"]).display_name == "esvit"


def test_a_compiled_file_is_sent_unchanged(server: KfpServer, call: Call, compiled: Path) -> None:
    code, out, _ = call("submit", compiled, "--data", "s3://b/p", "-p", "backbone=s3://b/runs/x", "--inline")
    assert code == 0 and out.startswith("submitted esvit-evaluate 20")
    run = only(server.kept["runs"])
    assert run.runtime_config.parameters["backbone"] == "s3://b/runs/x"
    tasks = run.pipeline_spec["pipeline_spec"]["root"]["dag"]["tasks"].values()
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks)


def test_recipe_option_sets_the_parameter_of_a_compiled_file(
    server: KfpServer, call: Call, compiled: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text("recipe: own\npromotion: {max_loss: null}\ntraining:\n  epochs: 7\n")
    recipes = {
        str(tmp_path / "own.yaml"): "{recipe: own, training: {epochs: 7}, promotion: {max_loss: null}}",
        "s3://b/own.yaml": "s3://b/own.yaml",
    }
    for recipe, sent in recipes.items():
        server.kept["runs"].clear()
        code, _, error = call("submit", compiled, "--data", "s3://b/p", "--recipe", recipe)
        assert (code, error) == (0, "")
        assert only(server.kept["runs"]).runtime_config.parameters["recipe"] == sent
    server.kept["runs"].clear()
    call("submit", compiled, "--data", "s3://b/p")
    assert only(server.kept["runs"]).runtime_config.parameters == {"data": "s3://b/p"}


def test_runs_with_other_recipes_and_transfer_sets_refer_to_one_version(server: KfpServer, call: Call) -> None:
    sizes = [f"cluster.{role}.{what}" for role in ("train", "evaluate") for what in ("cpu=1", "memory=4Gi")]
    same = [option for size in [*sizes, "cluster.train.cpu_limit=8"] for option in ("--set", size)]
    for more in ([], ["--recipe", "imagenet_vil_2262"], ["--set", "seed=1", "--transfer", "d=s3://b/d"]):
        options = [*same, *more]
        assert call("submit", "--data", "s3://b/p", *options)[0] == 0
    (version,) = server.kept["versions"].values()
    runs = server.kept["runs"].values()
    assert {run.pipeline_version_reference.pipeline_version_id for run in runs} == {version.pipeline_version_id}
    assert [run.runtime_config.parameters["recipe"] for run in runs] == ["auto", "imagenet_vil_2262", "auto"]


def test_a_local_source_gives_a_warning(server: KfpServer, call: Call, compiled: Path) -> None:
    _, out, _ = call("submit", compiled, "--data", "images")
    assert "note: the steps on the cluster read the images from the local path images" in out


def test_arguments_are_checked_before_any_request(server: KfpServer, call: Call, compiled: Path) -> None:
    assert_error(call("submit", compiled), "esvit-evaluate: it requires data; add --data")
    assert_error(call("submit", compiled, "--data", "s3://b/p", "-p", "bakbone=x"), "did you mean 'backbone'")
    assert_error(
        call("submit", compiled, "--data", "s3://b/p", "-p", "configuration={}"),
        "expected name=value with a parameter of",
    )
    assert_error(call("submit", "pretrian", "--data", "s3://b/p"), "did you mean 'pretrain'")
    assert_error(call("submit", "nowhere.yaml"), "nowhere.yaml: cannot be read")
    assert server.requests == []


# Errors of the server


def test_a_missing_host_is_an_error(
    call: Call, compiled: Path, server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    assert_error(
        call("runs"), "--host", "KF_PIPELINES_ENDPOINT", "port-forward", "without a cluster: esvit run, status"
    )


def test_a_wrong_host(server: KfpServer, call: Call) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        port = taken.getsockname()[1]
        assert_error(
            call("runs", "--host", f"http://127.0.0.1:{port}"), f"127.0.0.1:{port}", "Connection refused", expected=75
        )
    assert_error(
        call("runs", "--host", "http://nowhere.invalid"), "nowhere.invalid", "the host does not exist", expected=75
    )
    assert_error(call("runs", "--host", "localhost:8888"), "starts with http:// or https://")
    assert_error(call("runs", "--host", server.url.replace("http:", "https:")), "does not use https", expected=75)


@pytest.mark.parametrize(
    ("release", "retries"), [("2.16.1", False), ("v2.15.0", False), ("2.17.0", True), ("3.0", True), ("unknown", True)]
)
def test_retries_are_compiled_only_for_servers_that_restart_lost_pods(
    server: KfpServer, call: Call, release: str, retries: bool
) -> None:
    server.release = release
    code, out, _ = call("submit", "evaluate", "--data", "s3://b/p", "-p", "backbone=champion", "--inline")
    assert code == 0 and ("retries failed steps but not lost pods" in out) is not retries
    (tasks,) = [run.pipeline_spec["pipeline_spec"]["root"]["dag"]["tasks"] for run in server.kept["runs"].values()]
    assert {"retryPolicy" in task for task in tasks.values()} == {retries}


def test_a_missing_or_rejected_token_is_an_error(server: KfpServer, call: Call, compiled: Path, tmp_path: Path) -> None:
    server.token = "right"
    assert_error(call("runs"), server.url, "it requires a token", "401", "--token-file")
    (tmp_path / "token").write_text("wrong\n")
    assert_error(
        call("submit", compiled, "--data", "s3://b/p", "--token-file", tmp_path / "token"), "it rejects the token"
    )
    assert_error(call("runs", "--token-file", tmp_path / "none"), "--token-file", "No such file")
    (tmp_path / "token").write_text("right\n")
    code, out, error = call("runs", "--token-file", tmp_path / "token")
    assert (code, out, error) == (0, "no runs\n", "")
    assert server.authorization[-1] == "Bearer right"


def test_an_unknown_experiment(server: KfpServer, call: Call, compiled: Path) -> None:
    call("submit", compiled, "--data", "s3://b/p")
    assert_error(call("runs", "--experiment", "other"), "experiment other: it does not exist", "experiments: esvit")
    arguments = ["submit", compiled, "--data", "s3://b/p", "--experiment", "other"]
    assert_error(call(*arguments), "add --new-experiment")
    assert call(*arguments, "--new-experiment")[0] == 0
    assert {e.display_name for e in server.kept["experiments"].values()} == {"esvit", "other"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("v1", "the server is Kubeflow Pipelines 1"),
        ("login", "answers with a web page, probably a login page"),
        ("other", "the server is not Kubeflow Pipelines"),
    ],
)
def test_another_kind_of_server_is_an_error(server: KfpServer, call: Call, kind: str, message: str) -> None:
    server.kind = kind
    assert_error(call("runs"), server.url, message)


def test_a_multi_user_server_needs_a_namespace(server: KfpServer, call: Call, compiled: Path) -> None:
    server.multi_user = True
    assert_error(call("runs"), "give yours with --namespace")
    assert call("submit", compiled, "--data", "s3://b/p", "--namespace", "team")[0] == 0
    assert only(server.kept["experiments"]).namespace == "team"
    assert call("runs", "--namespace", "team")[1].count("esvit-evaluate") == 1


def test_the_error_contains_the_message_of_the_server(server: KfpServer, call: Call, tmp_path: Path) -> None:
    pipeline, platform = yaml.safe_load_all((Path(__file__).parent / "golden" / "evaluate.yaml").read_text())
    pipeline["root"]["inputDefinitions"]["parameters"]["data"]["parameterType"] = "LIST"
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump_all([pipeline, platform]))
    server._check = lambda made: server.refuse(400, "the pipeline is too large")  # type: ignore[method-assign]
    try:
        assert_error(
            call("submit", tmp_path / "odd.yaml", "--inline", "-p", "data=[a]"),
            "it refused the request (400: the pipeline is too large)",
        )
    finally:
        del server._check


# Listing


def test_the_runs_are_listed_with_state_duration_and_link(server: KfpServer, call: Call, compiled: Path) -> None:
    for name in ("one", "two", "three"):
        call("submit", compiled, "--data", "s3://b/p", "--name", name)
    first, second, _ = server.kept["runs"].values()
    server.states = ["SUCCEEDED"]
    server._get("runs", first.run_id)
    lines = call("runs", "--ui", "https://kubeflow.example/_/pipeline/")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["run", "three", "two", "one"]
    assert "succeeded" in lines[3] and "1:07:00" in lines[3]
    assert lines[3].endswith(f"https://kubeflow.example/_/pipeline/#/runs/details/{first.run_id}")
    rows = json.loads(call("runs", "--json", "--number", "2")[1])
    assert [row["name"] for row in rows] == ["three", "two"] and rows[1]["id"] == second.run_id


def test_all_pages_are_read(server: KfpServer, call: Call, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esvit_pipelines.cluster.runs._PAGE", 2)
    call("submit", compiled, "--data", "s3://b/p")
    for number in range(4):
        server.kept["runs"][str(number)] = next(iter(server.kept["runs"].values()))
    assert len(json.loads(call("runs", "--json")[1])) == 5


# Scheduling


def test_a_schedule_is_created_listed_paused_resumed_and_deleted(server: KfpServer, call: Call, compiled: Path) -> None:
    arguments = ["schedule", "create", compiled, "--name", "weekly", "--data", "s3://b/p"]
    code, out, error = call(*arguments, "--cron", "0 0 3 * * MON")
    assert (code, error) == (0, "") and out.startswith("pipeline esvit-evaluate, version ")
    assert "scheduled weekly, cron 0 0 3 * * MON\n" in out
    made = only(server.kept["recurringruns"])
    assert (made.no_catchup, made.max_concurrency, made.mode) == (True, "1", "ENABLE")
    assert made.trigger.cron_schedule.cron == "0 0 3 * * MON" and made.service_account == "esvit-pipeline"
    assert made.runtime_config.parameters == {"data": "s3://b/p"}
    assert "weekly    enabled  cron 0 0 3 * * MON" in call("schedule", "list")[1]
    assert call("schedule", "pause", "weekly")[1] == "paused weekly\n" and made.status == "DISABLED"
    assert call("schedule", "resume", made.recurring_run_id)[1] == "resumed weekly\n" and made.status == "ENABLED"
    assert call("schedule", "delete", "weekly")[1] == "deleted weekly\n"
    assert call("schedule", "list")[1] == "no schedules\n"
    assert_error(call("schedule", "pause", "weekly"), "schedule weekly: it does not exist")


def test_the_documented_weekly_retraining_works(
    server: KfpServer, call: Call, micro_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(micro_recipe.parent)
    micro_recipe.with_name("my-recipe.yaml").write_text(micro_recipe.read_text())
    code, out, error = call(*documented("esvit schedule create retrain", "retrain")[1:])
    assert (code, error) == (0, "") and "scheduled weekly, cron 0 0 3 * * 1\n" in out
    made = only(server.kept["recurringruns"])
    assert (made.no_catchup, made.max_concurrency) == (True, "1")
    version = server.kept["versions"][made.pipeline_version_reference.pipeline_version_id]
    assert version.pipeline_spec["pipeline_spec"]["pipelineInfo"]["name"] == "esvit-retrain"


def test_an_existing_schedule_is_replaced_only_with_replace(server: KfpServer, call: Call, compiled: Path) -> None:
    arguments = ["schedule", "create", compiled, "--name", "daily", "--data", "s3://b/p", "--every", "1d"]
    assert call(*arguments, "--paused")[0] == 0
    before = only(server.kept["recurringruns"])
    assert before.status == "DISABLED" and before.trigger.periodic_schedule.interval_second == "86400"
    assert_error(call(*arguments), "it exists already; add --replace")
    assert call(*arguments, "--replace")[0] == 0
    assert only(server.kept["recurringruns"]).recurring_run_id != before.recurring_run_id


def test_a_schedule_with_an_active_run_is_not_deleted(server: KfpServer, call: Call, compiled: Path) -> None:
    arguments = ["schedule", "create", compiled, "--name", "daily", "--data", "s3://b/p", "--every", "1d"]
    assert call(*arguments)[0] == 0
    assert call("submit", compiled, "--data", "s3://b/p", "--name", "daily-1")[0] == 0
    schedule, run = only(server.kept["recurringruns"]), only(server.kept["runs"])
    run.recurring_run_id = schedule.recurring_run_id
    for refused in (call("schedule", "delete", "daily"), call(*arguments, "--replace")):
        assert_error(refused, "schedule daily: its run daily-1", "is active", "--now")
    assert only(server.kept["recurringruns"]) is schedule
    run.state = "FAILED"
    assert call(*arguments, "--replace")[0] == 0
    run.state, run.recurring_run_id = "RUNNING", only(server.kept["recurringruns"]).recurring_run_id
    assert call("schedule", "delete", "daily", "--now")[1] == "deleted daily\n"


def test_cron_and_interval_are_checked_before_any_request(server: KfpServer, call: Call, compiled: Path) -> None:
    arguments = ["schedule", "create", compiled, "--name", "a", "--data", "s3://b/p"]
    assert_error(call(*arguments), "either --cron", "--every")
    assert_error(call(*arguments, "--cron", "0 3 * * 1"), "write '0 0 3 * * 1'")
    assert_error(call(*arguments, "--every", "weekly"), "such as 12h or 7d")
    assert server.requests == []


@given(st.integers(1, 10**6), st.sampled_from("smhdw"))
def test_an_interval_is_converted_to_seconds(number: int, unit: str) -> None:
    assert interval(f"{number}{unit}") == number * interval(f"1{unit}") == number * interval(f"1{unit}")


# The documented commands of KFP's own command line


def documented(marker: str, page: str = "submit") -> list[str]:
    """Split the line of a page in docs/ that starts with ``marker`` into words."""
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith(marker)]
    import shlex

    return shlex.split(line)


def test_the_documented_kfp_commands_work(server: KfpServer, compiled: Path, tmp_path: Path) -> None:
    """They run in one process, because each start of KFP's command line takes a second."""
    lines = [documented("kfp --endpoint $HOST run create"), documented("kfp --endpoint $HOST recurring-run create")]
    words = [[server.url if word == "$HOST" else word for word in line[1:]] for line in lines]
    words = [[str(compiled) if word.endswith(".yaml") else word for word in line] for line in words]
    code = "import json, sys\nfrom kfp.cli.__main__ import main\nfrom unittest import mock\n"
    code += "for words in json.loads(sys.argv[1]):\n    sys.argv[1:] = words\n"
    code += "    try: main()\n    except SystemExit as stop: assert not stop.code, stop.code\n"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run, made = only(server.kept["runs"]), only(server.kept["recurringruns"])
    assert run.runtime_config.parameters["data"] == made.runtime_config.parameters["data"] == "s3://my-bucket/images"
    assert (made.no_catchup, made.max_concurrency, made.mode) == (True, "1", "ENABLE")
    assert made.trigger.cron_schedule.cron == cron("0 0 3 * * 1")
