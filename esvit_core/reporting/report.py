"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from esvit_core import __version__
from esvit_core.config import Config
from esvit_core.data.ingest.file_kinds import describe_ignored
from esvit_core.evaluation.significance import interval_text
from esvit_core.reporting import property_rows, verdict
from esvit_core.reporting.choice_charts import choice_charts
from esvit_core.reporting.classes import class_table
from esvit_core.reporting.interval_bar import interval_bar, scale_limit
from esvit_core.reporting.page_images import PageImages, read_page_images
from esvit_core.reporting.report_text import model_card, report_json, report_markdown
from esvit_core.reporting.result_rows import Row, label_of, percent, result_rows, set_rows, typeset
from esvit_core.reporting.run_records import RunRecords, read_run_records
from esvit_core.reporting.samples import Sample
from esvit_core.reporting.training_charts import collapse_warnings, in_groups, training_charts
from esvit_core.runs.events import record_event
from esvit_core.runs.run import REPORT
from esvit_core.storage import ObjectStore, join_uri

MARKDOWN, JSON = "report/report.md", "report/report.json"
MODEL_CARD = "report/model-card.md"
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
_METRICS = {"mean_per_class": "mean per class", "map_11_point": "11-point mAP", "roc_auc": "area under the ROC curve"}
_NAMES_SHOWN = 5
# Dashes of the legend: those of charts.py, in the units of the legend.
_LEGEND_DASHES = ("none", "8 3", "2 2.5")


@dataclass(frozen=True)
class BadGroup:
    """Files that could not be used for the same reason: their number, and the first names."""

    reason: str
    count: int
    names: list[str]


def write_report(run_uri: str, store: ObjectStore, config: Config) -> str:
    """Write the report of a run from its records in the store, and the verdict into its event log.

    The report is ``report/report.html``, and the same in short as ``report.md`` and ``report.json``; ``model-card.md``
    beside it describes the backbone, if there is one. Any record may be missing; the report then states what is missing and why. An
    existing report is replaced.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        store: object store of the run.
        config: configuration of the run.

    Returns:
        The HTML: one file without scripts and external resources, with a light and a dark theme.

    Raises:
        StoreUnavailable, StoreRefused: the store cannot be read or written.
    """
    records = read_run_records(run_uri, store, config)
    html = render(records, read_page_images(records, store))
    for name, (text, content_type) in {
        MARKDOWN: (report_markdown(records), "text/markdown; charset=utf-8"),
        JSON: (report_json(records), "application/json"),
        **({} if records.of_features else {MODEL_CARD: (model_card(records), "text/markdown; charset=utf-8")}),
        REPORT: (html, "text/html; charset=utf-8"),  # last: it makes the report complete
    }.items():
        store.put_bytes(join_uri(run_uri, name), text.encode(), content_type=content_type)
    _record_verdict(records, store)
    return html


def render(records: RunRecords, images: PageImages) -> str:
    """Render the page."""
    rows = result_rows(records.results)
    measured = [row for row in rows if row.trained is not None]
    unmeasured = [row for row in rows if row.trained is None]
    training, log = records.training.value, records.log.value or []
    resumes = training.resumes if training else []
    bad = _bad_groups(records)
    classes = class_table(records.results)
    left_out = (
        [(row.label, row.reason) for row in unmeasured] + images.missing + _left_out(records, images.samples, bad)
    )
    crops = records.config.augment
    html = (
        _environment(_scale(rows))
        .get_template(TEMPLATE)
        .render(
            records=records,
            run_id=records.run_id,
            kind="evaluation" if records.existing else "pre-training",
            recipe=records.config.recipe,
            version=__version__,
            css=_style(),
            verdict=verdict.judge(records),
            promotion=verdict.promotion(records),
            tiles=verdict.tiles(records),
            measured=measured,
            unmeasured=unmeasured,
            scale=_scale(rows),
            any_top5=any(row.top5 is not None for row in rows),
            protocols=_protocols(records),
            choices=choice_charts(records.results),
            classes=classes,
            class_limit=_CLASSES_SHOWN,
            images=images,
            drawings_missing=[f"{what}: {reason}" for what, reason in images.missing],
            data_rows=property_rows.data_rows(records),
            classes_counted=_classes_counted(records),
            splits=_split_names(records),
            crop_sizes=(crops.global_crops.size, max((kind.size for kind in crops.local_kinds), default=0)),
            bad=bad,
            training_rows=property_rows.training_rows(training, log) if training else [],
            warnings=collapse_warnings(log),
            chart_groups=in_groups(training_charts(log, records.config, resumes)),
            dashes=_LEGEND_DASHES,
            resumes=resumes,
            recipe_rows=property_rows.recipe_rows(records),
            configuration=records.config.to_yaml(),
            left_out=left_out,
            usage="" if records.of_features else usage(records),
            lineage_rows=property_rows.lineage_rows(records),
            citation=CITATION,
        )
    )
    return html + "\n"


