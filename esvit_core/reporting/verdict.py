"""The verdict of the report: whether pre-training helped, by how much, how certain that is, and the promotion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from esvit_core.reporting.property_rows import start_of
from esvit_core.reporting.result_rows import Row, percent, points, result_rows, typeset
from esvit_core.reporting.run_records import RunRecords

_SAME = 0.05  # percentage points; a smaller difference rounds to 0
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
        tone: ``good``, ``bad`` or ``plain``, from the difference.
        unit: unit of the values.
    """

    label: str
    value: float | None
    baseline: float | None
    note: str
    tone: str
    unit: str = "%"

    @property
    def shown(self) -> str:
        return typeset(percent(self.value))

    @property
    def change(self) -> str:
        return typeset(points(None if self.value is None or self.baseline is None else self.value - self.baseline))


def judge(records: RunRecords) -> Verdict:
    """Judge whether the pre-training of a run helped."""
    rows = [row for row in result_rows(records.results) if row.difference is not None]
    chosen = _decisive(rows, records)
    if chosen is None or chosen.trained is None or chosen.baseline is None or chosen.difference is None:
        return _unmeasured(records)
    before, after = (f"{percent(v)}{NO_BREAK}{chosen.unit}" for v in (chosen.baseline, chosen.trained))
    label = _capital(chosen.label)
    if abs(chosen.difference) < _SAME:
        verdict = Verdict(
            "plain", f"Pre-training made no difference: {chosen.label} is {after}, the same as the baseline."
        )
    elif _may_be_chance(chosen, records):
        moved = "rose" if chosen.difference > 0 else "fell"
        verdict = Verdict("plain", f"{label} {moved} from {before} to {after}, which may be chance.")
    elif chosen.difference > 0:
        change = f"by {points(chosen.difference).lstrip('+')} points"
        verdict = Verdict("good", f"Pre-training helped: {label} rose from {before} to {after}, {change}.")
    else:
        change = f"by {points(chosen.difference).lstrip('-')} points"
        verdict = Verdict("bad", f"Pre-training did not help: {label} fell from {before} to {after}, {change}.")
    return Verdict(verdict.tone, verdict.sentence, [*_tally(rows), *_certainty(chosen, records), *_start(records)])


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
                tone=_tone(row.difference),
                unit=row.unit,
            )
            for row in rows
        ]
    share = (records.images.value or {}).get("figures", {}).get("correspondence")
    if share:
        chance = f"Chance level {percent(share['chance'])} %." if "chance" in share else ""
        tone = _tone(share["trained"] - share["baseline"])
        found.append(Tile("Correspondence", share["trained"], share["baseline"], chance, tone))
    return found


def held_out(records: RunRecords, row: Row) -> int | None:
    """Return the number of labelled images on which a figure was measured; None if it is not known."""
    name = row.key.replace("/", "-", 1) if row.key.startswith("transfer/") else row.key.partition("/")[0]
    result = next((r for r in records.results if r.get("name") == name), {})
    if "samples" in result:
        return int(result["samples"]["val"])
    manifest = records.manifest.value
    if manifest is None or "val" not in manifest.splits or not row.key.startswith(("knn", "linear")):
        return None
    return sum(manifest.splits["val"].per_class) or None


def _decisive(rows: Sequence[Row], records: RunRecords) -> Row | None:
    """Return the figure of ``promotion.metric``, or else the first main figure."""
    wanted = records.config.promotion.metric
    return next((r for r in rows if r.key == wanted), None) or next((r for r in rows if r.headline), None)


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
    return Verdict("plain", "A backbone was trained, but the quality of its features could not be measured.", details)


def _tally(rows: Sequence[Row]) -> list[str]:
    differences = [row.difference for row in rows if row.difference is not None]
    if len(differences) < 2:
        return []
    better = sum(d >= _SAME for d in differences)
    worse = sum(d <= -_SAME for d in differences)
    return [
        f"Better than the baseline in {better} of {len(differences)} figures"
        + (f", worse in {worse}." if worse else ".")
    ]


def _start(records: RunRecords) -> list[str]:
    """State what the baseline is if the initial weights were not drawn from the seed."""
    start = start_of(records.config)
    return [f"The baseline is the network as this run started: {start}."] if start else []


def _certainty(row: Row, records: RunRecords) -> list[str]:
    """State the standard error of a figure, from the number of images."""
    error, count = _standard_error(row, records), held_out(records, row)
    if error is None:
        return []
    sentence = f"Measured on {count:,} held-out images: the standard error of {row.label} is {error:.1f} points"
    return [sentence + ("; a difference as small as this one may be chance." if _may_be_chance(row, records) else ".")]


def _may_be_chance(row: Row, records: RunRecords) -> bool:
    error = _standard_error(row, records)
    return error is not None and row.difference is not None and _SAME <= abs(row.difference) < error


def _standard_error(row: Row, records: RunRecords) -> float | None:
    """Standard error of the trained backbone's accuracy, points; None if the number of images is not known."""
    count = held_out(records, row)
    if not count or row.trained is None or row.unit != "%":
        return None
    share = min(max(row.trained / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / count)


def _tone(difference: float | None) -> str:
    if difference is None or abs(difference) < _SAME:
        return "plain"
    return "good" if difference > 0 else "bad"


def _capital(text: str) -> str:
    """Capitalize the start of a sentence and strip its full stop; keys such as knn/20 are left unchanged."""
    first = text.partition(" ")[0]
    return (text if "/" in first else text[:1].upper() + text[1:]).rstrip(".")
