"""The commands in the pages for new users exist, with these options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from esvit_core.config import valid_keys
from esvit_pipelines.cli.main import app

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["tutorial.md", "troubleshooting.md", "coming-from.md", "recipes.md", "weights.md", "use.md"]
INLINE = re.compile(r"`(esvit [^`]+)`|^(?: {4})?(esvit .+)$", re.MULTILINE)
SETTING = re.compile(r"--set ([a-z_]+(?:\.[a-z_]+)*)=")


def commands(page: str) -> list[list[str]]:
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = [(inline or block).partition("   #")[0] for inline, block in INLINE.findall(text)]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    found = commands(page)
    assert found
    for words in found:
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        assert not words or not hasattr(command, "commands") or words[0].startswith("-"), (page, words)
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options, f"{page}: {command.name} has no {given - options}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert {key for key in SETTING.findall(text) if key != "section.key"} <= set(valid_keys())
