"""`esvit run` with real processes, from images to the printed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from esvit_core.data.ingest.sources import open_source
from esvit_core.runs.run import Run
from esvit_core.storage.embedded import EmbeddedStore
from esvit_pipelines.pretrain.pipeline import build_pretrain_pipeline
from esvit_pipelines.steps import step_names


def headers(output: str) -> list[str]:
    return re.findall(r"^\[\d+/\d+\] (.*)$", output, re.MULTILINE)


def test_every_step_has_its_header_in_order(finished_run: Any, run_there: Run) -> None:
    assert headers(finished_run.output) == step_names(build_pretrain_pipeline(run_there.config))
    assert headers(finished_run.output) == [
        "prepare data",
        "prepare transfer sets",
        "pretrain",
        "extract features",
        "k-NN",
        "linear probe",
        "transfer",
        "visualize",
        "report",
        "promote",
    ]


def test_the_screen_shows_progress_and_no_lines_of_kfp(finished_run: Any) -> None:
    assert re.search(r"^  .*images/s|^  .*/s", finished_run.output, re.MULTILINE)
    for noise in ("KFP Executor", "executor_input", "Traceback", "Warning", "Streamed logs", "finished with status"):
        assert noise not in finished_run.output
    log = (finished_run.here / "run.log").read_text(encoding="utf-8")
    assert "KFP Executor" in log and "step 3: pretrain" in log and "\x1b" not in log


def test_the_output_ends_with_the_results_and_paths(finished_run: Any, run_there: Run) -> None:
    last = finished_run.output.partition("promote")[2]
    assert "baseline" in last and "5-NN" in last and "%" in last
    assert f"out/{finished_run.name}/report.html" in last
    decision = run_there.store.get_json(run_there.at("promotion.json"))
    assert ("promoted  yes" if decision["promoted"] else "promoted  no") in last
    report = (finished_run.here / "report.html").read_text(encoding="utf-8")
    assert report.lower().startswith("<!doctype html>") and finished_run.name in report


def test_the_printed_lines_load_the_backbone(finished_run: Any, tmp_path: Path) -> None:
    lines = [line.strip() for line in finished_run.output.partition("Use it:")[2].strip().splitlines()[:3]]
    assert lines[0].startswith("import") and len(lines) == 3
    code = "\n".join([*lines, "print(tuple(features.shape))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "(1, 32)", done.stderr


def test_the_store_contains_exactly_the_documented_layout(finished_run: Any, run_there: Run) -> None:
    keys = [item.uri.removeprefix("s3://esvit/") for item in run_there.store.list("s3://esvit")]
    places = {key.removeprefix(f"runs/{finished_run.name}/").partition("/")[0] for key in keys}
    assert places <= {
        "config.yaml",
        "events",
        "data",
        "transfer",
        "training",
        "backbone",
        "baseline",
        "features",
        "evaluation",
        "visualization",
        "report",
        "promotion.json",
        "pointers",
    }
    assert all(key.startswith((f"runs/{finished_run.name}/", "pointers/", "features/")) for key in keys)
    assert not [key for key in keys if "tmp" in key or key.endswith(".part")]


def test_a_run_leaves_no_process_and_no_temporary_files(finished_run: Any) -> None:
    ours = [p for p in psutil.process_iter(["cmdline"]) if finished_run.name in " ".join(p.info["cmdline"] or [])]
    assert not ours
    assert sorted(p.name for p in finished_run.here.iterdir()) == [
        ".esvit-folder",
        ".lock",
        "backbone",
        "config.yaml",
        "report.html",
        "report.json",
        "report.md",
        "run.log",
    ]
    assert sorted(p.name for p in finished_run.out.iterdir()) == [finished_run.name, "store"]


def test_the_output_folder_is_ignored_as_a_source(finished_run: Any) -> None:
    with open_source(str(finished_run.folder)) as opened:
        names = {entry.name for entry in opened.entries}
    assert "marks.zip" in names and not [name for name in names if name.startswith("out/")]


def keys_of(run: Any) -> list[str]:
    """Return the access keys and secret keys of the run's store."""
    identities = json.loads((run.out / "store" / "identities.json").read_text(encoding="utf-8"))["identities"]
    return [key for one in identities for pair in one["credentials"] for key in pair.values()]


def test_no_key_is_in_the_log_or_the_files_or_the_store(finished_run: Any, run_there: Run) -> None:
    keys = keys_of(finished_run)
    texts = {str(file): file.read_bytes() for file in finished_run.here.rglob("*") if file.is_file()}
    texts |= {stat.uri: run_there.store.get_bytes(stat.uri) for stat in run_there.store.list("s3://esvit")}
    texts["the screen"] = finished_run.output.encode()
    assert len(keys) >= 2 and len(texts) > 40
    assert not [place for place, text in texts.items() if any(key.encode() in text for key in keys)]


def test_no_key_was_on_a_command_line(finished_run: Any) -> None:
    trained = [line for line in finished_run.commands if "-m esvit_core.training" in line and finished_run.name in line]
    served = [line for line in finished_run.commands if f"-dir={finished_run.out / 'store'}" in line]
    assert trained and served  # the processes were seen while they ran
    assert not [line for line in finished_run.commands if any(key in line for key in keys_of(finished_run))]


def test_the_same_command_reuses_all_steps(finished_run: Any, finished_store: EmbeddedStore, esvit: Any) -> None:
    start = time.monotonic()
    # The store is given by its address, as if it were on another machine.
    again = esvit(*finished_run.arguments, cwd=finished_run.folder, env=finished_store.environment())
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - start < finished_run.seconds / 2
    assert "resumed: finished steps are reused" in again.stdout
    assert headers(again.stdout) == headers(finished_run.output)
    assert again.stdout.count("already done") >= 8
    assert again.stdout.splitlines()[-4:] == finished_run.output.splitlines()[-4:]
    assert finished_store.status() is not None


def test_an_archive_of_another_name_with_the_same_setting_is_another_run(run_there: Run) -> None:
    from esvit_core.runs.run import run_id

    sets = {"marks": "1"}
    name = run_id(run_there.config, "a", sets)
    assert name == run_id(run_there.config, "a", sets) and re.fullmatch(r"micro-[0-9a-f]{10}", name)
    assert name != run_id(run_there.config, "b", sets)
    assert name != run_id(run_there.config, "a", {"marks": "2"})
    assert name != run_id(run_there.config.model_copy(update={"seed": 1}), "a", sets)
    moved = run_there.config.evaluation.transfer[0].model_copy(update={"source": "/elsewhere/marks.zip"})
    evaluation = run_there.config.evaluation.model_copy(update={"transfer": (moved,)})
    assert name == run_id(run_there.config.model_copy(update={"evaluation": evaluation}), "a", sets)


@pytest.mark.parametrize("command", [["store", "ls"], ["store", "status"]])
def test_the_store_can_be_listed(finished_run: Any, finished_store: EmbeddedStore, esvit: Any, command: Any) -> None:
    done = esvit(*command, "--out", finished_run.out)
    assert done.returncode == 0, done.stderr
    expected = f"s3://esvit/runs/{finished_run.name}/backbone/model.safetensors" if "ls" in command else "running at"
    assert expected in done.stdout
