"""Convert a configuration to the string parameters of a pipeline, and back.

Users enter the parameters on a command line or in the form of Kubeflow's UI:

- ``recipe``: name of a preset, ``s3://`` address of a YAML file, or YAML text;
- ``settings``: overrides of the recipe, ``training.epochs=50, seed=1``;
- ``transfer``: labelled data sets, ``digits=s3://bucket/digits, cars=s3://bucket/cars``.

Kubeflow parameters cannot be null. These strings hold YAML, which can express null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from esvit_core.config import Config, TransferSet, merge, valid_keys
from esvit_core.config.recipes import override, parse_yaml, preset_names, read_recipe
from esvit_core.errors import UserError

COMPILED_SECTIONS = ("cluster", "launch")  # fixed when a pipeline is compiled
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Parameters:
    """The configuration parameters of a pipeline, see the module's docstring."""

    recipe: str
    settings: str = ""
    transfer: str = ""


def resolve(
    recipe: str,
    settings: str = "",
    transfer: str = "",
    cluster: str = "",
    read: Callable[[str], bytes] | None = None,
) -> Config:
    """Build the configuration from a pipeline's parameters.

    Args:
        recipe: name of a preset, ``s3://`` address of a YAML file, YAML text, or path of a file.
        settings: ``key=value`` items separated by commas or spaces.
        transfer: ``name=source`` items separated by commas or spaces; a set that the recipe has gets the new source.
        cluster: the sections :data:`COMPILED_SECTIONS` with which the pipeline was compiled, as YAML; values of the
            recipe take precedence. Empty: it was not compiled for a cluster.
        read: function that returns the bytes at an ``s3://`` address.

    Raises:
        UserError: a parameter is invalid, or changes the section ``cluster`` or the scheduler of a compiled pipeline.
    """
    values = merge(parse_yaml(cluster, "cluster"), read_recipe(recipe, read))
    known = list(valid_keys())
    for item in (items := split_items(settings, "settings")):
        if cluster and item.partition(".")[0].strip() == "cluster":
            raise UserError(
                f"settings {item}: the section cluster was fixed when the pipeline was compiled; "
                "compile it again with --set"
            )
        override(values, item, known, origin="settings")
    config = Config.from_mapping(values, origin="settings" if items else "recipe")
    compiled_for = parse_yaml(cluster, "cluster").get("launch", {}).get("scheduler", "local")
    if cluster and config.launch.scheduler != compiled_for:
        raise UserError(
            f"launch.scheduler {config.launch.scheduler}: the pipeline was compiled for {compiled_for}, and its pods are "
            f"sized for that; compile it again with --set launch.scheduler={config.launch.scheduler}"
        )
    return with_transfer(config, split_items(transfer, "transfer"), "transfer")


def with_transfer(config: Config, items: Iterable[str], origin: str) -> Config:
    """Return the configuration with transfer sets added, or with new sources for the sets that it has.

    Args:
        items: ``name=source`` items.
        origin: where they come from, for messages.

    Raises:
        UserError: an item is invalid.
    """
    sets = {s.name: s.model_dump(mode="json") for s in config.evaluation.transfer}
    for item in items:
        name, equals, source = (part.strip() for part in item.partition("="))
        if not (equals and name and source):
            raise UserError(f"{origin} {item}: expected NAME=SOURCE, such as digits=s3://bucket/digits")
        sets[name] = {**sets.get(name, {}), "name": name, "source": _unquoted(source)}
    values = config.model_dump(mode="json")
    values["evaluation"]["transfer"] = list(sets.values())
    return Config.from_mapping(values, origin=origin)