def _record_verdict(records: RunRecords, store: ObjectStore) -> None:
    found = verdict.judge_results(records.results, records.config, records.existing is not None)
    if found is None:
        return
    rows = set_rows(result_rows(records.results), records.config.promotion.metric)
    differences = {row.key: row.comparison.as_json() for row in rows if row.comparison}
    reason = verdict.plain_text(" ".join([found.sentence, *found.details]))
    record_event(
        store, records.run_uri, "evaluated", component="report", reason=reason, facts={"differences": differences}
    )


def usage(records: RunRecords) -> str:
    """Return three lines of Python that load and use the backbone."""
    backbone = records.backbone.value or {}
    size, width = records.config.evaluation.crop, backbone.get("num_features", "D")
    return (
        "import esvit_core, torch\n"
        f'backbone = esvit_core.load_backbone("{join_uri(records.run_uri, "backbone")}")\n'
        f"features = backbone(torch.rand(8, 3, {size}, {size}))  # (8, {width})"
    )


def _scale(rows: Sequence[Row]) -> float | None:
    """Return the limit of the scale of the table's intervals; None if there are none."""
    compared = [row.comparison for row in rows if row.comparison]
    return scale_limit(compared) if compared else None


def _environment(scale: float | None) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("esvit_core", "reporting"),
        autoescape=True,  # names of files and classes are user input
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda value: typeset(percent(value)),
        typeset=typeset,
        unbroken=_unbroken,
        plain=lambda value: typeset(f"{value:g}"),
        interval=lambda comparison: typeset(interval_text(comparison)),
        bar=lambda comparison: interval_bar(comparison, scale or 1.0),
        width=lambda value: f"{min(max(value, 0.0), 100.0):.1f}",
    )
    return environment


def _unbroken(sentence: str) -> Markup:
    """Keep the names of figures, such as 20-NN, on one line."""
    return Markup(re.sub(r"\d+-NN", r'<span class="unbroken">\g<0></span>', str(escape(sentence))))


def _style() -> str:
    return Markup((resources.files("esvit_core") / "reporting" / STYLE).read_text(encoding="utf-8"))


def _bad_groups(records: RunRecords) -> list[BadGroup]:
    """Group bad files by reason, the most frequent reason first."""
    counts: Counter[str] = Counter(records.manifest.value.bad.reasons if records.manifest.value else {})
    groups = []
    for reason, count in counts.most_common():
        names = [bad.name + bad.reason.removeprefix(reason) for bad in records.bad_files if _is_of(bad.reason, reason)]
        groups.append(BadGroup(reason, count, names[:_NAMES_SHOWN]))
    return groups


def _is_of(reason: str, kind: str) -> bool:
    """Whether a file's reason is of a kind that the manifest counts; it may have details appended."""
    return reason == kind or reason.startswith((f"{kind} (", f"{kind} of "))


