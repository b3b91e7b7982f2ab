"""Charts of the training log and the confusion matrix, as SVG in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from esvit_core.reporting.result_rows import MINUS
from esvit_core.reporting.svg import GRID, INK, MUTED, SERIES, drawable, inline_svg, settings

_POINTS = 300  # maximum per line; more would be less than a pixel apart
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # lines are distinguishable without colour
_STEPS = [1, 2, 2.5, 5, 10]  # allowed tick steps, times powers of ten
_NARROW, _WIDE = (360, 215), (1080, 300)  # CSS pixels; the text has its full size
_NAMED_CLASSES, _COUNTED_CLASSES = 40, 24  # more names, or numbers in cells, would be illegible


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name in the legend, and its points."""

    name: str
    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, name: str, log: Sequence[dict[str, float]], key: str, factor: float = 1.0) -> Line | None:
        """Return the line of the figure ``key`` of a training log, None if the log does not have it."""
        pairs = [(row["step"], row[key]) for row in log if isinstance(row.get(key), (int, float))]
        pairs = [(step, value * factor) for step, value in pairs if math.isfinite(value)]
        if not pairs:
            return None
        steps, values = np.array(pairs, dtype=float).T
        return cls(name, steps, values)


@dataclass(frozen=True)
class Chart:
    """A chart of the report.

    Attributes:
        title: title.
        caption: how to read it.
        keys: legend, a name for each line; empty for a single line.
        svg: the chart for a narrow page.
        wide: the chart for a wide page; None: the same.
        marked: whether resumes are marked.
        group: heading under which it is shown.
    """

    title: str
    caption: str
    keys: list[str]
    svg: Markup
    wide: Markup | None = None
    marked: bool = False
    group: str = ""


def curve(
    title: str,
    caption: str,
    lines: Sequence[Line | None],
    *,
    name: str,
    resumes: Sequence[int] = (),
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    wide: bool = False,
    axis: str = "step",
) -> Chart | None:
    """Draw lines over the training steps or over another axis; None if none of them has a point.

    Args:
        name: id that is unique on the page.
        resumes: steps to mark with a dashed vertical line.
        reference: a value to draw as a horizontal line, and its name.
        from_zero: start the axis at 0.
        wide: also draw it for wide pages.
        axis: what the horizontal axis shows, for the description.
    """
    drawn = [line for line in lines if line is not None]
    if not drawn:
        return None
    label = f"{title}. " + "; ".join(_describe(line, axis) for line in drawn)

    def draw(size: tuple[int, int], suffix: str) -> Markup:
        with matplotlib.rc_context(settings()):
            figure = Figure(figsize=(size[0] / 72, size[1] / 72))
            ax = figure.add_axes((46 / size[0], 30 / size[1], 1 - 60 / size[0], 1 - 42 / size[1]))
            _draw_lines(ax, drawn, resumes, reference)
            _style(ax, from_zero)
        return inline_svg(figure, name + suffix, label)

    return Chart(
        title=title,
        caption=caption,
        keys=[line.name for line in drawn] if len(drawn) > 1 else [],
        svg=draw(_NARROW, ""),
        wide=draw(_WIDE, "-wide") if wide else None,
        marked=bool(resumes),
    )


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Markup:
    """Draw the confusion matrix: how often each class (rows) was predicted as each class (columns), as shares of the rows.

    Args:
        counts: (C, C).
        classes: names, (C,).
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    C = len(classes)
    named = C <= _NAMED_CLASSES
    names = [_short(drawable(str(c))) for c in classes]
    room = min(150, 14 + 6.2 * max(map(len, names))) if named else 30  # pixels for the names
    side = float(np.clip(C * 20, 240, 520))
    width, height = side + room + 8, side + room + 8
    # One colour with the share as its opacity is legible on light and dark pages.
    pixels = np.zeros((C, C, 4))
    pixels[..., :3] = matplotlib.colors.to_rgb("#3b7dd8")
    pixels[..., 3] = np.where(counts > 0, 0.12 + 0.88 * shares, 0)
    with matplotlib.rc_context(settings()):
        figure = Figure(figsize=(width / 72, height / 72))
        ax = figure.add_axes((room / width, room / height, side / width, side / height))
        ax.imshow(pixels, interpolation="none", aspect="auto")
        for i, j in zip(*np.nonzero(counts), strict=True) if C <= _COUNTED_CLASSES else ():
            ax.text(j, i, f"{counts[i, j]}", ha="center", va="center_baseline", fontsize=10, color=INK)
        ticks = np.arange(C)
        ax.set_xticks(ticks if named else [], names if named else [], rotation=90, fontsize=10, color=INK)
        ax.set_yticks(ticks if named else [], names if named else [], fontsize=10, color=INK)
        ax.tick_params(length=0, pad=4)
        if not named:
            ax.set_xlabel("predicted", color=MUTED)
            ax.set_ylabel("true class", color=MUTED)
        for spine in ax.spines.values():
            spine.set(color=GRID, linewidth=1)
    right = 100 * np.trace(counts) / max(1, counts.sum())
    return inline_svg(
        figure,
        "confusion",
        f"Confusion matrix of {C} classes, rows true, columns predicted; {right:.1f} % are on the diagonal.",
    )


def _draw_lines(ax: Axes, lines: Sequence[Line], resumes: Sequence[int], reference: tuple[float, str] | None) -> None:
    for step in resumes:
        ax.axvline(step, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    if reference is not None:
        value, text = reference
        ax.axhline(value, color=MUTED, linewidth=1, zorder=1)
        ax.annotate(
            text,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=MUTED,
            fontsize=10,
        )
    for line, colour, dash in zip(lines, SERIES, _DASHES, strict=False):
        steps, values = _thinned(line)
        marker = "o" if len(steps) == 1 else None
        ax.plot(steps, values, color=colour, linewidth=1.8, linestyle=dash, marker=marker, solid_capstyle="round")
    ax.margins(x=0.01, y=0.08)
    if reference is not None:  # make room for its name
        low, high = ax.get_ylim()
        ax.set_ylim(low, max(high, reference[0] + 0.14 * (reference[0] - max(low, 0))))


def _style(ax: Axes, from_zero: bool) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, pad=5, labelcolor=MUTED, labelsize=10.5)
    ax.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2, steps=_STEPS))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=_STEPS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if from_zero:
        ax.set_ylim(bottom=0)
    low, high = ax.get_ylim()
    if high - low < 1e-9 * max(abs(high), 1e-12):
        ax.set_ylim(low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _thinned(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a line to at most :data:`_POINTS` points by averaging equal pieces; the ends are kept."""
    count = len(line.steps)
    if count <= _POINTS:
        return line.steps, line.values
    edges = np.linspace(0, count, _POINTS + 1).astype(int)
    steps, values = (np.add.reduceat(v, edges[:-1]) / np.diff(edges) for v in (line.steps, line.values))
    steps[0], steps[-1], values[0], values[-1] = line.steps[0], line.steps[-1], line.values[0], line.values[-1]
    return steps, values


def _describe(line: Line, axis: str) -> str:
    first, last = (f"{_tick(line.values[i])} at {axis} {_tick(line.steps[i])}" for i in (0, -1))
    return f"{line.name}: {first}, {last}"


def _tick(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", MINUS)


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
