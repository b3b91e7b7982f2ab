"""Tables and escaped text in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

_MARKUP = (
    ("\\", "\\\\"),
    ("&", "&amp;"),
    ("<", "&lt;"),
    (">", "&gt;"),
    ("|", "\\|"),
    ("*", "\\*"),
    ("`", "\\`"),
    ("[", "\\["),
)


def escape(text: str) -> str:
    """Escape what Markdown and HTML would take for markup, and join lines."""
    for character, escaped in _MARKUP:
        text = text.replace(character, escaped)
    return " ".join(text.split())


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column is aligned to the left, the others to the right."""
    lines = [[escape(head) for head in heads], ["---", *["---:"] * (len(heads) - 1)]]
    lines += [[escape(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]
