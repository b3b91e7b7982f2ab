"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from esvit_core.reporting.result_table import Row, percent, points, read_results, summarise

__all__ = ["read_results", "results_table", "summarise"]


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The figures of a run next to those of its baseline, the same network before training.

    Args:
        results: as :func:`read_results` lists them.

    Example:
        >>> rich.print(results_table(read_results(store, run_uri, config)))
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("measure")
    for name in ("trained", "baseline", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    left_out = []
    for row in summarise(results):
        if row.trained is None:
            left_out.append(row)
            continue
        table.add_row(
            Text(row.label, style="bold" if row.headline else ""),
            _figure(row.trained, row.unit, "bold" if row.headline else ""),
            _figure(row.baseline, row.unit),
            Text(points(row.difference), style=_tone(row)),
        )
    for row in left_out:
        table.add_row(Text(f"{row.label}: not measured"), "-", "-", "-", style="dim")
    if left_out:
        # Text, not markup: a reason may have square brackets in it.
        table.caption = Text("\n".join(_reasons(left_out)))
        table.caption_justify = "left"
    return table


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Each reason once, with all that it left out."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row.reason, []).append(row.label)
    return [f"{', '.join(labels)}: {reason}" for reason, labels in by_reason.items()]


def _figure(value: float | None, unit: str, style: str = "") -> Text:
    return Text(f"{percent(value)} {unit}" if value is not None else "-", style=style)


def _tone(row: Row) -> str:
    if row.difference is None or abs(row.difference) < 0.05:
        return ""
    return "green" if row.difference > 0 else "red"
