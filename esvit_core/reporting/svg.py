"""Convert matplotlib's SVG for inline use in a page: the page's colours and font, no global styles, unique ids.

Charts are drawn in placeholder colours. Here each becomes a CSS variable of the report, which has a light and a dark theme.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Placeholder colours and their CSS variables.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = ("#010111", "#010112", "#010113")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)},
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text: small, sharp, searchable, in the page's font
    "svg.image_inline": True,
    "text.parse_math": False,  # a class named $x$ is not a formula
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.unicode_minus": True,
}
_REFERENCE = re.compile(r"#([\w.-]+)")
_FONT = re.compile(r"font-family:[^;]*;?\s*|(?<=px )'.*?sans-serif")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def settings() -> dict[Any, Any]:
    """Return the matplotlib settings for drawing charts, for ``matplotlib.rc_context``."""
    return dict(_SETTINGS)


def drawable(text: str) -> str:
    """Replace the characters that are not allowed in XML."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the figure as an ``<svg>`` element for the body of a page.

    Args:
        figure: figure in the placeholder colours of this module.
        name: prefix of the element's ids, unique on the page.
        label: text alternative of the chart.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font is used, not matplotlib's
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ET.fromstring(buffer.getvalue())
    _strip_namespaces(root)
    _remove_global_style(root)
    _rename_ids(root, name)
    for element in root.iter():
        if style := element.get("style"):
            element.set("style", _themed(style))
        elif element.tag == "text":
            element.set("style", "fill: var(--ink)")
    view_box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view_box, "role": "img", "aria-label": drawable(label), "class": "chart"})
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=True))


def _themed(style: str) -> str:
    style = _FONT.sub("", style)
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style


def _strip_namespaces(root: ET.Element) -> None:
    # An HTML parser adds the namespace to the elements below <svg>.
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}


def _remove_global_style(root: ET.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("style", "metadata"):
                parent.remove(child)


def _rename_ids(root: ET.Element, name: str) -> None:
    """Keep only the ids that are referenced, and make them unique on the page."""
    links = [(e, key) for e in root.iter() for key in ("href", "clip-path", "style", "fill") if "#" in e.get(key, "")]
    used = {
        match
        for e, key in links
        if not e.get(key, "").startswith("data:")
        for match in _REFERENCE.findall(e.get(key, ""))
    }
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
    present = {e.get("id", "").removeprefix(f"{name}-") for e in root.iter() if e.get("id")}
    for element, key in links:
        value = element.get(key, "")
        if not value.startswith("data:"):
            element.set(key, _REFERENCE.sub(lambda m: f"#{name}-{m[1]}" if m[1] in present else m[0], value))
