"""The comparison of several runs: a page, the same in Markdown and JSON, and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from esvit_core import __version__
from esvit_core.evaluation.side_by_side import Comparison, Pair
from esvit_core.evaluation.significance import interval_text, p_text, too_few
from esvit_core.reporting.interval_bar import interval_bar, scale_limit
from esvit_core.reporting.markdown import escape, table
from esvit_core.reporting.result_rows import change, label_of, percent, typeset

TEMPLATE, STYLE = "comparison.html.jinja", "report.css"
_TONES = {"better": "good", "worse": "bad"}
_COLORS = {"better": "green", "worse": "red"}
_WORDS = ("better", "worse", "no difference shown", "not tested")


def comparison_files(comparison: Comparison) -> dict[str, str]:
    """Render the comparison as ``comparison.html``, ``comparison.md`` and ``comparison.json``."""
    return {
        "comparison.html": comparison_html(comparison),
        "comparison.md": comparison_markdown(comparison),
        "comparison.json": json.dumps(comparison.as_json(), indent=1) + "\n",
    }


def comparison_html(comparison: Comparison) -> str:
    """Render one self-contained page without scripts and external resources."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("esvit_core", "reporting"),
        autoescape=True,  # names of runs, classes and files are user input
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tested = [pair.difference for pair in comparison.pairs if pair.difference]
    scale = scale_limit(tested) if tested else 1.0
    environment.filters.update(
        percent=lambda value: typeset(percent(value)),
        label=label_of,
        change=lambda pair: typeset(_change(comparison, pair)),
        interval=lambda difference: typeset(interval_text(difference)),
        bar=lambda difference: interval_bar(difference, scale),
        tone=lambda pair: _TONES.get(pair.decision, "plain"),
        few=lambda pair: _too_few(pair),
    )
    css = Markup((resources.files("esvit_core") / "reporting" / STYLE).read_text(encoding="utf-8"))
    return (
        environment.get_template(TEMPLATE).render(
            css=css,
            version=__version__,
            title=_title(comparison),
            comparison=comparison,
            names=[subject.name for subject in comparison.subjects],
            sentences=[sentence(comparison, *each) for each in comparison.combinations()],
            missing=_missing(comparison),
        )
        + "\n"
    )


def comparison_markdown(comparison: Comparison) -> str:
    """Render the comparison as Markdown."""
    names = [subject.name for subject in comparison.subjects]
    lines = [f"# {escape(_title(comparison))}", ""]
    lines += [f"- {escape(sentence(comparison, *each))}" for each in comparison.combinations()]
    lines += ["", "Figures in percent; differences in percentage points with their 95 % intervals.", ""]
    lines += table(["metric", *names], [_figures(comparison, key) for key in comparison.figures])
    for model, reference in comparison.combinations():
        lines += ["", f"## {escape(model)} compared with {escape(reference)}", ""]
        rows = [
            [label_of(pair.key), _change(comparison, pair), _interval(pair), _p(pair), pair.decision]
            for pair in comparison.between(model, reference)
        ]
        lines += table(["metric", "points", "95 % interval", "p", "verdict"], rows)
        lines += _notes([_note(pair) for pair in comparison.between(model, reference)])
    lines += _notes([f"{escape(what)}: {escape(reason)}" for what, reason in _missing(comparison)])
    return "\n".join(lines) + "\n"


def comparison_tables(comparison: Comparison) -> Group:
    """Build the tables for the terminal: all figures, and the differences from each reference."""
    names = [subject.name for subject in comparison.subjects]
    figures = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    figures.add_column("measure")
    for name in names:
        figures.add_column(Text(name), justify="right")
    for key in comparison.figures:
        figures.add_row(*(Text(cell) for cell in _figures(comparison, key)))
    parts: list[RenderableType] = [figures]
    for model, reference in comparison.combinations():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("measure")
        table.add_column("points", justify="right", no_wrap=True)
        table.add_column("95 % interval", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        pairs = comparison.between(model, reference)
        for pair in pairs:
            color = _COLORS.get(pair.decision, "")
            table.add_row(
                Text(label_of(pair.key)),
                Text(_change(comparison, pair), style=color),
                _interval(pair),
                Text(pair.decision, style=color),
            )
        parts += [Text(f"{model} compared with {reference}", style="bold"), table]
        parts += [Text(note) for note in dict.fromkeys(_note(pair) for pair in pairs) if note]
    parts += [Text(f"{what}: {reason}") for what, reason in _missing(comparison)]
    return Group(*parts)


def sentence(comparison: Comparison, model: str, reference: str) -> str:
    """State on how many data sets one run is better than another."""
    counts = comparison.tally(model, reference)
    total = sum(counts.values())
    if not total:
        return f"{model} and {reference} have no figure in common."
    sets = "data set" if total == 1 else "data sets"
    others = [f"{word} on {counts[word]}" for word in _WORDS[1:] if counts.get(word)]
    better = f"{model} is better than {reference} on {counts.get('better', 0)} of {total} {sets}"
    return "; ".join([better, *others]) + "."


def _title(comparison: Comparison) -> str:
    models = list(dict.fromkeys(model for model, _ in comparison.combinations()))
    return f"{', '.join(models)} compared with {', '.join(comparison.references)}"


def _change(comparison: Comparison, pair: Pair) -> str:
    row = comparison.figures[pair.key]
    return change(row[pair.model], row[pair.reference])


def _figures(comparison: Comparison, key: str) -> list[str]:
    row = comparison.figures[key]
    return [label_of(key), *(percent(row.get(subject.name)) for subject in comparison.subjects)]


def _interval(pair: Pair) -> str:
    return interval_text(pair.difference) if pair.difference else "-"


def _p(pair: Pair) -> str:
    return p_text(pair.difference) if pair.difference else "-"


def _too_few(pair: Pair) -> str:
    return too_few(pair.difference) if pair.difference else pair.reason


def _note(pair: Pair) -> str:
    note = _too_few(pair)
    return f"{label_of(pair.key)}: {note}" if note else ""


def _missing(comparison: Comparison) -> list[tuple[str, str]]:
    return [(f"{name} of {model}", reason) for (model, name), reason in comparison.missing.items()]


def _notes(notes: Sequence[str]) -> list[str]:
    kept = [f"- {note}" for note in dict.fromkeys(notes) if note]
    return ["", *kept] if kept else []
