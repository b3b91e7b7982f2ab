"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from esvit_core import __version__
from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.reporting import verdict, words
from esvit_core.reporting.classes import class_table
from esvit_core.reporting.facts import Facts, read_facts
from esvit_core.reporting.images import figure_uri
from esvit_core.reporting.result_table import label_of, percent, points, summarise, typeset
from esvit_core.reporting.samples import Sample, draw_samples
from esvit_core.reporting.training_charts import in_groups, told_signs, training_charts
from esvit_core.storage import ObjectStore, StoreRefused, StoreUnavailable, join_uri

REPORT = "report/report.html"
TEMPLATE, STYLE = "report.html.jinja", "report.css"
CITATION = """\
@inproceedings{li2022esvit,
  title     = {Efficient Self-supervised Vision Transformers for Representation Learning},
  author    = {Li, Chunyuan and Yang, Jianwei and Zhang, Pengchuan and Gao, Mei and Xiao, Bin and
               Dai, Xiyang and Yuan, Lu and Gao, Jianfeng},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2022}
}"""
_CLASSES_SHOWN = 100
_NAMES_SHOWN = 5
# Dashes of the legend: those of charts.py, in the legend's own units.
_LEGEND_DASHES = ("none", "8 3", "2 2.5")


@dataclass(frozen=True)
class Drawing:
    """An image of the run, as a data URI."""

    title: str
    caption: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class BadGroup:
    """Files that were left out for one reason: how many, and the first names."""

    reason: str
    count: int
    names: list[str]


def write_report(run_uri: str, store: ObjectStore, config: Config) -> str:
    """Write ``report/report.html`` of a run from what the store holds of it.

    Every piece may be missing: the report then says what is missing, and why. Written again it is replaced, which
    brings it up to date with what has been added since.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        store: where the run is.
        config: of the run.

    Returns:
        The HTML: one file without scripts that loads nothing, for a light and a dark screen.

    Raises:
        StoreUnavailable, StoreRefused: the store cannot be read or written.
    """
    facts = read_facts(run_uri, store, config)
    html = render(facts, _samples(facts, store), *_drawings(facts, store))
    store.put_bytes(join_uri(run_uri, REPORT), html.encode(), content_type="text/html; charset=utf-8")
    return html


def render(
    facts: Facts, samples: list[Sample] | str, drawings: list[Drawing], drawings_missing: list[tuple[str, str]]
) -> str:
    """The page.

    Args:
        samples: images with their crops, or why there are none.
        drawings: of correspondence and attention.
        drawings_missing: what is not among them, and why.
    """
    rows = summarise(facts.results)
    measured = [row for row in rows if row.trained is not None]
    unmeasured = [row for row in rows if row.trained is None]
    training, log = facts.training.value, facts.log.value or []
    resumes = training.resumes if training else []
    bad = _bad_groups(facts)
    classes = class_table(facts.results)
    left_out = [(row.label, row.reason) for row in unmeasured] + drawings_missing + _left_out(facts, samples, bad)
    crops = facts.config.augment
    html = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            facts=facts,
            run_id=facts.run_id,
            recipe=facts.config.recipe,
            version=__version__,
            css=_style(),
            verdict=verdict.judge(facts),
            promotion=verdict.promotion(facts),
            tiles=verdict.tiles(facts),
            measured=measured,
            unmeasured=unmeasured,
            any_top5=any(row.top5 is not None for row in rows),
            protocols=_protocols(facts),
            classes=classes,
            class_limit=_CLASSES_SHOWN,
            drawings=drawings,
            drawings_missing=[f"{what}: {reason}" for what, reason in drawings_missing],
            data_rows=words.data_rows(facts),
            classes_counted=_classes_counted(facts),
            splits=_split_names(facts),
            samples=samples,
            crop_sizes=(crops.global_crops.size, max((kind.size for kind in crops.local_kinds), default=0)),
            bad=bad,
            training_rows=words.training_rows(training, log) if training else [],
            signs=told_signs(log),
            chart_groups=in_groups(training_charts(log, facts.config, resumes)),
            dashes=_LEGEND_DASHES,
            resumes=resumes,
            recipe_rows=words.recipe_rows(facts),
            configuration=facts.config.to_yaml(),
            left_out=left_out,
            usage=usage(facts),
            lineage_rows=words.lineage_rows(facts),
            citation=CITATION,
        )
    )
    return html + "\n"


def usage(facts: Facts) -> str:
    """Three lines of Python that load the backbone and use it."""
    backbone = facts.backbone.value or {}
    size, width = facts.config.evaluation.crop, backbone.get("num_features", "D")
    return (
        "import esvit_core, torch\n"
        f'backbone = esvit_core.load_backbone("{join_uri(facts.run_uri, "backbone")}")\n'
        f"features = backbone(torch.rand(8, 3, {size}, {size}))  # (8, {width})"
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("esvit_core", "reporting"),
        autoescape=True,  # names of files and classes are the user's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda value: typeset(percent(value)),
        points=lambda value: typeset(points(value)),
        width=lambda value: f"{min(max(value, 0.0), 100.0):.1f}",
    )
    return environment


