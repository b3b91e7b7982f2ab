"""`esvit compile`: compile a pipeline to KFP YAML for a cluster."""

from __future__ import annotations

import difflib
import importlib
import tempfile
from pathlib import Path
from typing import Any

from esvit_core import __version__
from esvit_core.config import Config
from esvit_core.config.parameters import Parameters
from esvit_core.errors import UserError

#: The pipelines by name: module below this package, and the function in it that builds the pipeline.
PIPELINES = {
    "pretrain": ("pretrain.pipeline", "build_pretrain_pipeline"),
    "evaluate": ("evaluate.pipeline", "build_evaluate_pipeline"),
    "retrain": ("retrain.pipeline", "build_retrain_pipeline"),
}


def build(name: str, config: Config, form: Parameters | None = None) -> Any:
    """Build a pipeline for a cluster.

    Args:
        name: a key of :data:`PIPELINES`.
        form: defaults of the parameters, of the pipeline pretrain only; None: those of ``config``.

    Raises:
        UserError: the pipeline does not exist, or the cluster extra is not installed.
    """
    if name not in PIPELINES:
        near = difflib.get_close_matches(name, PIPELINES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"pipeline {name}: it does not exist{hint}; expected one of {', '.join(PIPELINES)}")
    from esvit_pipelines.cluster.step_pod import lengthen_retries

    module, function = PIPELINES[name]
    builder = getattr(importlib.import_module(f"esvit_pipelines.{module}"), function)
    pipeline = builder(config, cluster=True, **({} if form is None else {"form": form}))
    lengthen_retries(pipeline.pipeline_spec)
    return pipeline


def pipeline_text(name: str, config: Config, form: Parameters | None = None) -> str:
    """Compile a pipeline to YAML: KFP's intermediate representation, and the Kubernetes settings as a second document.

    The text depends on the arguments only, which are those of :func:`build`.

    Raises:
        UserError: see :func:`build`.
    """
    import kfp
    from kfp import compiler

    pipeline = build(name, config, form)
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(compiled))
        lines = compiled.read_text(encoding="utf-8").splitlines(keepends=True)
    # KFP's header lists the defaults in an order that varies between compilations; the rest is deterministic.
    while lines and lines[0].startswith("#"):
        del lines[0]
    header = f"# Written by `esvit compile` (esvit {__version__}, kfp {kfp.__version__}). Recipe: {form.recipe if form else config.recipe}.\n"
    return header + "".join(lines)


def compile_pipeline(name: str, config: Config, output: Path, form: Parameters | None = None) -> list[str]:
    """Write the pipeline of ``config`` to ``output``, and load it with KFP's own loader.

    Returns:
        Names of the steps.

    Raises:
        UserError: the file cannot be written; or see :func:`build`.
    """
    from kfp import components

    from esvit_pipelines.steps import step_names

    text = pipeline_text(name, config, form)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"-o {output}: cannot be written ({error.strerror}); name another file") from None
    return step_names(components.load_component_from_text(text))
