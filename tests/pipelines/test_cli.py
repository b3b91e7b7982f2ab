"""The small commands, the help, and what the help imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_checks import Call

from esvit_core import __version__
from esvit_core.config import Config
from esvit_core.config.recipes import domain_names, preset_names
from esvit_core.errors import TRY_AGAIN_EXIT_CODE
from esvit_pipelines.cli.recipe_commands import recipe_list, recipe_text


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["evaluate"],
        ["plan"],
        ["status"],
        ["logs"],
        ["export"],
        ["embed"],
        ["compile"],
        ["submit"],
        ["schedule"],
        ["store"],
        ["store", "ls"],
        ["data", "inspect"],
        ["recipe"],
    ],
)
def test_help_explains_itself(call: Call, command: list[str]) -> None:
    code, printed, _ = call(*command, "--help")
    assert code == 0 and "Usage: " in printed


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["run", "--data", "images", "--hours", "-1"], "esvit run"),
        (["schedule", "create"], "esvit schedule create"),
        (["no-such-command"], "esvit"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_help(call: Call, words: list[str], command: str) -> None:
    code, _, errors = call(*words)
    assert code == 2 and errors.startswith("error: ") and errors.endswith(f"; see `{command} --help`\n")


def test_help_imports_neither_torch_nor_kfp() -> None:
    code = (
        "import sys; sys.argv = ['esvit', '--help']\n"
        "from esvit_pipelines.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('torch', 'kfp', 'minio', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


def test_version(esvit: Any) -> None:
    assert esvit("--version").stdout == f"esvit {__version__}\n"


def test_recipes_are_listed_with_a_description() -> None:
    lines = recipe_list().splitlines()
    assert [line.split()[0] for line in lines] == ["auto", *preset_names(), *domain_names()]
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", [*preset_names(), *domain_names()])
def test_the_output_of_recipe_show_is_a_valid_recipe(name: str, tmp_path: Path) -> None:
    config = Config.load(name)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text(config), encoding="utf-8")
    assert Config.load(path) == config
    assert "# Global batch size: images per step over all processes." in path.read_text()


def test_the_store_starts_and_stops(esvit: Any, tmp_path: Path) -> None:
    out = ["--out", tmp_path]
    assert "no store runs" in esvit("store", "status", *out).stdout
    try:
        started = esvit("store", "start", *out)
        assert started.returncode == 0 and "running at http://127.0.0.1:" in started.stdout, started.stderr
        assert started.stdout.split()[2] == esvit("store", "start", *out).stdout.split()[2]
        assert "0 objects" in esvit("store", "ls", *out).stdout
    finally:
        assert esvit("store", "stop", *out).stdout == "stopped\n"
    assert "no store runs" in esvit("store", "stop", *out).stdout


def test_a_store_that_does_not_answer_is_one_line_and_exit_code_75(esvit: Any) -> None:
    variables = {
        "ESVIT_S3_ENDPOINT": "http://127.0.0.1:9",
        "ESVIT_S3_ACCESS_KEY": "a",
        "ESVIT_S3_SECRET_KEY": "b",
    }
    done = esvit("store", "ls", "s3://esvit/runs", env=variables)
    assert done.returncode == TRY_AGAIN_EXIT_CODE
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: connecting: no answer from the object store http://127.0.0.1:9")
