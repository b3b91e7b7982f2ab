"""Invalid input ends with one line that says what to do and exit code 2, before anything starts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_checks import Call

from esvit_core.errors import TRY_AGAIN_EXIT_CODE
from esvit_core.storage.embedded import EmbeddedStore

GARBLED = b"\x00\x01 this is no archive " * 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any, micro_recipe: Path) -> Path:
    made = tmp_path_factory.mktemp("mistakes")
    images.folder(made / "good", ["a", "b"], 25)
    (made / "empty").mkdir()
    (made / "empty" / "notes.txt").write_text("no images here")
    (made / "broken.zip").write_bytes(GARBLED)
    (made / "broken.tar.gz").write_bytes(GARBLED)
    (made / "wrong.yaml").write_text("training: {epoch: 3}\n")
    (made / "notyaml.yaml").write_text("a: [1,\n")
    (made / "file").write_text("x")
    (made / "garbage" / "a").mkdir(parents=True)
    for number in range(4):
        (made / "garbage" / "a" / f"{number}.png").write_bytes(GARBLED)
    return made


MISTAKES = {
    "no such folder": (["--data", "nowhere"], r"nowhere"),
    "a folder without images": (["--data", "empty"], r"empty.*no (images|images)"),
    "an archive that cannot be read": (["--data", "broken.zip"], r"broken\.zip"),
    "a tar that cannot be read": (["--data", "broken.tar.gz"], r"broken\.tar\.gz"),
    "a recipe that does not exist": (["--data", "good", "--recipe", "demoo"], r"demoo.*did you mean 'demo'"),
    "a recipe with a wrong key": (
        ["--data", "good", "--recipe", "wrong.yaml"],
        r"wrong\.yaml.*'training\.epoch'.*did you mean 'training\.epochs'",
    ),
    "a recipe that is not YAML": (["--data", "good", "--recipe", "notyaml.yaml"], r"notyaml\.yaml.*not valid YAML"),
    "an unknown key": (["--data", "good", "--set", "training.epoch=3"], r"did you mean 'training\.epochs'"),
    "a value of the wrong type": (["--data", "good", "--set", "training.epochs=many"], r"training\.epochs.*'many'"),
    "a transfer set without a source": (["--data", "good", "--transfer", "digits"], r"NAME=SOURCE"),
    "a transfer set that does not exist": (["--data", "good", "--transfer", "digits=nowhere.zip"], r"nowhere\.zip"),
    "a transfer set with a bad name": (["--data", "good", "--transfer", "A b=good"], r"--transfer.*'A b'"),
    "an out that is a file": (["--data", "good", "--out", "file"], r"--out file"),
    "an out with a comma": (["--data", "good", "--out", "a,b"], r"--out a,b: has a comma in its path.*another folder"),
    "too few images": (["--data", "garbage"], r"garbage: 4 images; a training needs at least 50; add images"),
    "hours for a recipe with epochs": (["--data", "good", "--recipe", "demo", "--hours", "2"], r"--hours 2: no effect"),
    "an explanation of another recipe": (["--data", "good", "--recipe", "demo", "--explain"], r"recipe show demo"),
    "no data": ([], r"--data"),
    "two sources, one of which has no images": (["--data", "good", "--data", "empty"], r"empty: no images in it"),
    "weights of other sources": (
        ["--data", "good", "--data", "good", "--set", "data.weights=[1, 2, 3]"],
        r"data\.weights has 3 weights, and there are 2 sources.*expected one weight each",
    ),
    "an unknown option": (["--data", "good", "--epochs", "3"], r"--epochs"),
}


def assert_error(done: subprocess.CompletedProcess[str], pattern: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and re.search(pattern, line), line
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("name", MISTAKES)
def test_the_error_is_one_line(name: str, folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments, pattern = MISTAKES[name]
    out = [] if "--out" in arguments else ["--out", folder / "out"]
    code, printed, error = call("run", *arguments, *out)
    assert_error(subprocess.CompletedProcess([], code, printed, error), pattern)
    assert not (folder / "out").exists(), "it was noticed before anything was started"


def test_unreadable_images_end_the_step(folder: Path, tmp_path: Path, esvit: Any, micro_recipe: Path) -> None:
    done = esvit("run", "--data", "garbage", "--recipe", micro_recipe, "--out", tmp_path / "out", cwd=folder)
    assert_error(done, r"prepare data: .*garbage")
    assert "[1/10] prepare data" in done.stdout and "pretrain" not in done.stdout
    (here,) = (tmp_path / "out").glob("micro-*")
    status = " ".join(esvit("status", here.name, "--out", tmp_path / "out").stdout.split())
    assert "prepare data failed on" in status and "garbage" in status and f"the log is {here / 'run.log'}" in status


def test_a_rejected_store_key_is_an_error(folder: Path, tmp_path: Path, esvit: Any) -> None:
    server = EmbeddedStore(tmp_path / "server")
    server.start()
    try:
        keys = {**server.environment(), "ESVIT_S3_SECRET_KEY": "not-the-key"}
        done = esvit("run", "--data", "good", "--out", tmp_path / "out", cwd=folder, env=keys)
        assert_error(done, re.escape(keys["ESVIT_S3_ENDPOINT"].rpartition("//")[2]))
        assert "not-the-key" not in done.stdout + done.stderr
    finally:
        server.stop()


def test_a_store_that_does_not_answer(folder: Path, tmp_path: Path, esvit: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        port = taken.getsockname()[1]
        keys = {
            "ESVIT_S3_ENDPOINT": f"127.0.0.1:{port}",
            "ESVIT_S3_ACCESS_KEY": "a",
            "ESVIT_S3_SECRET_KEY": "b",
            "ESVIT_S3_SECURE": "false",
        }
        done = esvit("run", "--data", "good", "--out", tmp_path / "out", cwd=folder, env=keys)
    assert done.returncode == TRY_AGAIN_EXIT_CODE, done.stderr  # an outage, not the user's mistake
    (line,) = done.stderr.splitlines()
    assert f"127.0.0.1:{port}" in line


def test_a_port_in_use_is_an_error(folder: Path, tmp_path: Path, esvit: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = esvit("run", "--data", "good", "--out", tmp_path / "out", cwd=folder, env={"ESVIT_STORE_PORT": port})
        assert_error(done, port)


def test_a_run_in_progress_is_locked(tmp_path: Path) -> None:
    from esvit_core.errors import UserError
    from esvit_pipelines.local.attempt import in_progress

    with in_progress(tmp_path), pytest.raises(UserError, match="another esvit command is running it"):
        in_progress(tmp_path).__enter__()


def test_a_crash_is_one_line_that_names_the_log(tmp_path: Path, folder: Path) -> None:
    """An unexpected failure of a step: exit code 1, and the log has the traceback."""
    code = (
        "import sys; from pathlib import Path; from esvit_core.config import Config;"
        "from esvit_pipelines.local.attempt import in_progress, run_attempt; from esvit_core.errors import CrashError; here = Path(sys.argv[1]);"
        "(here / 'config.yaml').write_text(Config.load('demo').to_yaml())\n"
        "with in_progress(here) as lock:\n"
        "    try: run_attempt('good', here / 'config.yaml', 's3://esvit/runs/x', here / 'run.log', lock)\n"
        "    except CrashError as error: print(error)"
    )
    # A module that raises when the step imports it.
    (tmp_path / "minio.py").write_text("raise KeyError('a bug')")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1] == (
        f"prepare data failed: KeyError: 'a bug'; see the log: {tmp_path / 'run.log'}"
    ), done.stderr
    assert "Traceback" not in done.stdout
    assert "Traceback" in (tmp_path / "run.log").read_text()
