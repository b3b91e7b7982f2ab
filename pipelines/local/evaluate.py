"""`esvit evaluate`: evaluate existing backbones on this machine, and compare several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.evaluation.import_backbone import import_backbone
from esvit_core.evaluation.side_by_side import Comparison, compare_subjects, read_subject
from esvit_core.runs.run import MEASURED, Run, run_uri
from esvit_core.runs.status import run_names
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.marker import mark
from esvit_pipelines.local.run import open_run_store, print_default_recipe, run_pipeline
from esvit_pipelines.settings import Settings, resolve


def evaluate(settings: Settings, models: Sequence[str], baselines: Sequence[str] = ()) -> None:
    """Start or resume the runs that evaluate backbones on this machine, print the results, and compare several.

    Every backbone has a run of its own. Several are compared with the baselines, or with the first model if there are none.

    Args:
        settings: data, recipe and output folder.
        models: each is a pointer; the name, a prefix of the name, or the address of a run; a published backbone; a weights
            file; ``timm:<name>``, or ``timm:<name>:<file>``; or a file of features.
        baselines: likewise.

    Raises:
        UserError: the settings, a backbone, the data or the environment are invalid.
        InfrastructureError: a failure that may not happen again.
        CrashError: a step failed unexpectedly.
        StoppedError: a signal stopped the run; its state is saved.
    """
    config = resolve(settings)
    with open_run_store(settings, config) as store:
        named = [("--model", model) for model in models] + [("--baseline", model) for model in baselines]
        print_default_recipe(settings)
        # All are imported first, so that a wrong name fails before work is spent.
        runs = _import_all(settings, config, store, named)
        for current in runs.values():
            backbone = store.get_json(current.at(MEASURED))["backbone"]
            print(f"run {current.name}, which evaluates {backbone}")
            run_pipeline(settings, current, config, backbone=backbone)
        if len(runs) > 1:
            subjects = [read_subject(store, run.uri, run.config, name) for name, run in runs.items()]
            comparison = compare_subjects(subjects, list(baselines) or [subjects[0].name])
            print()
            print_comparison(comparison, settings.out)


def backbone_address(model: str, bucket: str, store: ObjectStore, option: str = "--model") -> str:
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
            f"{option} {model}: {len(matching)} runs have this prefix ({', '.join(matching)}); give a longer one"
        )
    return run_uri(bucket, matching[0]) if matching else model


def _import_all(
    settings: Settings, config: Config, store: ObjectStore, named: Sequence[tuple[str, str]]
) -> dict[str, Run]:
    """Return the run of each backbone by the name that the user gave."""
    runs: dict[str, Run] = {}
    options: dict[str, str] = {}
    for option, model in named:
        address = backbone_address(model, config.bucket, store, option)
        run = import_backbone(
            address, settings.data, config, store=store, setting=option, before_loading=_import_networks
        )
        if run.uri in options:
            raise UserError(f"{option} {model}: it is the same backbone as {options[run.uri]}; name each one once")
        options[run.uri] = f"{option} {model}"
        runs[model] = run
    return runs


def _import_networks() -> None:
    from esvit_core.torch_private import import_timm_without_dynamo  # imports torch

    import_timm_without_dynamo()


def print_comparison(comparison: Comparison, out: Path) -> None:
    """Print the comparison, and write it to a folder in ``out`` as a page, Markdown and JSON."""
    from rich.console import Console

    from esvit_core.reporting.comparison_page import comparison_files, comparison_tables, sentence

    Console().print(comparison_tables(comparison))
    for each in comparison.combinations():
        print(sentence(comparison, *each))
    uris = [*(subject.run_uri for subject in comparison.subjects), *comparison.references]
    folder = out / f"comparison-{hashlib.sha256(json.dumps(uris).encode()).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder)
    for name, text in comparison_files(comparison).items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"comparison  {folder / 'comparison.html'}")
