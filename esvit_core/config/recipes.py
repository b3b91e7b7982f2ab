"""Recipes as YAML: a preset or a file is read, a key is set from the command line, a mistake is told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable
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


def read_recipe(recipe: str, read: Callable[[str], bytes] | None = None) -> dict[str, Any]:
    """The keys of a preset, of a YAML file here or at ``s3://``, or of YAML itself.

    Args:
        recipe: the name, the path, the address, or the text.
        read: returns what is at an ``s3://`` address; raises KeyError where nothing is.

    Raises:
        UserError: there is none of these, or it is not a YAML mapping.
    """
    if recipe in preset_names():
        return parse_yaml(preset_text(recipe), f"preset {recipe}")
    if "{" in recipe or "\n" in recipe or ": " in recipe:
        return parse_yaml(recipe, "recipe")
    try:
        if recipe.startswith("s3://") and read is not None:
            text = read(recipe).decode("utf-8")
        elif Path(recipe).is_file():
            text = Path(recipe).read_text(encoding="utf-8")
        else:
            names = preset_names()
            raise UserError(
                f"recipe {recipe or '(empty)'}: neither a preset{_nearest(recipe, names)} nor a YAML file, an s3:// "
                f"address of one, or YAML such as {{training: {{epochs: 50}}}}; presets: {', '.join(names)}"
            )
    except KeyError:
        raise UserError(f"recipe {recipe}: there is no such object; put the YAML file there") from None
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


def override(values: dict[str, Any], item: str, known: list[str], origin: str = "--set") -> None:
    """Set ``item``, such as ``training.epochs=10``, in ``values``.

    Args:
        known: the valid keys.
        origin: where the item was given, for messages.

    Raises:
        UserError: the key is not among the ``known`` ones, or the value is not YAML.
    """
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{origin} {item}: expected key=value, such as training.epochs=10")
    if key not in known:
        raise UserError(f"{origin} {item}: unknown key {key!r}{_nearest(key, known)}")
    *sections, leaf = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UserError(f"{origin} {item}: {section!r} is not a section of this recipe; write it as nested keys")
    place[leaf] = _parse_value(text, f"{origin} {item}")


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
    return resources.files("esvit_core.config") / "presets"


def _parse_value(text: str, origin: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: the value is not valid YAML ({error})") from None
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
