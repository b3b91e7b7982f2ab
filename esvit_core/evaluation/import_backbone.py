"""Import an existing backbone into a run without training, to evaluate it like a newly trained one.

The architecture and the image preprocessing come from the backbone; data, protocols and seed come from the
configuration. The baseline is the same network with initial weights drawn from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esvit_core.config import Config, InitConfig
from esvit_core.data.ingest.sources import source_fingerprint
from esvit_core.errors import UserError
from esvit_core.evaluation.import_features import import_features
from esvit_core.evaluation.imported_features import is_features_file
from esvit_core.runs.run import MEASURED, Run, run_id, run_uri, start_run
from esvit_core.storage import NotFound, ObjectStore, join_uri
from esvit_core.weights.weight_source import DESCRIPTION, find

_RECIPE_PREFIX = "evaluate "
_BATCH_PIXELS = (
    64 * 224**2
)  # of a batch whose size was chosen for smaller images: the default batch of the published size
_ORIGIN_KEYS = ("run", "step", "imported")  # entries of a description that say where the backbone comes from


def import_backbone(
    backbone: str,
    source: str,
    config: Config,
    uri: str = "",
    store: ObjectStore | None = None,
    *,
    setting: str = "backbone",
    before_loading: Callable[[], None] | None = None,
) -> Run:
    """Start a run with an existing backbone, or return the run that was started with the same arguments.

    Args:
        backbone: a pointer such as ``champion``; a run ``s3://bucket/runs/<id>``, whose newest checkpoint is used until it
            has published a backbone; a published backbone; a ``.pth`` or ``.safetensors`` file; ``timm:<name>``, or
            ``timm:<name>:<file>`` for weights of a file in timm's network; or a file of features, ``.parquet``, ``.npz`` or
            ``.npy``, which takes the place of a network and has no baseline.
        source: images to evaluate on.
        config: the user's configuration; its sections ``model`` and ``init`` are ignored.
        uri: address of the run; empty: derived from backbone, configuration and data.
        store: object store; default: the store named by ``ESVIT_S3_*``.
        setting: what the backbone was given as, for error messages.
        before_loading: called before the backbone is loaded, and torch imported; not if the run is found.

    Raises:
        UserError: there is no such backbone, or the run exists with another configuration.
    """
    store = store or ObjectStore.from_env()
    if is_features_file(backbone):
        return import_features(backbone, source, config, uri, store, setting)
    location, sha256 = find(backbone, "backbone", config.bucket, store, setting=setting)
    uri = uri or _expected_address(location, sha256, source, config, store)
    if uri and (description := _imported(uri, location, sha256, store)) is not None:
        return start_run(_configuration(config, description), source, uri, store)
    if before_loading is not None:
        before_loading()
    from esvit_core.evaluation.imported_network import initial_network, load_network  # imports torch
    from esvit_core.weights.backbone import save_backbone

    network, description = load_network(location, store)
    chosen = config.evaluation.batch_size
    config = _configuration(config, description)
    if (batch := config.evaluation.batch_size) < chosen:
        print(f"evaluation.batch_size: {batch} images of {config.evaluation.crop} pixels, not {chosen}", flush=True)
    uri = uri or _address(location, sha256, source, config)
    run = start_run(config, source, uri, store)
    origin = {key: description[key] for key in _ORIGIN_KEYS if key in description}
    save_backbone(store, run.at("backbone"), network, run.config, origin)
    save_backbone(store, run.at("baseline"), initial_network(run.config), run.config, {"run": run.uri, "step": 0})
    record = {"backbone": location, "sha256": sha256, **origin}
    store.put_if_absent(run.at(MEASURED), (json.dumps(record, indent=1) + "\n").encode())
    return run


def _expected_address(location: str, sha256: str | None, source: str, config: Config, store: ObjectStore) -> str:
    """Return the address of the run that evaluates a published backbone; empty if only loading tells the architecture."""
    try:
        described = _configuration(config, _description(location, store))
    except (NotFound, OSError, ValueError, KeyError, TypeError, UserError):
        return ""  # not a published backbone, or a damaged one: loading it says what is wrong
    return _address(location, sha256, source, described)


def _description(location: str, store: ObjectStore) -> dict[str, Any]:
    """Return the content of the ``backbone.json`` of a published backbone."""
    if location.startswith("s3://"):
        return store.get_json(join_uri(location, DESCRIPTION))
    found: dict[str, Any] = json.loads((Path(location) / DESCRIPTION).read_text(encoding="utf-8"))
    return found


def _address(location: str, sha256: str | None, source: str, config: Config) -> str:
    """Return the address of the run that evaluates a backbone with this configuration."""
    prints = {s.name: source_fingerprint(s.source) for s in config.evaluation.transfer}
    return run_uri(
        config.bucket, run_id(config, f"{source_fingerprint(source)}\nbackbone {sha256 or location}", prints)
    )


def _imported(uri: str, location: str, sha256: str | None, store: ObjectStore) -> dict[str, Any] | None:
    """Return the content of ``backbone.json`` if the run at ``uri`` has imported this backbone; otherwise None."""
    try:
        record = store.get_json(join_uri(uri, MEASURED))
        if (record["backbone"], record["sha256"]) != (location, sha256):
            return None
        description: dict[str, Any] = store.get_json(join_uri(uri, "backbone", DESCRIPTION))
        # The run has published it under its own recipe, which is named after that of the backbone.
        return description | {"recipe": description["recipe"].removeprefix(_RECIPE_PREFIX)}
    except NotFound:
        return None


def _configuration(config: Config, description: Mapping[str, Any]) -> Config:
    """Replace the architecture and the preprocessing in ``config`` by those of the backbone."""
    values = config.model_dump(mode="json")
    crop = description["img_size"]
    values["recipe"] = f"{_RECIPE_PREFIX}{description.get('recipe', 'backbone')}"
    values["model"] = description["model"] | {"img_size": crop}
    values["init"] = InitConfig().model_dump()
    values["augment"]["global_crops"]["size"] = crop
    values["augment"].update({key: description[key] for key in ("mean", "std") if key in description})
    values["evaluation"].update(
        resize=description.get("eval_resize", config.evaluation.resize),
        crop=description.get("eval_crop", config.evaluation.crop),
    )
    values["evaluation"]["batch_size"] = _batch_size(config, values["evaluation"]["crop"])
    values["data"]["store_short_side"] = description.get("store_short_side", config.data.store_short_side)
    return Config.from_mapping(values, origin="configuration")


def _batch_size(config: Config, crop: int) -> int:
    """Return the batch size for the backbone's images, which may be much larger than those that the recipe is for."""
    chosen = config.evaluation.batch_size
    if crop <= config.evaluation.crop:
        return chosen
    return min(chosen, max(1, _BATCH_PIXELS // crop**2))
