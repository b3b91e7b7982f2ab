"""A map of the held-out images by their features, colored by class: UMAP (McInnes et al., 2018) where the package
``umap-learn`` is installed, else the first two principal components.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from esvit_core.evaluation.plots import CLASS_COLORS, INK, png, text_settings
from esvit_core.evaluation.stored_features import load_features, stored_models
from esvit_core.reporting.neighbors import MOST_BYTES
from esvit_core.reporting.svg import drawable
from esvit_core.storage import ObjectStore

TITLE = "Feature map"
_IMAGES = 2_000
_NEIGHBORS = 15
_MODELS = ("baseline", "trained")  # left to right: before and after training


def draw_feature_map(store: ObjectStore, run_uri: str, classes: list[str]) -> tuple[bytes, str] | None:
    """Draw the view features of both backbones; returns a PNG and its caption, or None for fewer than three images.

    Raises:
        UserError: the features have not been extracted, or are too large.
    """
    models = [model for model in _MODELS if model in stored_models(store, run_uri)]
    found = {m: load_features(store, run_uri, m, "val", most_bytes=MOST_BYTES) for m in models}
    labels = found["trained"].labels[:_IMAGES]
    if len(labels) < 3:
        return None
    views = {model: features.view[:_IMAGES] for model, features in found.items()}
    images = f"the view features of {len(labels):,} held-out images"
    if (maps := _umap(views)) is not None:
        caption = f"UMAP (cosine distance) of {images}. Only which images are near each other means something."
    else:
        components = {model: principal_components(view) for model, view in views.items()}
        maps = {model: points for model, (points, _) in components.items()}
        shares = ", ".join(f"{model} {100 * share:.0f} %" for model, (_, share) in components.items())
        caption = (
            f"The first two principal components of {images}, normalized to length one. Share of the variance that they "
            f"hold: {shares}."
        )
    if (labels >= 0).any() and len(np.unique(labels)) > len(CLASS_COLORS):
        caption += f" Colored: the {len(CLASS_COLORS)} classes with the most images."
    return _draw(maps, labels, classes), caption


def _umap(views: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Return the coordinates of each model's images, (N, 2); None without the package or with too few images."""
    try:
        from umap import UMAP
    except ImportError:
        return None
    if len(next(iter(views.values()))) <= _NEIGHBORS:
        return None
    return {
        model: UMAP(n_neighbors=_NEIGHBORS, metric="cosine", random_state=0, n_jobs=1).fit_transform(view)
        for model, view in views.items()
    }


def principal_components(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Project features (N, D), normalized to length one, onto their first two principal components.

    Returns:
        The coordinates (N, 2), and the share of the variance that they hold, 0..1.
    """
    x = features.astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    x -= x.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)  # ascending
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.where(
        axes[np.abs(axes).argmax(0), range(axes.shape[1])] < 0, -1, 1
    )  # a sign that is always the same
    total = float(values.sum())
    return x @ axes, float(values[::-1][:2].sum()) / total if total > 0 else 0.0


def _draw(maps: dict[str, np.ndarray], labels: np.ndarray, classes: list[str]) -> bytes:
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    colored = present[np.argsort(-counts, kind="stable")][: len(CLASS_COLORS)]
    area = min(70.0, max(14.0, 12_000 / len(labels)))  # of a point
    with text_settings():
        figure = Figure(figsize=(9.4, 4.9))
        for axes, (model, points) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
            others = ~np.isin(labels, colored)
            axes.scatter(*points[others].T, s=0.8 * area, color=INK, alpha=0.5, linewidths=0)
            for color, each in zip(CLASS_COLORS, colored, strict=False):
                name = drawable(classes[each]) if each < len(classes) else str(each)
                axes.scatter(*points[labels == each].T, s=area, color=color, alpha=0.8, linewidths=0, label=name)
            axes.set(xticks=[], yticks=[])
            axes.set_title(model, color=INK, fontsize=17)
            for spine in axes.spines.values():
                spine.set_color(INK)
        if len(colored):
            handles, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(
                handles,
                [n[:20] for n in names],
                loc="lower center",
                ncols=4,
                frameon=False,
                labelcolor=INK,
                markerscale=1.2,
                fontsize=15,
                handletextpad=0.1,
                columnspacing=1,
            )
        rows = -(-len(colored) // 4)
        figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.03 + 0.07 * rows, wspace=0.04)
        return png(figure)