def to_parameters(config: Config, without: Sequence[str] = ()) -> Parameters:
    """Return the parameters from which :func:`resolve` rebuilds ``config``.

    A preset is given by its name, with the differences as settings. Any other recipe becomes YAML in one line, which fits
    into the field of a form.

    Args:
        without: sections to leave out.
    """
    plain = all(s == TransferSet(name=s.name, source=s.source) for s in config.evaluation.transfer)
    transfer = join_items(f"{s.name}={s.source}" for s in config.evaluation.transfer) if plain else ""
    defaults: dict[str, Any] = {name: Config.model_fields[name].default for name in without}
    if plain:
        defaults["evaluation"] = config.evaluation.model_copy(update={"transfer": ()})
    wanted = config.model_copy(update=defaults)
    for recipe, settings in _candidates(wanted):
        if resolve(recipe, settings) == wanted:
            return Parameters(recipe, settings, transfer)
    raise AssertionError("unreachable: the last candidate is the whole configuration")


def parse_cluster(cluster: str) -> dict[str, Any]:
    """Parse the output of :func:`compiled_sections_yaml`."""
    return parse_yaml(cluster, "cluster")


def compiled_sections_yaml(config: Config) -> str:
    """The sections :data:`COMPILED_SECTIONS` as the argument ``cluster`` of :func:`resolve`: the values that differ from the defaults, as YAML in one line."""
    changes = _differences(config.model_dump(mode="json"), Config().model_dump(mode="json"))
    return _one_line(_nested((key, value) for key, value in changes if key.partition(".")[0] in COMPILED_SECTIONS))


def split_items(text: str, origin: str) -> list[str]:
    """Split a line into items at commas and white space.

    Brackets and quotes keep their contents together: ``a.b=[1, 2], c="x y"`` has two items. A whole item may be quoted,
    and there may be spaces around its equals sign.

    Raises:
        UserError: a quote or a bracket is not closed.
    """
    items: list[str] = []
    item, quote, closing = "", "", ""
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote and item[-1] != "\\" else quote
        elif char in "'\"" and (not item or item[-1] in "=[{,: " or item[-1] == char):
            quote = char
        elif char in _BRACKETS:
            closing += _BRACKETS[char]
        elif closing and char == closing[-1]:
            closing = closing[:-1]
        elif not closing and (char == "," or char.isspace()):
            if char.isspace() and (item.endswith("=") or (item and text[position:].lstrip().startswith("="))):
                continue
            items, item = [*items, item] if item else items, ""
            continue
        item += char
    if quote or closing:
        raise UserError(
            f"{origin} {text}: {(quote or closing)[-1]} is missing; expected name=value items separated by commas"
        )
    return [_unquoted(each) for each in ([*items, item] if item else items)]


def join_items(items: Iterable[str]) -> str:
    """Join items into a line that :func:`split_items` splits again."""

    def quoted(item: str) -> str:
        try:
            whole = split_items(item, "") == [item]
        except UserError:
            whole = False
        return item if whole else "'" + item.replace("'", "''") + "'"

    return ", ".join(map(quoted, items))


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1].replace('\\"', '"')


def _candidates(config: Config) -> Iterator[tuple[str, str]]:
    """Yield recipes with settings that may express ``config``, the shortest first; the last one always does."""
    values = config.model_dump(mode="json")
    if config.recipe in preset_names():
        changes = _differences(values, Config.load(config.recipe).model_dump(mode="json"))
        yield config.recipe, join_items(f"{key}={_one_line(value)}" for key, value in changes)
    changes = _differences(values, Config().model_dump(mode="json"))
    yield _one_line({"recipe": config.recipe} | _nested(changes)), ""
    yield _one_line(values), ""


def _differences(here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key of every setting that differs, with its value in ``here``."""
    sections = {key.rpartition(".")[0] for key in valid_keys()}
    for name, value in here.items():
        key = prefix + name
        if key in sections and isinstance(value, dict) and isinstance(there.get(name), dict):
            yield from _differences(value, there[name], f"{key}.")
        elif value != there.get(name):
            yield key, value


def _nested(changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in changes:
        *sections, leaf = key.split(".")
        section_values = values
        for section in sections:
            section_values = section_values.setdefault(section, {})
        section_values[leaf] = value
    return values


def _one_line(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()
