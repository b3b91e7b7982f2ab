"""Recipes as YAML: read presets and files, apply overrides, explain validation errors."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from esvit_core.errors import UserError

_LONGEST_VALUE = 100  # characters of a wrong value in a message


def preset_names() -> list[str]:
    """List the names of the recipes that ship with the library."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """Return the YAML of a preset; its first lines are comments that describe it."""
    return str((_presets() / f"{name}.yaml").read_text(encoding="utf-8"))


def domain_names() -> list[str]:
    """List the names of the recipes for kinds of images; each only has the settings in which it differs from others."""
    folder = _presets() / "domains"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def domain_text(name: str) -> str:
    """Return the YAML of the recipe for a kind of images; its first line is a comment that says what it changes and why."""
    return str((_presets() / "domains" / f"{name}.yaml").read_text(encoding="utf-8"))


def read_recipe(recipe: str, read: Callable[[str], bytes] | None = None) -> dict[str, Any]:
    """Read the keys of a preset, of a YAML file on disk or at ``s3://``, or of YAML text.

    Args:
        recipe: name, path, address, or YAML text.
        read: function that returns the bytes at an ``s3://`` address; raises KeyError if there is no object.

    Raises:
        UserError: the recipe does not exist or is not a YAML mapping.
    """
    if recipe in preset_names():
        return parse_yaml(preset_text(recipe), f"preset {recipe}")
    if recipe in domain_names():
        return {"recipe": recipe, **parse_yaml(domain_text(recipe), f"recipe {recipe}")}
    if recipe.partition(":")[0] == "auto":
        raise UserError(
            f"recipe {recipe}: only `esvit run` and the pipeline pretrain choose a recipe from the images; name a preset or a file"
        )
    if "{" in recipe or "\n" in recipe or ": " in recipe:
        return parse_yaml(recipe, "recipe")
    try:
        if recipe.startswith("s3://") and read is not None:
            text = read(recipe).decode("utf-8")
        elif Path(recipe).is_file():
            text = Path(recipe).read_text(encoding="utf-8")
        else:
            names = [*preset_names(), *domain_names()]
            raise UserError(
                f"recipe {recipe or '(empty)'}: neither a preset{_nearest(recipe, names)} nor a YAML file, an s3:// "
                f"address of one, or YAML such as {{training: {{epochs: 50}}}}; presets: {', '.join(names)}"
            )
    except KeyError:
        raise UserError(f"recipe {recipe}: no such object; upload the YAML file there or correct the address") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {recipe}: cannot be read ({error}); expected a YAML text file") from None
    return parse_yaml(text, f"recipe {recipe}")


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Parse YAML text that holds a mapping.

    Args:
        origin: where the text comes from, for messages.

    Raises:
        UserError: it is not YAML, or not a mapping.
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
        known: valid keys.
        origin: where the item comes from, for messages.

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
    section_values = values
    for section in sections:
        section_values = section_values.setdefault(section, {})
        if not isinstance(section_values, dict):
            raise UserError(f"{origin} {item}: {section!r} is not a section of this recipe; write it as nested keys")
    section_values[leaf] = _parse_value(text, f"{origin} {item}")


def explain(error: ValidationError, known: list[str]) -> str:
    """Explain validation errors in one line, with the nearest of the ``known`` keys for each unknown key."""
    unknown, wrong = [], dict[str, tuple[list[str], Any]]()
    for item in error.errors():
        parts = [str(part) for part in item["loc"] if str(part)[0] != "["]  # [..]: tag of a discriminated union
        key = ".".join(parts)
        if item["type"] == "extra_forbidden":
            unknown.append(f"unknown key {key!r}{_nearest(key, known)}")
            continue
        if key not in known and ".".join(parts[:-1]) in known:
            key = ".".join(parts[:-1])  # the last part names one of several types that the value may have
        wrong.setdefault(key, ([], item["input"]))[0].append(f"{item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join([*unknown, *(_wrong_value(key, *rest) for key, rest in wrong.items())])


def _wrong_value(key: str, messages: list[str], given: Any) -> str:
    others = (message.removeprefix("input should be ") for message in messages[1:])
    expected = " or ".join([messages[0], *others])
    text = "" if isinstance(given, dict) else f", got {given!r}"
    shortened = text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
    return f"{key or 'the whole'}: {expected}{shortened}"


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
    if not match:  # the most common mistake: a valid leaf in the wrong section
        leaf = given.rsplit(".", 1)[-1]
        match = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return f", did you mean {match[0]!r}?" if match else ""
