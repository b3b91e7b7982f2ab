"""Compute the features of images and write them to a file, with only a few batches in memory."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import FileReadError, Source
from esvit_core.data.ingest.decode import BadImage, describe_bad_files, to_stored_image
from esvit_core.data.ingest.entries import Entry, Selection
from esvit_core.data.ingest.file_kinds import ignored_kind, suffix
from esvit_core.data.ingest.intensity_scale import find_scales
from esvit_core.data.ingest.layout import LayoutSettings
from esvit_core.data.ingest.pixels import PixelSettings
from esvit_core.data.ingest.prefetch import prefetch, reading_threads
from esvit_core.data.ingest.read_image import NotAnImage, read_image_file
from esvit_core.data.ingest.source_reading import is_other_file, layout_of, no_images
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.loading.augment import EvalTransform
from esvit_core.data.shards.reader import decode_image
from esvit_core.embedding.feature_files import SUFFIXES, Rows, open_feature_file, require_pyarrow
from esvit_core.errors import UserError
from esvit_core.models.precision import Precision, choose_precision
from esvit_core.models.region_map import FeatureNetwork
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.runs.gpus import computing_device
from esvit_core.storage import ObjectStore
from esvit_core.storage.atomic_write import atomic_write, require_absent


@dataclass(frozen=True)
class EmbedSettings:
    """How features are computed and stored.

    Args:
        regions: also write the map of region features.
        dtype: type of the region features; view features are float32.
        precision: precision of the network. ``float32``, as in evaluation; ``auto``: bfloat16 if the hardware supports it,
            which is faster and has three significant digits.
        batch_size: images per batch.
        max_bad_fraction: share of bad files above which it is an error.
        max_megapixels: larger images are bad files.
        max_aspect_ratio: images whose longer side is more than so many times the shorter one are bad files.
    """

    regions: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    batch_size: int = 64
    max_bad_fraction: float = DataConfig().max_bad_fraction
    max_megapixels: float = DataConfig().max_megapixels
    max_aspect_ratio: float = DataConfig().max_aspect_ratio


@dataclass(frozen=True)
class EmbedResult:
    """Description of a written feature file.

    Attributes:
        path: the file.
        images: number of rows.
        width: width of the view feature, D.
        region_map: H, W and D' of the regions; None without regions.
        bad: names and reasons of the files that were left out.
        precision: precision of the network, with the reason.
    """

    path: Path
    images: int
    width: int
    region_map: tuple[int, ...] | None
    bad: list[tuple[str, str]]
    precision: str

    @property
    def bad_list(self) -> Path:
        """File that lists the bad files, if there are any: one JSON object per line, with ``name`` and ``reason``."""
        return self.path.with_suffix(".bad.jsonl")

    @property
    def usage(self) -> list[str]:
        """Python code that reads the file, in lines."""
        path = str(self.path)
        if self.path.suffix == ".npz":
            return ["import numpy", f"features = numpy.load({path!r})  # {', '.join(self._columns)}"]
        lines = [
            "import numpy, pyarrow.parquet",
            f"table = pyarrow.parquet.read_table({path!r})  # {', '.join(self._columns)}",
            'view = numpy.stack(table["view"].to_numpy())',
        ]
        return lines + (
            ['regions = table["regions"].combine_chunks().to_numpy_ndarray()  # (N, H, W, D)']
            if self.region_map
            else []
        )

    @property
    def _columns(self) -> list[str]:
        return ["name", "label", "view", *(["regions"] if self.region_map else [])]

    def describe(self) -> str:
        """Describe the file in one line."""
        regions = "" if self.region_map is None else ", regions {} x {} x {}".format(*self.region_map)
        bad = ""
        if self.bad:
            files = "file" if len(self.bad) == 1 else "files"
            bad = f"; {len(self.bad):,} bad {files} left out, listed in {self.bad_list}"
        return f"{self.images:,} images, view feature {self.width}{regions}, computed in {self.precision}{bad}"


def embed(
    backbone: nn.Module,
    source: str,
    out: Path,
    settings: EmbedSettings | None = None,
    store: ObjectStore | None = None,
) -> EmbedResult:
    """Write the features of every image of a source, prepared in the same way as for evaluation.

    Args:
        backbone: from :func:`esvit_core.weights.backbone.load_backbone`; runs on the GPU if there is one.
        source: folder, tar, zip or ``s3://bucket/prefix``.
        out: ``.parquet`` or ``.npz``, written atomically; see :mod:`~esvit_core.embedding.feature_files`. Bad files are
            listed in a file beside it.
        settings: None: view features, computed in float32.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: ``out`` exists or cannot be written, the source does not exist or contains no images, or it has more bad
            files than allowed.
    """
    settings = settings or EmbedSettings()
    require_absent(out, SUFFIXES)
    if out.suffix == ".parquet":
        require_pyarrow()
    description: dict[str, Any] = backbone.backbone_config  # type: ignore[assignment]
    device = computing_device()
    precision = choose_precision(settings.precision, device)
    network = FeatureNetwork(backbone.to(device), settings.regions).eval()
    with open_source(source, store) as opened, atomic_write(out) as path:
        is_file = [not is_other_file(entry, settings.max_megapixels) for entry in opened.entries]
        files = Selection.where(opened.entries, np.array(is_file, dtype=bool))
        if not files:
            raise no_images(source, Counter(ignored_kind(entry.name) for entry in opened.entries))
        labels = _labels(files, opened, source)
        file = open_feature_file(path)
        bad: list[tuple[str, str]] = []

        def leave_out(entry: Entry, reason: str) -> None:
            bad.append((entry.name, reason))
            _check_share(source, bad, len(files), settings.max_bad_fraction)

        count, rows = 0, None
        pixels = _pixel_settings(opened, files, description, settings)
        prepare = partial(_prepare, opened, description, eval_transform(description), settings, pixels)
        with torch.inference_mode(), ProgressLine(len(files), label="embed") as progress:
            for names, images, read in _batches(files, prepare, leave_out, settings.batch_size):
                features = _compute(network, images, device, precision)
                rows = _rows(names, [labels[name] for name in names], features, settings.dtype)
                file.add(rows)
                count += len(names)
                progress.update(read)
            progress.update(len(files) - progress.done)  # bad files at the end
        if rows is None and not bad:
            raise no_images(source, Counter(ignored_kind(entry.name) for entry in opened.entries))
        if rows is None:
            raise UserError(f"{source}: none of its {len(files):,} files is an image: {describe_bad_files(bad)}")
        region_map = None if rows.regions is None else rows.regions.shape[1:]
        precision_text = f"{precision.name} ({precision.reason})"
        result = EmbedResult(out, count, rows.view.shape[1], region_map, sorted(bad), precision_text)
        file.close(
            {"source": source, "images": count, "bad": len(bad), "precision": precision_text, "backbone": description}
        )
        if bad:
            lines = (json.dumps({"name": n, "reason": r}, ensure_ascii=False) + "\n" for n, r in result.bad)
            result.bad_list.write_text("".join(lines), encoding="utf-8")
    return result


def _labels(files: Selection, opened: Source, source: str) -> dict[str, str | None]:
    layout = layout_of(files, source, LayoutSettings(require_train=False), opened.read)
    return {name: assignment.label for name, assignment in zip(files.names, layout.assignments, strict=True)}


def eval_transform(description: dict[str, Any]) -> EvalTransform:
    """Return the transform for evaluation that a published backbone's ``backbone.json`` describes."""
    return EvalTransform(
        description["eval_resize"], description["eval_crop"], tuple(description["mean"]), tuple(description["std"])
    )


