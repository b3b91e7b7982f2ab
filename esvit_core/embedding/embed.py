"""From images to a file of features, without holding more than a few batches in memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import Entry, ReadProblem, Source
from esvit_core.data.ingest.decode import BadImage, listed, to_stored
from esvit_core.data.ingest.layout import arrange, is_ignored
from esvit_core.data.ingest.prefetch import ahead, reading_threads
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.loading.augment import EvalTransform
from esvit_core.data.shards.reader import decode_image
from esvit_core.embedding.feature_files import SUFFIXES, Rows, open_feature_file, require_pyarrow
from esvit_core.errors import UserError
from esvit_core.models.precision import Precision, choose_precision
from esvit_core.models.region_map import FeatureNetwork
from esvit_core.monitoring.progress_line import Progress
from esvit_core.storage import ObjectStore
from esvit_core.storage.atomic_write import atomic_write, require_absent


@dataclass(frozen=True)
class EmbedSettings:
    """How features are computed and kept.

    Args:
        regions: write the map of regions beside the view feature.
        dtype: of the regions; the view feature is float32.
        precision: arithmetic of the network. ``float32``, as in the measured steps; ``auto``: bfloat16 where it is
            native, which is faster and rounds to three digits.
        batch_size: images at a time.
        max_bad_fraction: share of bad files that is an error.
        max_megapixels: images with more are bad files.
    """

    regions: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    batch_size: int = 64
    max_bad_fraction: float = DataConfig().max_bad_fraction
    max_megapixels: float = DataConfig().max_megapixels


@dataclass(frozen=True)
class Embedded:
    """What was written.

    Attributes:
        path: the file.
        images: rows in it.
        width: of the view feature, D.
        region_map: H, W and D' of the regions; None where they were not asked for.
        bad: names and reasons of the files that were left out.
        precision: arithmetic of the network, with the reason.
    """

    path: Path
    images: int
    width: int
    region_map: tuple[int, ...] | None
    bad: list[tuple[str, str]]
    precision: str

    @property
    def bad_list(self) -> Path:
        """Where the bad files are listed, if there are any: a JSON object a line, with ``name`` and ``reason``."""
        return self.path.with_suffix(".bad.jsonl")

    @property
    def usage(self) -> list[str]:
        """Lines of Python that read the file."""
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
        """The same in a line."""
        regions = "" if self.region_map is None else ", regions {} x {} x {}".format(*self.region_map)
        bad = f"; {len(self.bad):,} bad files left out, listed in {self.bad_list}" if self.bad else ""
        return f"{self.images:,} images, view feature {self.width}{regions}, computed in {self.precision}{bad}"


def embed(
    backbone: nn.Module,
    source: str,
    out: Path,
    settings: EmbedSettings | None = None,
    store: ObjectStore | None = None,
) -> Embedded:
    """Write the features of every image of a source, prepared as the measured steps prepare them.

    Args:
        backbone: as :func:`esvit_core.weights.backbone.load_backbone` gives it; it runs on the GPU if there is one.
        source: folder, tar, zip or ``s3://bucket/prefix``.
        out: ``.parquet`` or ``.npz``, which appears whole or not at all; see
            :mod:`~esvit_core.embedding.feature_files`. Files that are no usable images are listed beside it.
        settings: None: view features, computed in float32.
        store: where an ``s3://`` source lies; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: ``out`` exists or cannot be written, the source does not exist or holds no images, or more of its
            files are bad than allowed.
    """
    settings = settings or EmbedSettings()
    require_absent(out, SUFFIXES)
    if out.suffix == ".parquet":
        require_pyarrow()
    description: dict[str, Any] = backbone.backbone_config  # type: ignore[assignment]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(settings.precision, device)
    network = FeatureNetwork(backbone.to(device), settings.regions).eval()
    with open_source(source, store) as opened, atomic_write(out) as path:
        files = [entry for entry in opened.entries if not is_ignored(entry.name)]
        if not files:
            raise UserError(f"{source}: no images in it; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")
        labels = _labels(files, source)
        file = open_feature_file(path)
        bad: list[tuple[str, str]] = []

        def leave_out(entry: Entry, reason: str) -> None:
            bad.append((entry.name, reason))
            _check_share(source, bad, len(files), settings.max_bad_fraction)

        count, rows = 0, None
        prepare = partial(_prepare, opened, description, eval_transform(description), settings.max_megapixels)
        with torch.inference_mode(), Progress(len(files), label="embed") as progress:
            for names, images, read in _batches(files, prepare, leave_out, settings.batch_size):
                features = _compute(network, images, device, precision)
                rows = _rows(names, [labels[name] for name in names], features, settings.dtype)
                file.add(rows)
                count += len(names)
                progress.update(read)
            progress.update(len(files) - progress.done)  # bad ones at the end
        if rows is None:
            raise UserError(f"{source}: none of its {len(files):,} files is an image: {listed(bad)}")
        region_map = None if rows.regions is None else rows.regions.shape[1:]
        told = f"{precision.name} ({precision.reason})"
        done = Embedded(out, count, rows.view.shape[1], region_map, sorted(bad), told)
        file.close({"source": source, "images": count, "bad": len(bad), "precision": told, "backbone": description})
        if bad:
            lines = (json.dumps({"name": n, "reason": r}, ensure_ascii=False) + "\n" for n, r in done.bad)
            done.bad_list.write_text("".join(lines), encoding="utf-8")
    return done


def _labels(files: list[Entry], source: str) -> dict[str, str | None]:
    layout = arrange([entry.name for entry in files], source, to_train_on=False)
    return {entry.name: place.label for entry, place in zip(files, layout.places, strict=True)}


def eval_transform(description: dict[str, Any]) -> EvalTransform:
    """The transform of the measured steps, as a published backbone's ``backbone.json`` tells it."""
    return EvalTransform(
        description["eval_resize"], description["eval_crop"], tuple(description["mean"]), tuple(description["std"])
    )


