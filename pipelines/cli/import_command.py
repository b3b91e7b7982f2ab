"""`esvit import`: convert a weights file to a published backbone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.storage.session import open_store


def import_file(
    file: str,
    out: str,
    arch: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    student: bool,
    checkpoint: bool,
) -> None:
    """Import the weights, and print what was imported.

    Raises:
        UserError: see :func:`esvit_core.weights.import_checkpoint.import_weights`; or two options exclude each other.
    """
    config = _configuration(arch, recipe, overrides)
    if not file.startswith(("s3://", "timm:")) and not Path(file).is_file():
        raise UserError(
            f"weights {file}: the file does not exist; expected a .pth or .safetensors file, s3://..., or timm:<name>"
        )
    with contextlib.ExitStack() as stack:
        store = None
        if "s3://" in (file[:5], out[:5]):
            directory = os.environ.get("ESVIT_STORE_DIR")
            store = stack.enter_context(open_store(Path(directory) if directory else None))
        from esvit_core.torch_private import import_timm_without_dynamo

        import_timm_without_dynamo()
        from esvit_core.weights.import_checkpoint import import_weights

        network = "student" if student else "teacher"
        imported = import_weights(file, out, store, config, network, checkpoint)
    for line in imported.messages:
        print(line)
    print(f"backbone    {imported.backbone}")
    if imported.checkpoint:
        print(f"checkpoint  {imported.checkpoint}   # --set init.source={imported.checkpoint} --set init.load=all")
    print(f"\nUse it:\n    import esvit_core\n    backbone = esvit_core.load_backbone({imported.backbone!r})")


def _configuration(arch: str | None, recipe: str | None, overrides: Sequence[str]) -> Config | None:
    if recipe is not None:
        if arch is not None:
            raise UserError(
                f"--arch {arch}: the recipe {recipe} names the architecture; give only one of --arch and --recipe"
            )
        return Config.load(recipe, overrides)
    if overrides:
        raise UserError(f"--set {overrides[0]}: it overrides a setting of a recipe; give --recipe too")
    return None if arch is None else Config.from_mapping({"recipe": "imported", "model": {"arch": arch}}, "--arch")