def _pixel_settings(
    opened: Source, files: Sequence[Entry], description: dict[str, Any], settings: EmbedSettings
) -> PixelSettings:
    """Return how deep pixels are converted: as for the training, otherwise by a sample of the images."""
    recorded = description.get("pixels", {})
    bands = recorded.get("bands")
    config = DataConfig(
        max_megapixels=settings.max_megapixels,
        intensity=recorded.get("intensity", "auto"),
        bands=None if bands is None else tuple(bands),
    )
    scales = {kind: (low, high) for kind, (low, high) in recorded.get("scales", {}).items()}
    return PixelSettings.of(config, find_scales(opened, files, config) | scales)


def _prepare(
    opened: Source,
    description: dict[str, Any],
    transform: EvalTransform,
    settings: EmbedSettings,
    pixels: PixelSettings,
    entry: Entry,
) -> Tensor:
    """Return an image as input for the network, (3, S, S), after the steps of a stored image. Runs in several threads."""
    if entry.problem is not None:
        raise FileReadError(entry.problem)
    stored = to_stored_image(
        read_image_file(opened, entry),
        settings.max_megapixels,
        description.get("store_short_side"),
        settings.max_aspect_ratio,
        pixels,
        suffix(entry.name),
    )
    return transform(decode_image(stored.data))


def _batches(
    files: Sequence[Entry], prepare: Callable[[Entry], Tensor], leave_out: Callable[[Entry, str], None], size: int
) -> Iterator[tuple[list[str], list[Tensor], int]]:
    """Yield names, images, and the number of files read; the next batch is read while one is processed."""
    names: list[str] = []
    images: list[Tensor] = []
    read = 0
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="embed") as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # about malformed files; bad files are listed
        for entry, future in prefetch(pool, prepare, files, size + reading_threads()):
            read += 1
            try:
                images.append(future.result())
                names.append(entry.name)
            except (BadImage, FileReadError) as error:
                leave_out(entry, str(error))
            except NotAnImage:
                pass  # another kind of file
            if len(names) == size:
                yield names, images, read
                names, images, read = [], [], 0
    if names:
        yield names, images, read


def _compute(
    network: nn.Module, images: list[Tensor], device: torch.device, precision: Precision
) -> tuple[np.ndarray, ...]:
    with precision.autocast():
        features = network(torch.stack(images).to(device))
    return tuple(values.float().cpu().numpy() for values in features)


def _rows(names: list[str], labels: list[str | None], features: tuple[np.ndarray, ...], dtype: str) -> Rows:
    view, regions = features[0], features[1] if len(features) > 1 else None
    with np.errstate(over="ignore"):
        kept = None if regions is None else regions.astype(dtype)
    for name, *values in zip(names, *(v for v in (view, kept) if v is not None), strict=True):
        if not all(np.isfinite(v).all() for v in values):
            raise UserError(
                f"{name}: its features are not finite in this precision; use --precision float32 --dtype float32"
            )
    return Rows(names, labels, view, kept)


def _check_share(source: str, bad: list[tuple[str, str]], files: int, limit: float) -> None:
    if len(bad) > limit * files:
        raise UserError(
            f"{source}: {len(bad):,} of {files:,} files are bad so far, more than the allowed {100 * limit:g} %: "
            f"{describe_bad_files(bad)}; remove them, or raise --max-bad-fraction"
        )
