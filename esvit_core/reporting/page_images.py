"""The images of the report's page. Each kind may be missing; the page then states the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.evaluation.segmentation import overlays_uri
from esvit_core.reporting.contact_sheet import Thumbnail, draw_contact_sheet, draw_duplicates
from esvit_core.reporting.feature_map import TITLE, draw_feature_map
from esvit_core.reporting.images import figure_uri
from esvit_core.reporting.neighbors import Neighbors, WorstClass, draw_neighbors, draw_worst_classes
from esvit_core.reporting.run_records import RunRecords
from esvit_core.reporting.samples import Sample, draw_samples
from esvit_core.storage import ObjectStore, StoreRefused, StoreUnavailable, join_uri

T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """A figure of the run, as a data URI."""

    title: str
    caption: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class PageImages:
    """The images of the page.

    Attributes:
        samples: images with their crops, or the reason why there are none.
        drawings: figures of correspondence, attention and features.
        missing: missing figures, and the reasons.
        sheet: small training images.
        duplicates: groups of images that are identical or look alike.
        neighbors: held-out images with their nearest training images, or the reason why there are none.
        worst_classes: the classes that the linear probe recognizes least, with images.
    """

    samples: list[Sample] | str
    drawings: list[Drawing]
    missing: list[tuple[str, str]]
    sheet: list[Thumbnail]
    duplicates: list[list[Thumbnail]]
    neighbors: Neighbors | str
    worst_classes: list[WorstClass]


def read_page_images(records: RunRecords, store: ObjectStore) -> PageImages:
    """Draw the images of a run's page from its data and features in the store.

    Raises:
        StoreUnavailable, StoreRefused: the store cannot be read.
    """
    drawings, missing = _drawings(records, store)
    manifest = records.manifest.value
    if manifest is None:
        reason = records.manifest.reason
        return PageImages(reason, drawings, missing, [], [], reason, [])
    run, statistics = records.run_uri, records.statistics
    trains = "train" in manifest.splits and manifest.splits["train"].samples > 0
    worst = _try(lambda: draw_worst_classes(store, run, manifest, records.results))
    sheet = _try(lambda: draw_contact_sheet(store, run)) if trains else []
    duplicates = _try(lambda: draw_duplicates(store, run, statistics)) if trains and statistics else []
    feature_map = _try(lambda: draw_feature_map(store, run, manifest.classes))
    if isinstance(feature_map, str):
        missing.append(("feature map", feature_map))
    elif feature_map is not None:
        drawings.append(Drawing(TITLE, feature_map[1], *figure_uri(feature_map[0])))
    if records.config.evaluation.segmentation and not isinstance(overlays := _try(lambda: _overlays(run, store)), str):
        drawings.append(overlays)
    return PageImages(
        samples=_try(lambda: _samples(records, manifest, store)) if trains else "there are no training images",
        drawings=drawings,
        missing=missing,
        # Of these, the section "Images and their crops" gives the reason.
        sheet=[] if isinstance(sheet, str) else sheet,
        duplicates=[] if isinstance(duplicates, str) else duplicates,
        neighbors=_try(lambda: draw_neighbors(store, run)),
        worst_classes=[] if isinstance(worst, str) else worst,
    )


def _try(draw: Callable[[], T]) -> T | str:
    """Return what was drawn, or the reason why it could not be.

    Raises:
        StoreUnavailable, StoreRefused: the store cannot be read.
    """
    try:
        return draw()
    except (StoreUnavailable, StoreRefused):
        raise
    except UserError as error:
        return str(error)


def _samples(records: RunRecords, manifest: Manifest, store: ObjectStore) -> list[Sample]:
    return draw_samples(store, records.run_uri, records.config, manifest.classes)


def _overlays(run_uri: str, store: ObjectStore) -> Drawing:
    caption = "Test images with their masks, and the classes that a linear head on the frozen regions predicts."
    return Drawing("Segmentation", caption, *figure_uri(store.get_bytes(overlays_uri(run_uri))))


def _drawings(records: RunRecords, store: ObjectStore) -> tuple[list[Drawing], list[tuple[str, str]]]:
    index = records.images.value
    if index is None:
        return [], [("correspondence and attention", records.images.reason)]
    drawn = []
    for image in index.get("images", []):
        uri, width, height = figure_uri(store.get_bytes(join_uri(records.run_uri, "visualization", image["file"])))
        drawn.append(Drawing(image["title"], image["caption"], uri, width, height))
    return drawn, [(entry["what"], entry["reason"]) for entry in index.get("left_out", [])]
