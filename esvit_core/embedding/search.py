"""Find the images of a source that are most similar to a given one, by the view features of a backbone."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from esvit_core.config import DataConfig
from esvit_core.data.image_sheet import draw_sheet
from esvit_core.data.ingest.decode import BadImage, to_stored_image
from esvit_core.data.ingest.file_kinds import suffix
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.shards.reader import decode_image
from esvit_core.embedding.embed import EmbedSettings, embed
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore

_SHOWN_SIDE = 256  # images of a contact sheet are shrunk to this short side, pixels


@dataclass(frozen=True)
class Match:
    """An image that was found.

    Attributes:
        name: path below the source.
        label: name of its class; empty if there are no classes.
        similarity: cosine of its feature and the query's, -1 to 1.
    """

    name: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        queries: the queries, as they were given.
        matches: for each query, the most similar images, the most similar first.
        sheet: a row for each query: the query, then its matches.
    """

    queries: list[str]
    matches: list[list[Match]]
    sheet: Image.Image


def search(
    backbone: nn.Module, source: str, queries: Sequence[str], count: int = 8, store: ObjectStore | None = None
) -> Found:
    """Find the images of a source that are most similar to each query.

    Args:
        backbone: from :func:`esvit_core.weights.backbone.load_backbone`.
        source: folder, tar, zip or ``s3://bucket/prefix``.
        queries: files, or names of images of the source.
        count: number of images per query.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the source or a query does not exist, or is not an image.
    """
    shown = {query: _shown_query(Path(query)) for query in queries if Path(query).is_file()}
    with tempfile.TemporaryDirectory(prefix="esvit-search-") as folder:
        features = _features(backbone, source, Path(folder) / "data.npz", store)
        known = {name: row for row, name in enumerate(features.names)}
        files = {query: path for query in queries if query not in known and (path := _file(query, source))}
        outside = _outside(backbone, files, Path(folder))
    rows, matches, images = [], [], []
    for query in queries:
        unit = outside[query] if query in outside else features.units[known[query]]
        similarity = features.units @ unit
        nearest = np.argsort(-similarity, kind="stable")
        chosen = [int(row) for row in nearest if features.names[row] != query][:count]
        rows.append(chosen)
        matches.append([Match(features.names[r], features.labels[r], float(similarity[r])) for r in chosen])
    wanted = {features.names[row] for chosen in rows for row in chosen} | {query for query in queries if query in known}
    pixels = _pixels(source, wanted, store)
    for query, found in zip(queries, matches, strict=True):
        first = shown[query] if query in files else pixels[query]
        images.append([first, *(pixels[match.name] for match in found)])
    return Found(list(queries), matches, draw_sheet(images, ["query", *(str(n + 1) for n in range(count))]))


@dataclass(frozen=True)
class _Features:
    names: list[str]
    labels: list[str]
    units: np.ndarray  # (N, D), of length 1


def _features(backbone: nn.Module, source: str, out: Path, store: ObjectStore | None) -> _Features:
    embed(backbone, source, out, EmbedSettings(), store)
    with np.load(out) as arrays:
        view = arrays["view"].astype(np.float32)
        units = view / np.maximum(np.linalg.norm(view, axis=1, keepdims=True), 1e-12)
        return _Features(arrays["name"].tolist(), arrays["label"].tolist(), units)


def _file(query: str, source: str) -> Path:
    path = Path(query)
    if not path.is_file():
        raise UserError(f"--query {query}: no such file, and no image of that name in {source}; name one of the two")
    return path


def _outside(backbone: nn.Module, files: dict[str, Path], folder: Path) -> dict[str, np.ndarray]:
    """Return the unit features of the files, by query."""
    found = {}
    for number, (query, path) in enumerate(files.items()):
        place = folder / str(number)
        place.mkdir()
        shutil.copyfile(path, place / f"query{path.suffix}")
        found[query] = _features(backbone, str(place), folder / f"{number}.npz", None).units[0]
    return found


def _pixels(source: str, names: set[str], store: ObjectStore | None) -> dict[str, np.ndarray]:
    """Return images of the source (H, W, 3) uint8, by name."""
    with open_source(source, store) as opened:
        entries = {entry.name: entry for entry in opened.entries if entry.name in names}
        return {name: _shown(opened.read(entry), name) for name, entry in entries.items()}


def _shown_query(path: Path) -> np.ndarray:
    try:
        return _shown(path.read_bytes(), path.name)
    except BadImage as error:
        raise UserError(f"--query {path}: {error}; name an image") from None
    except OSError as error:
        raise UserError(f"--query {path}: cannot be read ({error.strerror})") from None


def _shown(content: bytes, name: str) -> np.ndarray:
    limits = DataConfig()
    with warnings.catch_warnings(action="ignore"):
        stored = to_stored_image(
            content, limits.max_megapixels, _SHOWN_SIDE, limits.max_aspect_ratio, ending=suffix(name)
        )
    return decode_image(stored.data)
