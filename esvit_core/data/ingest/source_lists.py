"""Several sources as one data set: written with `` | `` between them, such as ``photos | s3://bucket/more``."""

from __future__ import annotations

from collections.abc import Sequence

from esvit_core.config import DataConfig
from esvit_core.errors import UserError

SEPARATOR = " | "


def split_sources(source: str) -> list[str]:
    """Return the sources that a source consists of."""
    return [part.strip() for part in source.split(SEPARATOR) if part.strip()] or [source]


def join_sources(sources: Sequence[str]) -> str:
    """Return several sources as one.

    Raises:
        UserError: the name of one of them contains the separator.
    """
    for source in sources:
        if SEPARATOR in source and len(sources) > 1:
            raise UserError(f"{source}: the name of one of several sources cannot contain {SEPARATOR!r}; rename it")
    return SEPARATOR.join(sources)


def require_weights(source: str, config: DataConfig) -> None:
    """Raise an error unless ``data.weights`` has one weight for each source.

    Raises:
        UserError: their numbers differ.
    """
    sources = split_sources(source)
    if config.weights is not None and len(config.weights) != len(sources):
        raise UserError(
            f"data.weights has {len(config.weights)} weights, and there "
            f"{'is 1 source' if len(sources) == 1 else f'are {len(sources)} sources'} ({source}); expected one weight each, in their order"
        )


def part_of_name(name: str) -> int:
    """Return the number of the source of a file in a combined source, from its name."""
    return int(name.partition("/")[0])
