"""A compiled pipeline in a file, and the arguments of a run of it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from esvit_core.config import Config
from esvit_core.config.parameters import Parameters
from esvit_core.errors import UserError

#: Names of this project's pipelines; others are sent with the run instead of registered.
OWN = ("esvit-pretrain", "esvit-evaluate", "esvit-retrain")


@dataclass(frozen=True)
class Package:
    """A compiled pipeline in a file.

    Attributes:
        path: path of the file.
        name: name of the pipeline.
        parameters: its parameters by name, as KFP describes them.
        image: image of its steps; empty: they have none, or several.
        digest: SHA-256 of the text without its leading comments.
        description: one-sentence description of the pipeline.
    """

    path: Path
    name: str
    parameters: Mapping[str, Mapping[str, Any]]
    image: str = ""
    digest: str = ""
    description: str = ""

    @property
    def own(self) -> bool:
        """Whether it is one of this project's pipelines."""
        return self.name in OWN


@contextlib.contextmanager
def package(pipeline: str, config: Config, form: Parameters | None = None) -> Iterator[Package]:
    """Compile a pipeline, or read a compiled one from a file.

    Args:
        pipeline: name of a pipeline, or a file that ends with ``.yaml``.
        config: configuration to compile a named pipeline with.
        form: other defaults of its parameters, see :func:`esvit_pipelines.cluster.compile.build`.

    Raises:
        UserError: the pipeline or the file does not exist, or the file holds no compiled pipeline.
    """
    from esvit_pipelines.cluster.compile import compile_pipeline

    if pipeline.endswith((".yaml", ".yml")):
        yield _read(Path(pipeline))
        return
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_pipeline(pipeline, config, path, form)
        yield _read(path)


def _read(path: Path) -> Package:
    try:
        text = path.read_text(encoding="utf-8")
        spec = next(yaml.safe_load_all(text))
        name = spec["pipelineInfo"]["name"]
        parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    except OSError as error:
        raise UserError(f"pipeline {path}: cannot be read ({error.strerror}); write one with `esvit compile`") from None
    except (yaml.YAMLError, UnicodeDecodeError, StopIteration, KeyError, TypeError, AttributeError):
        raise UserError(
            f"pipeline {path}: it is not a compiled KFP 2 pipeline; write one with `esvit compile`"
        ) from None
    executors = ((spec.get("deploymentSpec") or {}).get("executors") or {}).values()
    images = {one["container"]["image"] for one in executors if "image" in (one.get("container") or {})}
    body = re.sub(r"\A(#[^\n]*\n)+", "", text)
    digest = hashlib.sha256(body.encode()).hexdigest()
    description = str(spec["pipelineInfo"].get("description", ""))
    return Package(path, name, parameters, images.pop() if len(images) == 1 else "", digest, description)


def arguments(pipeline: Package, items: Sequence[str]) -> dict[str, Any]:
    """Parse the arguments of a pipeline to the types of its parameters.

    Args:
        items: items ``name=value``; the value of a list or structure is YAML.

    Raises:
        UserError: a parameter is unknown or missing, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in pipeline.parameters:
            near = difflib.get_close_matches(name, pipeline.parameters, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            known = ", ".join(pipeline.parameters) or "none"
            raise UserError(f"parameter {item}: expected name=value with a parameter of {pipeline.name}{hint}: {known}")
        values[name] = _typed(item, text, str(pipeline.parameters[name]["parameterType"]))
    missing = [n for n, p in pipeline.parameters.items() if not p.get("isOptional") and n not in values]
    if missing:
        flags = ", ".join(f"--{n}" if n == "data" else f"-p {n}=..." for n in missing)
        raise UserError(f"pipeline {pipeline.name}: it requires {', '.join(missing)}; add {flags}")
    return values


def _typed(item: str, text: str, kind: str) -> Any:
    if kind == "STRING":
        return text
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "NUMBER_INTEGER": ((int,), "a whole number"),
        "NUMBER_DOUBLE": ((int, float), "a number"),
        "BOOLEAN": ((bool,), "true or false"),
        "LIST": ((list,), "a list"),
        "STRUCT": ((dict,), "a mapping"),
    }
    types, words = kinds[kind]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UserError(f"parameter {item}: expected {words}")
    return value
