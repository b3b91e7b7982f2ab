"""The figures of correspondence and attention, as PNGs that read on a light and on a dark page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from esvit_core.evaluation.correspondence import Crop, Matches, Pair, region_centers

# Mid-grey text has a contrast of at least 4 on white and on near-black.
_INK = "#7d8590"
_RIGHT, _WRONG = "#1a9f4b", "#e0453c"
_GAP = 0.42  # between the two crops, in crop sides
_LINES = 16  # more lines than this hide the image
_DPI = 110
_HEADS = 4
_HEAT = colormaps["inferno"]


def correspondence_figure(
    pairs: Sequence[Pair], matches: Mapping[str, Sequence[Matches]], shares: Mapping[str, float]
) -> bytes:
    """Crop A left, crop B right, best matches joined: green right, red and dashed wrong; a column per model.

    Args:
        pairs: one row each.
        matches: of each pair, per model, in the order of the columns.
        shares: figure of each model over all pairs measured, percent.

    Returns:
        PNG.
    """
    columns = len(matches)
    figure = Figure(figsize=(4.6 * columns, 0.7 + 2.3 * len(pairs)), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pairs), columns, squeeze=False)
    for column, (model, found) in enumerate(matches.items()):
        for row, pair in enumerate(pairs):
            _draw_pair(axes[row, column], pair, found[row])
        axes[0, column].set_title(f"{model}: {shares[model]:.1f} % right", color=_INK, fontsize=17, pad=10)
    top, bottom = 1 - 0.55 / figure.get_figheight(), 0.3 / figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=bottom, wspace=0.06, hspace=0.2)
    return _png(figure)


def heads_shown(heads: int) -> int:
    """Of how many heads :func:`attention_figure` shows the map by itself; a single one is its own mean."""
    return min(_HEADS, heads) if heads > 1 else 0


def attention_figure(
    images: Sequence[np.ndarray], trained: Sequence[np.ndarray], untrained: Sequence[np.ndarray]
) -> bytes:
    """Each image, the mean over the heads of both models, and the first heads of the trained one.

    Args:
        images: what the network saw, (S, S, 3) uint8.
        trained, untrained: maps of each image, 0..1, (heads, h, w).

    Returns:
        PNG.
    """
    heads = heads_shown(len(trained[0]))
    columns = 3 + heads
    cell = 1.5 if heads else 2.2
    figure = Figure(figsize=(cell * columns, 0.55 + cell * len(images)), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), columns, squeeze=False)
    titles = ["image", "untrained", "trained", *(f"head {i + 1}" for i in range(heads))]
    for row, image in enumerate(images):
        _frame(axes[row, 0]).imshow(image, interpolation="lanczos")
        maps = [_stretch(untrained[row].mean(0)), _stretch(trained[row].mean(0)), *trained[row][:heads]]
        for ax, heat in zip(axes[row, 1:], maps, strict=True):
            _frame(ax).imshow(heat_over(image, heat))
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, color=_INK, fontsize=16, pad=7)
    top = 1 - 0.45 / figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, top=top, bottom=0.005, wspace=0.05, hspace=0.05)
    return _png(figure)


def heat_over(image: np.ndarray, heat: np.ndarray, side: int = 160) -> np.ndarray:
    """A heat map (h, w) of 0..1 in colour over the greyed image (S, S, 3) uint8; (side, side, 3) of 0..1."""
    grey = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BICUBIC)
    smooth = Image.fromarray(heat.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    weight = np.clip(np.asarray(smooth), 0, 1)
    colour = _HEAT(weight)[..., :3]
    background = 0.05 + 0.6 * np.asarray(grey, np.float32)[..., None] / 255
    share = 0.4 + 0.4 * weight[..., None]
    return colour * share + background * (1 - share)


def cut(image: np.ndarray, crop: Crop) -> np.ndarray:
    """The crop's part of the image in the image's own resolution, mirrored if the crop is; (h, w, 3)."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = crop.box
    left, top = round(x0 * width), round(y0 * height)
    part = image[top : max(top + 1, round(y1 * height)), left : max(left + 1, round(x1 * width))]
    return part[:, ::-1] if crop.flipped else part


def _draw_pair(ax: Axes, pair: Pair, matches: Matches) -> None:
    offset = 1 + _GAP
    for crop, x in ((pair.a, 0.0), (pair.b, offset)):
        ax.imshow(cut(pair.image, crop), extent=(x, x + 1, 1, 0), interpolation="lanczos")
        ax.add_patch(Rectangle((x, 0), 1, 1, fill=False, edgecolor=_INK, linewidth=1))
    side = math.isqrt(len(pair.asked))
    centers = region_centers(side)
    asked = np.flatnonzero(pair.asked)
    shown = asked[np.unique(np.linspace(0, len(asked) - 1, min(_LINES, len(asked))).round().astype(int))]
    for region in sorted(shown, key=lambda i: matches.right[i]):  # right ones on top
        (xa, ya), (xb, yb) = centers[region], centers[matches.chosen[region]]
        # Lines of one row would lie on each other: each column has its own height, by less than half a region.
        shift = (xa - 0.5) * 0.5 / side
        right = matches.right[region]
        style: dict[str, Any] = (
            {"color": _RIGHT, "linewidth": 1.8} if right else {"color": _WRONG, "linewidth": 1.2, "linestyle": "--"}
        )
        ax.plot(
            [xa, xb + offset],
            [ya + shift, yb + shift],
            marker="o",
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.6,
            **style,
        )
    ax.set(xlim=(-0.01, offset + 1.01), ylim=(1.01, -0.01), aspect="equal")
    told = f"{int(matches.right[asked].sum())} of {len(asked)}"
    ax.text(1 + _GAP / 2, 1.05, told, color=_INK, fontsize=14, ha="center", va="top")
    ax.axis("off")


def _frame(ax: Axes) -> Axes:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(color=_INK, linewidth=0.8)
    return ax


def _stretch(heat: np.ndarray) -> np.ndarray:
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / max(high - low, 1e-12)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the program's name in it the same figure is the same file.
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()
