"""The verdict of the report: whether pre-training helped, by how much, how certain that is, and the promotion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esvit_core.config import Config
from esvit_core.evaluation.significance import Difference, interval_text, p_text, too_few
from esvit_core.reporting.property_rows import start_of
from esvit_core.reporting.result_rows import (
    MINUS,
    Row,
    change,
    decisive_row,
    percent,
    result_rows,
    set_rows,
    typeset,
)
from esvit_core.reporting.run_records import RunRecords

NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Verdict:
    """An outcome in words.

    Attributes:
        tone: ``good``, ``bad`` or ``plain``.
        sentence: the outcome.
        details: further sentences.
    """

    tone: str
    sentence: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """A tile with a main figure.

    Attributes:
        label: name of the figure.
        value, baseline: percent, of the trained backbone and of the baseline; None where not measured.
        note: text below the figure.
        tone: ``good``, ``bad`` or ``plain``, from the decision.
        unit: unit of the values.
        decision: ``better``, ``worse``, ``no difference shown`` or ``not tested``.
        comparison: interval and test of the difference; None if there are none.
    """

    label: str
    value: float | None
    baseline: float | None
    note: str
    tone: str
    unit: str = "%"
    decision: str = ""
    comparison: Difference | None = None

    @property
    def shown(self) -> str:
        return typeset(percent(self.value))

    @property
    def change(self) -> str:
        return typeset(change(self.value, self.baseline))


def judge(records: RunRecords) -> Verdict:
    """Judge whether the pre-training of a run helped, or whether the backbone that it evaluates beats its baseline."""
    found = judge_results(records.results, records.config, records.existing is not None)
    return found or _of_features(records) or _unmeasured(records)


def judge_results(results: Sequence[Mapping[str, Any]], config: Config, existing: bool = False) -> Verdict | None:
    """Judge by the figure of ``promotion.metric``, or else the first main figure; None if nothing was measured.

    Args:
        results: results of the run.
        config: configuration of the run.
        existing: the run evaluates an existing backbone instead of training one.
    """
    rows, metric = result_rows(results), config.promotion.metric
    row = decisive_row(rows, metric)
    if row is None:
        return None
    sentence = _sentence_of_existing(row) if existing else _sentence_of_training(row)
    return Verdict(row.tone, sentence, [*_certainty(row), *_tally(rows, metric), *_start(config)])


def _of_features(records: RunRecords) -> Verdict | None:
    """State the main figure of a file of features, which has no baseline; None for other runs and without figures."""
    rows = [row for row in result_rows(records.results) if row.trained is not None]
    metric = records.config.promotion.metric
    row = next((row for row in rows if row.key == metric), None) or next((row for row in rows if row.headline), None)
    if not records.of_features or row is None:
        return None
    details = (
        "A file of features has no baseline of initial weights; compare it with a backbone: esvit evaluate --baseline."
    )
    return Verdict("plain", f"{_capital(row.label)} is {_with_unit(row.trained, row)}.", [details])


def _sentence_of_training(row: Row) -> str:
    before, after = _with_unit(row.baseline, row), _with_unit(row.trained, row)
    label, size = _capital(row.label), row.change.lstrip("+-")
    moved = "fell" if row.change.startswith("-") else "rose"
    course = f"{label} {moved} from {before} to {after}"
    if row.decision == "better":
        return f"Pre-training helped: {label} rose from {before} to {after}, by {size} points."
    if row.decision == "worse":
        return f"Pre-training did not help: {label} fell from {before} to {after}, by {size} points."
    if row.change == "0.0":
        return f"No difference shown: {row.label} is {after}, the same as for the baseline."
    if row.comparison:
        return f"No difference shown: {course}, which may be chance."
    return f"{course}; whether this is chance was not tested."


def _sentence_of_existing(row: Row) -> str:
    figure = f"{_capital(row.label)} is {_with_unit(row.trained, row)}"
    against, size = f"the same network with random weights ({_with_unit(row.baseline, row)})", row.change.lstrip("+-")
    if row.decision in ("better", "worse"):
        side = "above" if row.decision == "better" else "below"
        return f"The backbone is {row.decision} than its baseline: {figure}, {size} points {side} {against}."
    if row.change == "0.0":
        return f"No difference shown: {figure}, the same as {against}."
    side = "below" if row.change.startswith("-") else "above"
    if row.comparison:
        return f"No difference shown: {figure}, {size} points {side} {against}, which may be chance."
    return f"{figure}, {size} points {side} {against}; whether this is chance was not tested."


def _with_unit(value: float | None, row: Row) -> str:
    return f"{percent(value)}{NO_BREAK}{row.unit}"


def promotion(records: RunRecords) -> Verdict:
    """Describe whether the backbone becomes the champion, and why."""
    decision = records.promotion.value
    name = records.config.promotion.pointer
    if decision is None:
        return Verdict("plain", "No promotion.", [_capital(records.promotion.reason) + "."])
    reason = _capital(str(decision.get("reason", ""))) + "."
    promoted = bool(decision.get("promoted"))
    if decision.get("decided"):
        sentence = f"Promoted: this is the current {name}." if promoted else "Not promoted."
        return Verdict("good" if promoted else "plain", sentence, [reason])
    # The promote step runs after this report, so that a person can read it first.
    sentence = f"Candidate for promotion to {name}." if promoted else "No candidate for promotion."
    return Verdict(
        "good" if promoted else "plain",
        sentence,
        [reason, "This was the state when the report was written; the promote step, which follows, decides."],
    )


def tiles(records: RunRecords) -> list[Tile]:
    """Build the tiles: the main figure of each evaluation, and correspondence."""
    rows = [row for row in result_rows(records.results) if row.headline]
    found = []
    if any(row.trained is not None for row in rows):  # otherwise the verdict has the reasons already
        found = [
            Tile(
                label=_capital(row.label),
                value=row.trained,
                baseline=row.baseline,
                note=f"{_capital(row.reason)}." if row.reason else "",
                tone=row.tone,
                unit=row.unit,
                decision=row.decision if row.difference is not None else "",
                comparison=row.comparison,
            )
            for row in rows
        ]
    share = (records.images.value or {}).get("figures", {}).get("correspondence")
    if share:
        chance = f"Chance level {percent(share['chance'])} %." if "chance" in share else ""
        tile = Tile("Correspondence", share["trained"], share["baseline"], chance, "plain", decision="not tested")
        found.append(tile)
    return found


def plain_text(text: str) -> str:
    """Replace the typographic characters of a sentence by those of a terminal."""
    return text.replace(NO_BREAK, " ").replace(MINUS, "-")


def _unmeasured(records: RunRecords) -> Verdict:
    if records.training.value is None and records.backbone.value is None:
        return Verdict("plain", "This run is not finished.", [_capital(records.training.reason) + "."])
    reasons = list(dict.fromkeys(row.reason for row in result_rows(records.results) if row.reason))
    details = [_capital(reason) + "." for reason in reasons]
    share = (records.images.value or {}).get("figures", {}).get("correspondence")
    if share:
        details.append(
            f"A measure without labels: {percent(share['trained'])} % of the regions find their true match in another crop; "
            f"{percent(share['baseline'])} % do for the baseline."
        )
    trained = (
        "The backbone could not be evaluated."
        if records.existing
        else "A backbone was trained, but the quality of its features could not be measured."
    )
    return Verdict("plain", trained, details)


def _certainty(row: Row) -> list[str]:
    """State the interval and the test of a difference, and how many images would show one that was not shown."""
    found = row.comparison
    if found is None:
        return ["There is no interval of the difference: the outcomes of the single images were not kept."]
    between = typeset(interval_text(found))
    sentence = (
        f"The 95 % interval of the difference is {between} points, measured on {found.images:,} held-out images "
        f"({p_text(found)})."
    )
    return [sentence] + ([f"{few}."] if (few := too_few(found)) else [])


def _tally(rows: Sequence[Row], metric: str) -> list[str]:
    """Count the data sets, each once."""
    decisions = [row.decision for row in set_rows(rows, metric)]
    if len(decisions) < 2:
        return []
    sentence = f"Better than the baseline on {decisions.count('better')} of {len(decisions)} data sets"
    others = [(word, decisions.count(word)) for word in ("worse", "no difference shown", "not tested")]
    return ["; ".join([sentence, *(f"{word} on {count}" for word, count in others if count)]) + "."]


def _start(config: Config) -> list[str]:
    """State what the baseline is if the initial weights were not drawn from the seed."""
    start = start_of(config)
    return [f"The baseline is the network as this run started: {start}."] if start else []


def _capital(text: str) -> str:
    """Capitalize the start of a sentence and strip its full stop; keys such as knn/20 are left unchanged."""
    first = text.partition(" ")[0]
    return (text if "/" in first else text[:1].upper() + text[1:]).rstrip(".")
