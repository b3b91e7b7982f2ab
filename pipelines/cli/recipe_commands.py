"""`esvit recipe list` and `esvit recipe show`: the recipes that ship with the library."""

from __future__ import annotations

import yaml
from pydantic import BaseModel

from esvit_core.config import Config
from esvit_core.config.auto import AUTO
from esvit_core.config.recipes import domain_names, domain_text, preset_names, preset_text

_COMMENT_COLUMN = 44


def recipe_list() -> str:
    """Return one line per recipe: its name and the first line of its file."""
    texts = {name: preset_text(name) for name in preset_names()} | {name: domain_text(name) for name in domain_names()}
    first_lines = {
        AUTO: "The default of `esvit run`: network, crops, epochs and the rest are chosen from images and machine."
    }
    first_lines |= {name: text.splitlines()[0].removeprefix("#").strip() for name, text in texts.items()}
    width = max(map(len, first_lines))
    return "\n".join(f"{name:{width}}  {line}" for name, line in first_lines.items())


def recipe_text(config: Config) -> str:
    """Return the configuration as valid YAML with a comment on each setting."""
    return "\n".join(_section(config, 0)) + "\n"


def _section(section: BaseModel, depth: int) -> list[str]:
    lines = []
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            title = (type(value).__doc__ or "").splitlines()[0]
            lines += [] if depth else [""]
            lines += [_commented(f"{indent}{name}:", title), *_section(value, depth + 1)]
            continue
        text = section.model_dump(mode="json", include={name})[name]
        flow = yaml.safe_dump(text, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()
        lines.append(_commented(f"{indent}{name}: {flow}", field.description or ""))
    return lines


def _commented(line: str, comment: str) -> str:
    return f"{line:<{_COMMENT_COLUMN}}  # {comment}" if comment else line
