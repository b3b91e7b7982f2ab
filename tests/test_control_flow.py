"""Errors are told apart by their class: no condition reads the text of an exception's message."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for folder in ("esvit_core", "components", "pipelines") for path in (ROOT / folder).rglob("*.py"))
# Methods and functions whose result says what a text contains.
SEARCHES = {"startswith", "endswith", "search", "match", "fullmatch", "findall", "find", "index", "count"}


def conditions_on_messages(source: str) -> Iterator[int]:
    """Lines with a comparison or a search in the message of a caught exception."""
    tree = ast.parse(source)
    caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    for node in ast.walk(tree):
        compared = isinstance(node, ast.Compare) or (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SEARCHES
        )
        if compared and any(is_message(part, caught) for part in ast.walk(node)):
            yield node.lineno


def is_message(node: ast.AST, caught: set[str]) -> bool:
    """Whether an expression is the text of an exception: ``str(error)``, ``repr(error)``, ``f"{error}"``, ``error.args[0]``."""
    match node:
        case ast.Call(func=ast.Name(id="str" | "repr"), args=[ast.Name(id=name)]):
            return name in caught
        case ast.FormattedValue(value=ast.Name(id=name)):
            return name in caught
        case ast.Subscript(value=ast.Attribute(value=ast.Name(id=name), attr="args")):
            return name in caught
    return False


def test_no_condition_reads_the_message_of_an_exception() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in MODULES
        for line in conditions_on_messages(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "condition",
    ['"full" in str(error)', 'str(error).startswith("no ")', 'error.args[0] == "x"', 're.search("x", f"{error}")'],
)
def test_such_a_condition_is_found(condition: str) -> None:
    assert list(
        conditions_on_messages(f"try:\n    f()\nexcept OSError as error:\n    if {condition}:\n        raise\n")
    ) == [4]
