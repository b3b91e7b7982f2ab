"""matplotlib's SVG made fit to stand in a page: the page's colours and font, no global styles, no clashing names.

Charts are drawn in placeholder colours; here each becomes a CSS variable of the report, which is dark on a dark page.
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

# Placeholder colours and the CSS variables that they stand for.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = ("#010111", "#010112", "#010113")
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)},
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp, in the page's font, searchable
    "svg.image_inline": True,
    "text.parse_math": False,  # a class called $x$ is no formula
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.unicode_minus": True,
}
_REFERENCE = re.compile(r"#([\w.-]+)")
_FONT = re.compile(r"font-family:[^;]*;?\s*|(?<=px )'.*?sans-serif")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def settings() -> dict[Any, Any]:
    """matplotlib's settings under which the charts are drawn, for ``matplotlib.rc_context``."""
    return dict(_SETTINGS)


def drawable(text: str) -> str:
    """Text without the characters that no XML may have."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an ``<svg>`` element for the body of a page.

    Args:
        figure: drawn in the placeholder colours of this module.
        name: unique in the page; the element's inner ids begin with it.
        label: what the chart shows, for those who cannot see it.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font draws the text, not matplotlib's
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
    # An HTML parser gives the elements below <svg> their namespace by itself.
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}


def _remove_global_style(root: ET.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("style", "metadata"):
                parent.remove(child)


def _rename_ids(root: ET.Element, name: str) -> None:
    """Keep only the ids that something refers to, and make them unique in the page."""
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