def _style() -> str:
    return Markup((resources.files("esvit_core") / "reporting" / STYLE).read_text(encoding="utf-8"))


def _samples(facts: Facts, store: ObjectStore) -> list[Sample] | str:
    manifest = facts.manifest.value
    if manifest is None:
        return facts.manifest.reason
    if "train" not in manifest.splits or not manifest.splits["train"].samples:
        return "there are no training images"
    try:
        return draw_samples(store, facts.run_uri, facts.config, manifest.classes)
    except (StoreUnavailable, StoreRefused):
        raise
    except UserError as error:
        return str(error)


def _drawings(facts: Facts, store: ObjectStore) -> tuple[list[Drawing], list[tuple[str, str]]]:
    index = facts.images.value
    if index is None:
        return [], [("correspondence and attention", facts.images.reason)]
    drawn = []
    for image in index.get("images", []):
        uri, width, height = figure_uri(store.get_bytes(join_uri(facts.run_uri, "visualization", image["file"])))
        drawn.append(Drawing(image["title"], image["caption"], uri, width, height))
    return drawn, [(entry["what"], entry["reason"]) for entry in index.get("left_out", [])]


def _bad_groups(facts: Facts) -> list[BadGroup]:
    """Most frequent reason first."""
    counts: Counter[str] = Counter(facts.manifest.value.bad.reasons if facts.manifest.value else {})
    groups = []
    for reason, count in counts.most_common():
        names = [bad.name + bad.reason.removeprefix(reason) for bad in facts.bad_files if _is_of(bad.reason, reason)]
        groups.append(BadGroup(reason, count, names[:_NAMES_SHOWN]))
    return groups


def _is_of(reason: str, kind: str) -> bool:
    """The manifest counts kinds of reasons; a file's reason may go on with what is particular to it."""
    return reason == kind or reason.startswith((f"{kind} (", f"{kind} of "))


def _left_out(facts: Facts, samples: list[Sample] | str, bad: list[BadGroup]) -> list[tuple[str, str]]:
    pieces: list[tuple[str, Any]] = [
        ("data", facts.manifest),
        ("training", facts.training),
        ("training log", facts.log),
        ("backbone", facts.backbone),
    ]
    found = [(what, piece.reason) for what, piece in pieces if piece.value is None]
    if isinstance(samples, str) and facts.manifest.value is not None:
        found.append(("images and their crops", samples))
    if bad:
        told = "; ".join(f"{group.reason} ({group.count:,})" for group in bad)
        found.append((f"{sum(group.count for group in bad):,} files of the source", told))
    manifest = facts.manifest.value
    if manifest is not None and manifest.not_chosen:
        found.append((f"{manifest.not_chosen:,} images", f"data.max_images is {facts.config.data.max_images:,}"))
    if manifest is not None and manifest.ignored:
        found.append((f"{manifest.ignored:,} files", "no one's images, such as .DS_Store"))
    return found + _notes(facts)


def _notes(facts: Facts) -> list[tuple[str, str]]:
    """What the evaluations say of their figures: each remark once, with all that make it."""
    labels: dict[str, list[str]] = {}
    for result in facts.results:
        kind, _, rest = str(result["name"]).partition("-")
        label = label_of(f"{kind}/{rest}" if kind == "transfer" else str(result["name"]))
        for note in result.get("notes", []):
            labels.setdefault(str(note).rstrip("."), []).append(label)
    return [(", ".join(names), note) for note, names in labels.items()]


def _protocols(facts: Facts) -> list[str]:
    """How the figures were taken, for those there are."""
    measured = {str(r["name"]): r for r in facts.results if r.get("status") == "measured"}
    evaluation = facts.config.evaluation
    lines = []
    if "knn" in measured:
        lines.append(
            f"k-NN: weighted by exp(cosine / {evaluation.knn_temperature:g}), the training images are the bank."
        )
    if "linear" in measured:
        lines.append(
            f"Linear probe: {evaluation.linear.epochs} epochs on features computed once, without the random crops of the "
            "published protocol. The figure is that of the last epoch; the best epoch was chosen on the same held-out "
            "images and flatters."
        )
    for name, result in measured.items():
        if name.startswith("transfer-") and "lambda" in result:
            told = ", ".join(f"{model} {strength:.3g}" for model, strength in result["lambda"].items())
            metric = {"mean_per_class": "mean per class"}.get(result.get("metric", ""), "accuracy")
            counts = result.get("samples", {})
            size = f"{counts['train']:,} images to fit, {counts['val']:,} to measure; " if counts else ""
            lines.append(f"Transfer to {name.removeprefix('transfer-')}: {size}{metric}; lambda {told}.")
    return lines


def _split_names(facts: Facts) -> list[str]:
    return list(facts.manifest.value.splits) if facts.manifest.value else []


def _classes_counted(facts: Facts) -> list[tuple[str, list[int]]]:
    manifest = facts.manifest.value
    if manifest is None or not manifest.classes:
        return []
    counts = [split.per_class or [0] * len(manifest.classes) for split in manifest.splits.values()]
    return [(name, [c[i] for c in counts]) for i, name in enumerate(manifest.classes)]