def _left_out(records: RunRecords, samples: list[Sample] | str, bad: list[BadGroup]) -> list[tuple[str, str]]:
    pieces: list[tuple[str, Any]] = [
        ("data", records.manifest),
        ("training", records.training),
        ("training log", records.log),
        ("backbone", records.backbone),
    ]
    found = [(what, piece.reason) for what, piece in pieces if piece.value is None]
    if isinstance(samples, str) and records.manifest.value is not None:
        found.append(("images and their crops", samples))
    if bad:
        reasons = "; ".join(f"{group.reason} ({group.count:,})" for group in bad)
        found.append((f"{sum(group.count for group in bad):,} files of the source", reasons))
    manifest = records.manifest.value
    if manifest is not None and manifest.not_chosen:
        found.append((f"{manifest.not_chosen:,} images", f"data.max_images is {records.config.data.max_images:,}"))
    if manifest is not None and manifest.ignored:
        kinds = describe_ignored(manifest.ignored_kinds)
        found.append((f"{manifest.ignored:,} files", f"not images: {kinds}" if kinds else "not images"))
    return found + _remarks(records)


def _remarks(records: RunRecords) -> list[tuple[str, str]]:
    """Collect the remarks of the evaluations: each once, with the evaluations that make it."""
    labels: dict[str, list[str]] = {}
    for result in records.results:
        kind, _, rest = str(result["name"]).partition("-")
        label = label_of(f"{kind}/{rest}" if kind == "transfer" else str(result["name"]))
        for remark in result.get("notes", []):
            labels.setdefault(str(remark).rstrip("."), []).append(label)
    return [(", ".join(names), remark) for remark, names in labels.items()]


def _protocols(records: RunRecords) -> list[str]:
    """Describe the protocols of the figures that were measured."""
    measured = {str(r["name"]): r for r in records.results if r.get("status") == "measured"}
    evaluation = records.config.evaluation
    lines = []
    if "knn" in measured:
        lines.append(
            f"k-NN: votes weighted by exp(cosine / {evaluation.knn_temperature:g}); the training images are the bank."
        )
    if "linear" in measured:
        lines.append(_linear_protocol(measured["linear"], evaluation.linear.epochs))
    for name, result in measured.items():
        if name.startswith("transfer-") and "lambda" in result:
            strengths = ", ".join(f"{model} {strength:.3g}" for model, strength in result["lambda"].items())
            metric = _METRICS.get(result.get("metric", ""), "accuracy")
            counts = result.get("samples", {})
            size = f"{counts['train']:,} images to fit, {counts['val']:,} to measure; " if counts else ""
            lines.append(
                f"Transfer to {name.removeprefix('transfer-')}: {size}{metric}; lambda {strengths}, "
                "chosen by validation on the images to fit."
            )
    return lines


def _linear_protocol(result: dict[str, Any], epochs: int) -> str:
    if result.get("protocol") == "published":
        return (
            f"Linear probe: the published protocol, {epochs} epochs with a new random crop and flip of every image in each. "
            "The figure is that of the last epoch; the best epoch was selected on the same held-out images and is "
            "optimistic."
        )
    if chosen := result.get("chosen"):
        choices = "; ".join(f"{model}: {each['feature']}, {each['lr']:g}" for model, each in chosen.items())
        return (
            f"Linear probe: {epochs} epochs on features computed once. Feature and learning rate were chosen on validation "
            f"images of the training set ({choices})."
        )
    return f"Linear probe: {epochs} epochs on features computed once."


def _split_names(records: RunRecords) -> list[str]:
    return list(records.manifest.value.splits) if records.manifest.value else []


def _classes_counted(records: RunRecords) -> list[tuple[str, list[int]]]:
    manifest = records.manifest.value
    if manifest is None or not manifest.classes:
        return []
    counts = [split.per_class or [0] * len(manifest.classes) for split in manifest.splits.values()]
    return [(name, [c[i] for c in counts]) for i, name in enumerate(manifest.classes)]
