"""The output of `esvit status` and `esvit logs`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from esvit_core.monitoring.progress_line import format_duration, format_figure
from esvit_core.runs.events import Event
from esvit_core.runs.status import RunStatus

HISTORY = 8  # entries of the event log
FIGURE_COLUMNS = 6  # steps whose figures are shown
_TONES = {"training": "green", "measuring": "green", "finished": "green", "failed": "red", "silent": "yellow"}
_FIGURES = {
    "loss": "loss",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "entropy_view": "entropy, nats",
    "kl_view": "divergence from the mean, nats",
    "feature_std": "spread of the features",
}


def runs_table(runs: Sequence[RunStatus]) -> Table:
    """Build the table of runs, one row per run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("steps", "loss", "restarts", "started"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.name,
            Text(run.state, style=_TONES.get(run.state, "")),
            _steps(run, "/"),
            format_figure(run.line["loss"]) if "loss" in run.line else "-",
            str(run.restarts) if run.restarts else "-",
            _ago(run.created),
        )
    return table


def status_view(run: RunStatus) -> Group:
    """Build the view of one run, with its figures and events."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    grid.add_row("run", run.name)
    grid.add_row("state", _state(run))
    if run.step is not None:
        grid.add_row("progress", _progress(run))
    if run.line:
        grid.add_row("loss", _loss(run.line))
    checkpoint = f"step {run.checkpoint.step:,}, {_ago(run.checkpoint.time)}" if run.checkpoint else "none yet"
    grid.add_row("checkpoint", checkpoint)
    grid.add_row("restarts", str(run.restarts))
    parts: list[RenderableType] = [grid, *_figures(run.lines), *_history(run.events)]
    if run.failure:
        parts.append(Text(f"\n{run.failure.component} failed: {run.failure.reason}", style="red"))
    return Group(*parts)


def log_line(line: dict[str, Any]) -> str:
    """Format a line of the training log."""
    parts = [
        _clock(line.get("time")),
        f"step {line['step']:>6,}",
        f"epoch {line.get('epoch', 0)}",
        f"loss {_loss(line)}",
    ]
    if "lr" in line:
        parts.append(f"lr {line['lr']:.2e}")
    if "images_per_second" in line:
        parts.append(f"{format_figure(round(line['images_per_second']))} images/s")
    return "  ".join(parts)


def event_line(entry: Event) -> str:
    """Format an entry of the event log."""
    parts = [_clock(entry.time), f"{entry.component} {entry.kind}"]
    if entry.step is not None:
        parts.append(f"{'from' if entry.kind == 'started' else 'after'} step {entry.step:,}")
    if entry.facts and "processes" in entry.facts:
        many = "process" if entry.facts["processes"] == 1 else "processes"
        parts.append(f"{entry.facts['processes']} {many} on {entry.facts.get('device', '?')}")
    parts.append(f"on {entry.host}")
    return "  ".join(parts) + (f": {entry.reason}" if entry.reason else "")


def _state(run: RunStatus) -> Text:
    details = {
        "silent": f", no activity for {format_duration(time.time() - run.last_activity)}: it was killed, or it hangs",
        "stopped": f" {_ago(run.last_activity)}; rerun the command to resume",
        "failed": f" {_ago(run.last_activity)}; rerun the command to resume",
    }
    return Text(run.state, style=_TONES.get(run.state, "")) + Text(details.get(run.state, ""))


def _progress(run: RunStatus) -> str:
    parts = [f"{_steps(run, ' of ')} steps"]
    if run.steps:
        parts.append(f"{100 * (run.step or 0) // run.steps} %")
    if "epoch" in run.line:
        parts.append(f"epoch {run.line['epoch']}")
    if "images_per_second" in run.line and run.state == "training":
        parts.append(f"{format_figure(round(run.line['images_per_second']))} images/s")
        parts.append(f"waiting for data {100 * run.line.get('data_wait', 0):.0f} %")
    if run.seconds_left is not None:
        parts.append(f"{format_duration(run.seconds_left)} left")
    return ", ".join(parts)


def _steps(run: RunStatus, between: str) -> str:
    if run.step is None:
        return "-"
    return f"{run.step:,}{between}{run.steps:,}" if run.steps else f"{run.step:,}"


def _loss(line: dict[str, Any]) -> str:
    if "loss" not in line:
        return "-"
    terms = [f"{name} {format_figure(line[key])}" for name in ("view", "region") if (key := f"loss_{name}") in line]
    return format_figure(line["loss"]) + (f" ({', '.join(terms)})" if terms else "")


def _figures(lines: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """Tabulate the figures of the log at evenly spaced steps, including the first and the last."""
    if len(lines) < 2:
        return []
    count = min(FIGURE_COLUMNS, len(lines))
    shown = [lines[round(i * (len(lines) - 1) / (count - 1))] for i in range(count)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for line in shown:
        table.add_column(f"{line['step']:,}", justify="right", no_wrap=True)
    for key, name in _FIGURES.items():
        if any(key in line for line in shown):
            table.add_row(name, *(format_figure(float(line[key])) if key in line else "-" for line in shown))
    return [Text(), table]


def _history(events: Sequence[Event]) -> list[RenderableType]:
    if not events:
        return []
    left_out = len(events) - HISTORY
    lines = [f"({left_out} earlier; `esvit logs` has all)"] if left_out > 0 else []
    lines += [event_line(event) for event in events[-HISTORY:]]
    return [Text("\nhistory", style="bold"), *(Text(line) for line in lines)]


def _clock(when: float | None) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(when)) if when else " " * 14


def _ago(when: float) -> str:
    return f"{format_duration(time.time() - when)} ago" if when else "-"
