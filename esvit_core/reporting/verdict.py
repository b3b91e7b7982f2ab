"""What came out, in words: did pre-training help, by how much, how sure is that, and what happens to the backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from esvit_core.reporting.facts import Facts
from esvit_core.reporting.result_table import Row, percent, points, summarise, typeset
from esvit_core.reporting.words import start_of

_SAME = 0.05  # percentage points: what rounds to nothing
NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Verdict:
    """The first lines of the report.

    Attributes:
        tone: ``good``, ``bad`` or ``plain``.
        sentence: the outcome.
        details: what to know beside it.
    """

    tone: str
    sentence: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """A big number.

    Attributes:
        label: what it is.
        value, baseline: percent, of the trained backbone and the baseline; None where not measured.
        note: below it.
        tone: of the difference.
        unit: of the numbers.
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


def judge(facts: Facts) -> Verdict:
    """The verdict on a run."""
    rows = [row for row in summarise(facts.results) if row.difference is not None]
    chosen = _decisive(rows, facts)
    if chosen is None or chosen.trained is None or chosen.baseline is None or chosen.difference is None:
        return _unmeasured(facts)
    before, after = (f"{percent(v)}{NO_BREAK}{chosen.unit}" for v in (chosen.baseline, chosen.trained))
    label = _capital(chosen.label)
    if abs(chosen.difference) < _SAME:
        verdict = Verdict("plain", f"Pre-training made no difference: {chosen.label} is {after}, like the baseline.")
    elif _may_be_chance(chosen, facts):
        moved = "rose" if chosen.difference > 0 else "fell"
        verdict = Verdict("plain", f"{label} {moved} from {before} (baseline) to {after}, which may be chance.")
    elif chosen.difference > 0:
        change = f"by {points(chosen.difference).lstrip('+')} points"
        verdict = Verdict("good", f"Pre-training helped: {label} rose from {before} to {after}, {change}.")
    else:
        change = f"by {points(chosen.difference).lstrip('-')} points"
        verdict = Verdict("bad", f"Pre-training did not help: {label} fell from {before} to {after}, {change}.")
    return Verdict(verdict.tone, verdict.sentence, [*_tally(rows), *_certainty(chosen, facts), *_start(facts)])


def promotion(facts: Facts) -> Verdict:
    """Whether the backbone becomes the champion, and why."""
    decision = facts.promotion.value
    name = facts.config.promotion.pointer
    if decision is None:
        return Verdict("plain", "No promotion.", [_capital(facts.promotion.reason) + "."])
    reason = _capital(str(decision.get("reason", ""))) + "."
    promoted = bool(decision.get("promoted"))
    if decision.get("decided"):
        sentence = f"Promoted: it is the {name} now." if promoted else "Not promoted."
        return Verdict("good" if promoted else "plain", sentence, [reason])
    # The promote step waits for this report, so that a person can read it first.
    sentence = f"Up for promotion to {name}." if promoted else "Not up for promotion."
    return Verdict(
        "good" if promoted else "plain",
        sentence,
        [reason, "As things stood when this report was written; the promote step, which follows it, decides."],
    )


def tiles(facts: Facts) -> list[Tile]:
    """The big numbers: the headline of each evaluation, and correspondence."""
    rows = [row for row in summarise(facts.results) if row.headline]
    found = []
    if any(row.trained is not None for row in rows):  # without, the verdict has the reasons already
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
    share = (facts.images.value or {}).get("figures", {}).get("correspondence")
    if share:
        chance = f"By chance {percent(share['chance'])} %." if "chance" in share else ""
        tone = _tone(share["trained"] - share["baseline"])
        found.append(Tile("Correspondence", share["trained"], share["baseline"], chance, tone))
    return found


def held_out(facts: Facts, row: Row) -> int | None:
    """Number of labelled images that a figure was measured on; None where it is not known."""
    name = row.key.replace("/", "-", 1) if row.key.startswith("transfer/") else row.key.partition("/")[0]
    result = next((r for r in facts.results if r.get("name") == name), {})
    if "samples" in result:
        return int(result["samples"]["val"])
    manifest = facts.manifest.value
    if manifest is None or "val" not in manifest.splits or not row.key.startswith(("knn", "linear")):
        return None
    return sum(manifest.splits["val"].per_class) or None


def _decisive(rows: Sequence[Row], facts: Facts) -> Row | None:
    """The figure that promotion looks at, or else the first headline."""
    wanted = facts.config.promotion.metric
    return next((r for r in rows if r.key == wanted), None) or next((r for r in rows if r.headline), None)


def _unmeasured(facts: Facts) -> Verdict:
    if facts.training.value is None and facts.backbone.value is None:
        return Verdict("plain", "This run is not finished.", [_capital(facts.training.reason) + "."])
    reasons = list(dict.fromkeys(row.reason for row in summarise(facts.results) if row.reason))
    details = [_capital(reason) + "." for reason in reasons]
    share = (facts.images.value or {}).get("figures", {}).get("correspondence")
    if share:
        details.append(
            f"What needs no labels: {percent(share['trained'])} % of the regions find their true match in another crop, "
            f"{percent(share['baseline'])} % with the baseline."
        )
    return Verdict("plain", "A backbone was trained; how good its features are could not be measured.", details)


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


def _start(facts: Facts) -> list[str]:
    """What "baseline" means in a run that did not start from drawn weights."""
    start = start_of(facts.config)
    return [f"The baseline is the network as this run started: {start}."] if start else []


def _certainty(row: Row, facts: Facts) -> list[str]:
    """How far a figure on so many images can be off (standard error of a share)."""
    error, count = _standard_error(row, facts), held_out(facts, row)
    if error is None:
        return []
    told = f"Measured on {count:,} held-out images: the standard error of {row.label} is {error:.1f} points"
    return [told + ("; a difference as small as this one can be chance." if _may_be_chance(row, facts) else ".")]


def _may_be_chance(row: Row, facts: Facts) -> bool:
    error = _standard_error(row, facts)
    return error is not None and row.difference is not None and _SAME <= abs(row.difference) < error


def _standard_error(row: Row, facts: Facts) -> float | None:
    """Of the trained backbone's share of right answers, points; None where the images were not counted."""
    count = held_out(facts, row)
    if not count or row.trained is None or row.unit != "%":
        return None
    share = min(max(row.trained / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / count)


def _tone(difference: float | None) -> str:
    if difference is None or abs(difference) < _SAME:
        return "plain"
    return "good" if difference > 0 else "bad"


def _capital(text: str) -> str:
    """As the beginning of a sentence, its full stop left to the caller; keys such as knn/20 stay as they are."""
    first = text.partition(" ")[0]
    return (text if "/" in first else text[:1].upper() + text[1:]).rstrip(".")
