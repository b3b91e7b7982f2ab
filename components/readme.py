"""Generate the README of every component from its docstring, its signature and its metadata.

    python -m esvit_components.readme

The title, the objects that the step writes, and an example are in the section ``documentation`` of ``metadata.yaml``.
"""

import importlib
from pathlib import Path
from typing import Any

import yaml
from kfp.dsl.base_component import BaseComponent

ROOT = Path(__file__).parent
_TYPES = {"String": "str", "Boolean": "bool", "Integer": "int", "Float": "float", "List": "list", "Dict": "dict"}
_STEPS = "A repeated step finds its own outputs, so KFP's caching is off for every step."
_ARTIFACTS = 'The content of an artifact is a pointer: the data are in the object store at `metadata["uri"]`.'


def component_folders() -> list[Path]:
    """List the folders of all components."""
    return sorted(path.parent for path in ROOT.glob("*/*/component.py"))


def load_component(folder: Path) -> BaseComponent:
    """Import the component in a folder."""
    module = importlib.import_module(f"esvit_components.{folder.parent.name}.{folder.name}")
    component: BaseComponent = getattr(module, folder.name)
    return component


def readme(folder: Path) -> str:
    """Return the text of a component's README."""
    spec = load_component(folder).component_spec
    documentation = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))["documentation"]
    inputs, outputs = spec.inputs or {}, spec.outputs or {}
    sections = [
        f"# {documentation['title']}",
        _paragraphs(spec.description or ""),
        "## Inputs",
        _table(
            ["name", "type", "default", "description"],
            [[f"`{n}`", f"`{_type(i)}`", _default(i), _cell(i.description)] for n, i in inputs.items()],
        ),
        "## Outputs",
        _table(
            ["name", "type", "description"],
            [[f"`{n}`", f"`{_type(o)}`", _cell(o.description)] for n, o in outputs.items()],
        ),
        _ARTIFACTS,
        "## In the object store",
        documentation["objects"].strip(),
        "## Example",
        f"```python\n{documentation['example'].strip()}\n```",
        *([documentation["requirements"].strip()] if "requirements" in documentation else []),
        _STEPS,
    ]
    return "\n\n".join(sections) + "\n"


def write_readmes() -> None:
    """Write the READMEs of all components."""
    for folder in component_folders():
        (folder / "README.md").write_text(readme(folder), encoding="utf-8")


def _type(spec: Any) -> str:
    if spec.type.startswith("system."):
        return "dsl." + spec.type.removeprefix("system.").partition("@")[0]
    return _TYPES.get(spec.type, spec.type)


def _default(spec: Any) -> str:
    return f"`{spec.default!r}`" if spec.optional else ""


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "\\<")


def _paragraphs(text: str) -> str:
    summary, _, rest = text.partition("\n")  # KFP's docstring parser drops the empty line between the two
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (summary, *rest.split("\n\n")) if paragraph)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write_readmes()
