"""`esvit compile`: the pipeline as KFP YAML for a cluster."""

from __future__ import annotations

import tempfile
from pathlib import Path

from esvit_core import __version__
from esvit_core.config import Config
from esvit_core.errors import UserError


def compile_pipeline(config: Config, output: Path) -> list[str]:
    """Write the pipeline of ``config`` to ``output``, and read it back with KFP's own loader.

    Returns:
        Names of the steps.

    Raises:
        UserError: the file cannot be written, or the cluster extra is not installed.
    """
    import kfp
    from kfp import compiler, components

    from esvit_pipelines.pretrain.pipeline import build_pretrain_pipeline, step_names

    pipeline = build_pretrain_pipeline(config, cluster=True)
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(compiled))
        lines = compiled.read_text(encoding="utf-8").splitlines(keepends=True)
    # KFP's header shows the defaults in an order that changes from run to run; the rest is always the same.
    while lines and lines[0].startswith("#"):
        del lines[0]
    header = f"# Made by `esvit compile` (esvit {__version__}, kfp {kfp.__version__}). Recipe: {config.recipe}.\n"
    text = header + "".join(lines)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"-o {output}: cannot be written ({error.strerror}); name another file") from None
    return step_names(components.load_component_from_text(text))
