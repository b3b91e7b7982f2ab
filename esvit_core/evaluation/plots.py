"""Figures of correspondence, attention and segmentation, as PNGs that are readable on light and dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from esvit_core.evaluation.correspondence import Crop, Matches, Pair, region_centers
from esvit_core.evaluation.masked_images import IGNORED, MaskedImage

# Colors of classes, readable on light and dark pages.
CLASS_COLORS = ("#2f6fed", "#f97316", "#10b981", "#dc2626", "#9333ea", "#a16207", "#f472b6", "#22b8cf")
# Mid-gray text has a contrast of at least 4 on white and on near-black.
INK = "#7d8590"
_CORRECT, _WRONG = "#1a9f4b", "#e0453c"
_GAP = 0.42  # between the two crops, in units of a crop's side
_LINES = 16  # more lines than this hide the image
_DPI = 110
_HEADS = 4
_HEAT = colormaps["inferno"]


def correspondence_figure(
    pairs: Sequence[Pair], matches: Mapping[str, Sequence[Matches]], accuracies: Mapping[str, float]
) -> bytes:
    """Draw crop A left and crop B right, joined by their best matches; one column per model.

    Correct matches are green, wrong ones red and dashed.

    Args:
        pairs: pairs to draw, one per row.
        matches: matches of each pair, by model in the order of the columns.
        accuracies: accuracy of each model over all measured pairs, percent.

    Returns:
        PNG.
    """
    columns = len(matches)
    figure = Figure(figsize=(4.6 * columns, 0.7 + 2.3 * len(pairs)), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pairs), columns, squeeze=False)
    for column, (model, of_model) in enumerate(matches.items()):
        for row, pair in enumerate(pairs):
            _draw_pair(axes[row, column], pair, of_model[row])
        axes[0, column].set_title(f"{model}: {accuracies[model]:.1f} % correct", color=INK, fontsize=17, pad=10)
    top, bottom = 1 - 0.55 / figure.get_figheight(), 0.3 / figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=bottom, wspace=0.06, hspace=0.2)
    return png(figure)


def heads_shown(heads: int) -> int:
    """Return how many heads :func:`attention_figure` shows individually; a single head equals the mean."""
    return min(_HEADS, heads) if heads > 1 else 0


def attention_figure(
    images: Sequence[np.ndarray], trained: Sequence[np.ndarray], baseline: Sequence[np.ndarray]
) -> bytes:
    """Draw each image, the mean over the heads of both models, and the first heads of the trained model.

    Args:
        images: input images, (S, S, 3) uint8.
        trained, baseline: maps of each image, 0..1, (heads, h, w).

    Returns:
        PNG.
    """
    heads = heads_shown(len(trained[0]))
    columns = 3 + heads
    cell = 1.5 if heads else 2.2
    figure = Figure(figsize=(cell * columns, 0.55 + cell * len(images)), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), columns, squeeze=False)
    titles = ["image", "baseline", "trained", *(f"head {i + 1}" for i in range(heads))]
    for row, image in enumerate(images):
        _frame(axes[row, 0]).imshow(image, interpolation="lanczos")
        maps = [_stretch(baseline[row].mean(0)), _stretch(trained[row].mean(0)), *trained[row][:heads]]
        for ax, heat in zip(axes[row, 1:], maps, strict=True):
            _frame(ax).imshow(heat_over(image, heat))
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, color=INK, fontsize=16, pad=7)
    top = 1 - 0.45 / figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, top=top, bottom=0.005, wspace=0.05, hspace=0.05)
    return png(figure)


def segmentation_figure(items: Sequence[MaskedImage], predictions: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """Draw images, their masks, and the classes that each model predicts; class 0 is left transparent.

    Args:
        items: the images with their masks, at least as many as there are predictions.
        predictions: predicted classes of the first images, (S, S) uint8, by model in the order of the columns.

    Returns:
        PNG.
    """
    rows = len(next(iter(predictions.values())))
    titles = ["image", "mask", *predictions]
    figure = Figure(figsize=(1.9 * len(titles), 0.55 + 1.9 * rows), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(titles), squeeze=False)
    for row, item in enumerate(items[:rows]):
        _frame(axes[row, 0]).imshow(item.pixels, interpolation="lanczos")
        for ax, classes in zip(axes[row, 1:], [item.mask, *(maps[row] for maps in predictions.values())], strict=True):
            _frame(ax).imshow(classes_over(item.pixels, classes), interpolation="nearest")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, color=INK, fontsize=16, pad=7)
    top = 1 - 0.45 / figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, top=top, bottom=0.005, wspace=0.05, hspace=0.05)
    return png(figure)


def classes_over(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Overlay classes (S, S) in color on the grayed image (S, S, 3) uint8; class 0 and ignored pixels stay gray."""
    gray = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None] / 255
    colors = np.array([to_rgb(color) for color in CLASS_COLORS])
    shown = ((classes > 0) & (classes != IGNORED))[..., None]
    colored = 0.65 * colors[(classes.astype(int) - 1) % len(colors)] + 0.35 * gray
    return np.where(shown, colored, 0.15 + 0.7 * gray)


