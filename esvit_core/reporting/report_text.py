"""The report as Markdown and as JSON, and the model card in the format of the Hugging Face Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import yaml

from esvit_core import __version__
from esvit_core.evaluation.significance import interval_text, p_text
from esvit_core.reporting import property_rows, verdict
from esvit_core.reporting.markdown import escape, table
from esvit_core.reporting.result_rows import Row, percent, result_rows
from esvit_core.reporting.run_records import RunRecords
from esvit_core.storage import join_uri

_TASK = {"type": "image-classification", "name": "Image classification on frozen features"}
_LIMITS = (
    "The figures hold for images like the held-out ones; measure the backbone on images of your own domain before you use it.",
    "The backbone was trained without labels, so it has no classes: train a classifier or a head on its features.",
    "It reproduces the biases of its training images. No test of fairness or of robustness was made.",
)


def report_json(records: RunRecords) -> str:
    """Return the figures, verdict, promotion, omissions and lineage of a run as JSON."""
    found, promoted = verdict.judge(records), verdict.promotion(records)
    values = {
        "run": records.run_uri,
        "recipe": records.config.recipe,
        "verdict": {"sentence": verdict.plain_text(found.sentence), "details": _plain(found.details)},
        "promotion": {"sentence": verdict.plain_text(promoted.sentence), "details": _plain(promoted.details)},
        "results": [_row(row) for row in result_rows(records.results)],
        "lineage": {property.name: property.value for property in property_rows.lineage_rows(records)},
        "version": __version__,
    }
    return json.dumps(values, indent=1) + "\n"


def report_markdown(records: RunRecords) -> str:
    """Return the verdict, the figures and the lineage of a run as Markdown."""
    found, promoted = verdict.judge(records), verdict.promotion(records)
    lines = [f"# {escape(verdict.plain_text(found.sentence))}", ""]
    lines += [f"- {escape(detail)}" for detail in _plain(found.details)]
    lines += [
        "",
        f"**{escape(verdict.plain_text(promoted.sentence))}** {escape(' '.join(_plain(promoted.details)))}",
        "",
    ]
    lines += ["## Results", "", *_results(records), "", "## Data and training", ""]
    training, log = records.training.value, records.log.value or []
    properties = [*property_rows.data_rows(records), *(property_rows.training_rows(training, log) if training else [])]
    lines += [f"- {escape(line)}" for line in (records.manifest.value.reading if records.manifest.value else [])]
    lines += [f"- {escape(property.name)}: {escape(property.value)}" for property in properties]
    lines += ["", "## Lineage", ""]
    lines += [f"- {escape(p.name)}: {escape(p.value)}" for p in property_rows.lineage_rows(records)]
    return "\n".join(lines) + "\n"


def model_card(records: RunRecords) -> str:
    """Return the card of the run's backbone: a header in YAML with the metrics, and its description in Markdown."""
    config, backbone = records.config, records.backbone.value or {}
    name = records.run_id
    header: dict[str, Any] = {
        "library_name": "esvit",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised", "esvit", "vision", config.model.arch],
    }
    if entries := _model_index(records):
        header["model-index"] = [{"name": name, "results": entries}]
    found = verdict.judge(records)
    origin = (
        f"It is an existing backbone, {records.existing}, which was evaluated and not trained."
        if records.existing
        else f"It was trained without labels by EsViT, with the recipe {config.recipe}."
    )
    start = property_rows.start_of(config)
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {escape(name)}",
        "",
        f"A vision backbone, {escape(config.model.arch)}, with {backbone.get('parameters', 0):,} parameters and features of "
        f"{backbone.get('num_features', '?')} values. {escape(origin)}",
        *([f"It started from {escape(start)}."] if start else []),
        "",
        "## Intended use",
        "",
        "Feature extraction: k-NN, retrieval, linear classifiers, and the start of a training on labeled images. It is not a "
        "classifier and gives no answers by itself.",
        "",
        "```python",
        "import esvit_core",
        "",
        'backbone = esvit_core.load_backbone(".")  # this folder',
        "features = backbone(images)  # (B, 3, S, S) -> (B, D); backbone.backbone_config has size, mean and std",
        "```",
        "",
        "## Evaluation",
        "",
        escape(verdict.plain_text(" ".join([found.sentence, *found.details]))),
        "",
        *_results(records),
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in _LIMITS),
        "",
        "## Lineage",
        "",
        *(f"- {escape(p.name)}: {escape(p.value)}" for p in property_rows.lineage_rows(records)),
        f"- report: {escape(join_uri(records.run_uri, 'report/report.html'))}",
    ]
    return "\n".join(lines) + "\n"


def _model_index(records: RunRecords) -> list[dict[str, Any]]:
    """Return the figures in the format of ``model-index``, with the interval of the difference from the baseline."""
    source = records.manifest.value.source if records.manifest.value else "unknown"
    entries = []
    for row in result_rows(records.results):
        if row.trained is None or not math.isfinite(row.trained):
            continue
        own = not row.key.startswith("transfer/")
        name = source.rstrip("/").rpartition("/")[2] if own else row.key.partition("/")[2]
        metric: dict[str, Any] = {"type": "accuracy", "name": row.label, "value": row.trained}
        entries.append({"task": dict(_TASK), "dataset": {"type": "custom", "name": name}, "metrics": [metric]})
    return entries


def _results(records: RunRecords) -> list[str]:
    rows = result_rows(records.results)
    cells = [
        [
            row.label,
            percent(row.trained),
            percent(row.baseline),
            row.change,
            interval_text(row.comparison) if row.comparison else "-",
            p_text(row.comparison) if row.comparison else "-",
            row.decision if row.difference is not None else "-",
        ]
        for row in rows
        if row.trained is not None
    ]
    lines = (
        table(["metric, %", "trained", "baseline", "points", "95 % interval", "p", "verdict"], cells) if cells else []
    )
    unmeasured = [
        f"- {escape(row.label)} was not measured: {escape(row.reason)}." for row in rows if row.trained is None
    ]
    return [*lines, *(["", *unmeasured] if unmeasured else [])]


def _row(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"figure": row.key, "name": row.label, "unit": row.unit}
    if row.trained is None:
        return values | {"reason": row.reason}
    values |= {"trained": row.trained, "baseline": row.baseline, "headline": row.headline}
    if row.difference is not None:
        values["decision"] = row.decision
    return values | ({"difference": row.comparison.as_json()} if row.comparison else {})


def _plain(sentences: Sequence[str]) -> list[str]:
    return [verdict.plain_text(sentence) for sentence in sentences]