def _prepare(
    opened: Source, description: dict[str, Any], transform: EvalTransform, max_megapixels: float, entry: Entry
) -> Tensor:
    """An image as the network takes it, (3, S, S): through the same steps as a stored one. Runs in several threads."""
    if entry.problem is not None:
        raise ReadProblem(entry.problem)
    stored = to_stored(opened.read(entry), max_megapixels, description.get("store_short_side"))
    return transform(decode_image(stored.data))


def _batches(
    files: list[Entry], prepare: Callable[[Entry], Tensor], leave_out: Callable[[Entry, str], None], size: int
) -> Iterator[tuple[list[str], list[Tensor], int]]:
    """Names and images, and how many files they are of; the next batch is read while one is worked on."""
    names: list[str] = []
    images: list[Tensor] = []
    read = 0
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="embed") as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of malformed files; those that matter are listed
        for entry, future in ahead(pool, prepare, files, size + reading_threads()):
            read += 1
            try:
                images.append(future.result())
                names.append(entry.name)
            except (BadImage, ReadProblem) as error:
                leave_out(entry, str(error))
            if len(names) == size:
                yield names, images, read
                names, images, read = [], [], 0
    if names:
        yield names, images, read


def _compute(
    network: nn.Module, images: list[Tensor], device: torch.device, precision: Precision
) -> tuple[np.ndarray, ...]:
    with precision.autocast():
        found = network(torch.stack(images).to(device))
    return tuple(values.float().cpu().numpy() for values in found)


def _rows(names: list[str], labels: list[str | None], features: tuple[np.ndarray, ...], dtype: str) -> Rows:
    view, regions = features[0], features[1] if len(features) > 1 else None
    with np.errstate(over="ignore"):
        kept = None if regions is None else regions.astype(dtype)
    for name, *values in zip(names, *(v for v in (view, kept) if v is not None), strict=True):
        if not all(np.isfinite(v).all() for v in values):
            raise UserError(
                f"{name}: its features are not finite in this arithmetic; take --precision float32 --dtype float32"
            )
    return Rows(names, labels, view, kept)


def _check_share(source: str, bad: list[tuple[str, str]], files: int, limit: float) -> None:
    if len(bad) > limit * files:
        raise UserError(
            f"{source}: {len(bad):,} of {files:,} files are bad so far, more than the allowed {100 * limit:g} %: "
            f"{listed(bad)}; remove them, or raise --max-bad-fraction"
        )
