"""A configuration as the parameters of a pipeline, which are lines of text, and back.

A person fills them in, on a command line or in the form of Kubeflow's UI:

- ``recipe``: name of a preset, ``s3://`` address of a YAML file, or the YAML itself;
- ``settings``: changes of the recipe, ``training.epochs=50, seed=1``;
- ``transfer``: labelled sets, ``digits=s3://bucket/digits, cars=s3://bucket/cars``.

Kubeflow has no null. Here null is a word of YAML, in a recipe as in a setting, so that nothing is lost on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from esvit_core.config import Config, TransferSet, merged, valid_keys
from esvit_core.config.recipes import override, parse_yaml, preset_names, read_recipe
from esvit_core.errors import UserError

PLACE = ("cluster", "launch")  # the sections that a compiled pipeline holds fast
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Parameters:
    """What a pipeline is told about its configuration, see above."""

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
    """The configuration that a pipeline's parameters ask for.

    Args:
        recipe: name of a preset, ``s3://`` address of a YAML file, YAML, or path of a file.
        settings: ``key=value`` with commas or spaces between.
        transfer: ``name=source`` with commas or spaces between; a set of that name in the recipe gets the new source.
        cluster: the sections :data:`PLACE` that the pipeline was compiled with, YAML; the recipe's own come before
            them. Empty: it was not compiled for a cluster.
        read: returns what is at an ``s3://`` address.

    Raises:
        UserError: one of them is wrong; or they would change the section ``cluster`` or the scheduler of a compiled
            pipeline.
    """
    values = merged(parse_yaml(cluster, "cluster"), read_recipe(recipe, read))
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
            f"launch.scheduler {config.launch.scheduler}: the pipeline was compiled for {compiled_for}, and its pods have "
            f"the sizes for that; compile it again with --set launch.scheduler={config.launch.scheduler}"
        )
    return with_transfer(config, split_items(transfer, "transfer"), "transfer")


def with_transfer(config: Config, items: Iterable[str], origin: str) -> Config:
    """The configuration with more transfer sets, or with other sources of those that it has.

    Args:
        items: ``name=source`` each.
        origin: where they were given, for messages.

    Raises:
        UserError: one of them is wrong.
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


def parameters_of(config: Config, without: Sequence[str] = ()) -> Parameters:
    """The parameters from which :func:`resolve` makes ``config`` again.

    A recipe that is a preset is named, with what differs as settings; any other is YAML in one line, which a form's
    field can hold.

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


def cluster_text(config: Config) -> str:
    """The sections :data:`PLACE` as the argument ``cluster`` of :func:`resolve`: what is not a default, in one line."""
    changes = _differences(config.model_dump(mode="json"), Config().model_dump(mode="json"))
    return _one_line(_nested((key, value) for key, value in changes if key.partition(".")[0] in PLACE))


def split_items(text: str, origin: str) -> list[str]:
    """The items of a line, which have commas or white space between them.

    What is in brackets or in quotes stays whole: ``a.b=[1, 2], c="x y"`` has two items. An item may be quoted as a
    whole, and there may be spaces around its equals sign.

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
            f"{origin} {text}: {(quote or closing)[-1]} is missing; expected name=value with commas between"
        )
    return [_unquoted(each) for each in ([*items, item] if item else items)]


def join_items(items: Iterable[str]) -> str:
    """A line that :func:`split_items` splits into ``items``."""

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
    """Recipes and settings that may say ``config``; the last one does."""
    values = config.model_dump(mode="json")
    if config.recipe in preset_names():
        changes = _differences(values, Config.load(config.recipe).model_dump(mode="json"))
        yield config.recipe, join_items(f"{key}={_one_line(value)}" for key, value in changes)
    changes = _differences(values, Config().model_dump(mode="json"))
    yield _one_line({"recipe": config.recipe} | _nested(changes)), ""
    yield _one_line(values), ""


def _differences(here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that differs, by its key, with its value ``here``."""
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
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return values


def _one_line(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()
