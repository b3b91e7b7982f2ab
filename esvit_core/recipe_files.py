"""Recipes as YAML: a preset or a file is read, a key is set from the command line, a mistake is told in one line."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from esvit_core.errors import UserError


def preset_names() -> list[str]:
    """Names of the recipes that ship with the library."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The file of a preset; its first lines, which are comments, say what it is."""
    return str((_presets() / f"{name}.yaml").read_text(encoding="utf-8"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """The keys of a preset or of a YAML file.

    Raises:
        UserError: there is neither, or it is not a YAML mapping.
    """
    if recipe in preset_names():
        return parse_yaml(preset_text(recipe), f"preset {recipe}")
    path = Path(recipe)
    if not path.is_file():
        names = preset_names()
        raise UserError(
            f"recipe {recipe}: neither a preset nor a YAML file{_nearest(recipe, names)}; presets: {', '.join(names)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {recipe}: cannot be read ({error}); expected a YAML text file") from None
    return parse_yaml(text, f"recipe {recipe}")


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """A mapping from its YAML.

    Raises:
        UserError: it is not YAML, or not a mapping; ``origin`` says where it stood.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{origin}: not valid YAML ({error}); expected nested keys as in `esvit recipe show demo`"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{origin}: expected a mapping of sections such as `training:`, got {type(values).__name__}")
    return values


def override(values: dict[str, Any], item: str, known: list[str]) -> None:
    """Set ``item``, such as ``training.epochs=10``, in ``values``.

    Raises:
        UserError: the key is not among the ``known`` ones, or the value is not YAML.
    """
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {item}: expected key=value, such as --set training.epochs=10")
    if key not in known:
        raise UserError(f"--set {item}: unknown key {key!r}{_nearest(key, known)}")
    *sections, leaf = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {item}: {section!r} is not a section of this recipe; write it as nested keys")
    place[leaf] = _parse_value(text, item)


def explain(error: ValidationError, known: list[str]) -> str:
    """What is wrong with a recipe, in one line, with the nearest of the ``known`` keys for each unknown one."""
    lines = []
    for item in error.errors():
        key = ".".join(part for part in map(str, item["loc"]) if part[0] != "[")  # [..]: which kind of value it is
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{_nearest(key, known)}")
        else:
            given = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
            lines.append(f"{key or 'the whole'}: {item['msg'][0].lower()}{item['msg'][1:]}{given}")
    return "; ".join(lines)


def _presets() -> Any:
    return resources.files("esvit_core") / "presets"


def _parse_value(text: str, item: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {item}: the value is not valid YAML ({error})") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _nearest(given: str, known: list[str]) -> str:
    match = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if not match:  # a right leaf in the wrong section is the commonest mistake
        leaf = given.rsplit(".", 1)[-1]
        match = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return f", did you mean {match[0]!r}?" if match else ""