def heat_over(image: np.ndarray, heat: np.ndarray, side: int = 160) -> np.ndarray:
    """Overlay a heat map (h, w) of 0..1 in color on the grayed image (S, S, 3) uint8; returns (side, side, 3) of 0..1."""
    gray = Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BICUBIC)
    smooth = Image.fromarray(heat.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    weight = np.clip(np.asarray(smooth), 0, 1)
    color = _HEAT(weight)[..., :3]
    background = 0.05 + 0.6 * np.asarray(gray, np.float32)[..., None] / 255
    opacity = 0.4 + 0.4 * weight[..., None]
    return color * opacity + background * (1 - opacity)


def cut(image: np.ndarray, crop: Crop) -> np.ndarray:
    """Return the crop's part of the image at the image's resolution, mirrored if the crop is; (h, w, 3)."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = crop.box
    left, top = round(x0 * width), round(y0 * height)
    part = image[top : max(top + 1, round(y1 * height)), left : max(left + 1, round(x1 * width))]
    return part[:, ::-1] if crop.flipped else part


def _draw_pair(ax: Axes, pair: Pair, matches: Matches) -> None:
    offset = 1 + _GAP
    for crop, x in ((pair.a, 0.0), (pair.b, offset)):
        ax.imshow(cut(pair.image, crop), extent=(x, x + 1, 1, 0), interpolation="lanczos")
        ax.add_patch(Rectangle((x, 0), 1, 1, fill=False, edgecolor=INK, linewidth=1))
    side = math.isqrt(len(pair.queries))
    centers = region_centers(side)
    queries = np.flatnonzero(pair.queries)
    shown = queries[np.unique(np.linspace(0, len(queries) - 1, min(_LINES, len(queries))).round().astype(int))]
    for region in sorted(shown, key=lambda i: matches.correct[i]):  # correct ones on top
        (xa, ya), (xb, yb) = centers[region], centers[matches.indices[region]]
        # Lines of one row would overlap, so each column is shifted by less than half a region.
        shift = (xa - 0.5) * 0.5 / side
        correct = matches.correct[region]
        style: dict[str, Any] = (
            {"color": _CORRECT, "linewidth": 1.8} if correct else {"color": _WRONG, "linewidth": 1.2, "linestyle": "--"}
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
    label = f"{int(matches.correct[queries].sum())} of {len(queries)}"
    ax.text(1 + _GAP / 2, 1.05, label, color=INK, fontsize=14, ha="center", va="top")
    ax.axis("off")


def _frame(ax: Axes) -> Axes:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(color=INK, linewidth=0.8)
    return ax


def _stretch(heat: np.ndarray) -> np.ndarray:
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / max(high - low, 1e-12)


def text_settings() -> AbstractContextManager[None]:
    """Draw names as they are: a class called $x$ is not a formula."""
    return rc_context({"text.parse_math": False})


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG with a transparent background."""
    buffer = io.BytesIO()
    # Leave out the program's name, so that equal figures give equal files.
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()
