"""The table of results that a run prints at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from esvit_core.evaluation.significance import interval_text
from esvit_core.reporting.result_rows import Row, percent, result_rows

_TONES = {"good": "green", "bad": "red", "plain": ""}


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Build a table of a run's figures and those of its baseline, the same network with its initial weights.

    Args:
        results: results from :func:`~esvit_core.reporting.result_rows.read_results`.

    Example:
        >>> rich.print(results_table(read_results(store, run_uri, config)))
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    table.add_column("measure")
    for name in ("trained", "baseline", "points"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("95 % interval", "verdict"):
        table.add_column(name, no_wrap=True)
    left_out = []
    for row in result_rows(results):
        if row.trained is None:
            left_out.append(row)
            continue
        table.add_row(
            _label(row),
            _figure(row.trained, row.unit, "bold" if row.headline else ""),
            _figure(row.baseline, row.unit),
            Text(row.change, style=_TONES[row.tone]),
            interval_text(row.comparison) if row.comparison else "-",
            Text(row.decision if row.difference is not None else "-", style=_TONES[row.tone]),
        )
    for row in left_out:
        table.add_row(Text(f"{row.label}: not measured"), *["-"] * 5, style="dim")
    if left_out:
        # Text instead of markup, because a reason may contain square brackets.
        table.caption = Text("\n".join(_reasons(left_out)))
        table.caption_justify = "left"
    return table


def _reasons(rows: Sequence[Row]) -> list[str]:
    """List each reason once, with the evaluations that it concerns."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row.reason, []).append(row.label)
    return [f"{', '.join(labels)}: {reason}" for reason, labels in by_reason.items()]


def _label(row: Row) -> Text:
    label = Text(row.label, style="bold" if row.headline else "")
    return label.append(f" ({row.remark})", style="not bold") if row.remark else label


def _figure(value: float | None, unit: str, style: str = "") -> Text:
    return Text(f"{percent(value)} {unit}" if value is not None else "-", style=style)
