"""`esvit evaluate`: evaluate an existing backbone on this machine."""

from __future__ import annotations

from pathlib import Path

from esvit_core.errors import UserError
from esvit_core.runs.run import MEASURED, run_uri
from esvit_core.runs.status import run_names
from esvit_core.storage import ObjectStore, join_uri
from esvit_pipelines.local.run import open_run_store, print_default_recipe, run_pipeline
from esvit_pipelines.settings import Settings, resolve


def evaluate(settings: Settings, model: str) -> None:
    """Start or resume the run that evaluates a backbone on this machine, and print the results.

    Args:
        model: a pointer; name, prefix of the name, or address of a run; a published backbone; a weights file; or
            ``timm:<name>``.

    Raises:
        UserError: the settings, the backbone, the data or the environment are invalid.
        InfrastructureError: a failure that may not happen again.
        CrashError: a step failed unexpectedly.
        StoppedError: a signal stopped the run; its state is saved.
    """
    config = resolve(settings)
    with open_run_store(settings, config) as store:
        from esvit_core.evaluation.import_backbone import import_backbone

        current = import_backbone(backbone_address(model, config.bucket, store), settings.data, config, store=store)
        print_default_recipe(settings)
        backbone = store.get_json(current.at(MEASURED))["backbone"]
        print(f"run {current.name}, which evaluates {backbone}")
        run_pipeline(settings, current, config, backbone=backbone)


def backbone_address(model: str, bucket: str, store: ObjectStore) -> str:
    """Return the address of the run that ``model`` names; anything else is returned as it is.

    A pointer, file or folder has precedence over a run of the same name.

    Raises:
        UserError: several runs have this prefix.
    """
    if model.startswith(("s3://", "timm:")) or Path(model).exists() or "/" in model:
        return model
    if store.read_pointer(join_uri(f"s3://{bucket}", "pointers", model)) is not None:
        return model
    names = run_names(store, bucket)
    matching = [model] if model in names else [name for name in names if name.startswith(model)]
    if len(matching) > 1:
        raise UserError(
            f"--model {model}: {len(matching)} runs have this prefix ({', '.join(matching)}); give a longer one"
        )
    return run_uri(bucket, matching[0]) if matching else model
