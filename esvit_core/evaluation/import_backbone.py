"""A run without a training of its own: a backbone that exists, to be measured as one that was just trained.

Its architecture, and how it wants its images, come from the backbone; the data, the protocols and the seed from the
configuration. The baseline is the same network as it is drawn from the seed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esvit_core.config import Config, InitConfig
from esvit_core.data.ingest.sources import source_fingerprint
from esvit_core.models.factory import create_backbone
from esvit_core.runs.run import MEASURED, Run, open_run, run_id, run_uri, start_run
from esvit_core.storage import ObjectStore
from esvit_core.training.initial_weights import read_source
from esvit_core.weights.backbone import BACKBONE_FORMAT, describe_backbone, load_backbone, save_backbone
from esvit_core.weights.fit import fitting
from esvit_core.weights.import_checkpoint import import_weights
from esvit_core.weights.snapshot import part_of
from esvit_core.weights.weight_source import CHECKPOINT, CHECKPOINTS, find, kind_of

_KEPT = ("run", "step", "imported")  # of a description: where the backbone comes from


def import_backbone(
    backbone: str,
    source: str,
    asked: Config,
    uri: str = "",
    store: ObjectStore | None = None,
) -> Run:
    """Start a run whose backbone is one that exists, or find the one that was started with the same arguments.

    Args:
        backbone: a pointer such as ``champion``; ``s3://bucket/runs/<id>``, whose newest checkpoint serves while it has
            published nothing; a published backbone; a ``.pth`` or ``.safetensors`` file; or ``timm:<name>``.
        source: the images to measure on.
        asked: what was asked for; the sections ``model`` and ``init`` do not count.
        uri: where the run shall lie; empty: the place that backbone, configuration and data determine.
        store: by default the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: there is no such backbone, or the run exists with another configuration.
    """
    store = store or ObjectStore.from_env()
    place, sha256 = find(backbone, "backbone", asked.bucket, store, setting="backbone")
    network, description = _load(place, store)
    config = _configuration(asked, description)
    if not uri:
        prints = {s.name: source_fingerprint(s.source) for s in config.evaluation.transfer}
        name = run_id(config, f"{source_fingerprint(source)}\nbackbone {sha256 or place}", prints)
        uri = run_uri(config.bucket, name)
    run = start_run(config, source, uri, store)
    origin = {key: description[key] for key in _KEPT if key in description}
    save_backbone(store, run.at("backbone"), network, run.config, origin)
    save_backbone(store, run.at("untrained"), _untrained(run.config), run.config, {"run": run.uri, "step": 0})
    record = {"backbone": place, "sha256": sha256, **origin}
    store.put_if_absent(run.at(MEASURED), (json.dumps(record, indent=1) + "\n").encode())
    return run


def _load(place: str, store: ObjectStore) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what its ``backbone.json`` says or would say."""
    kind = kind_of(place, store) if place.startswith("s3://") else None
    if kind == CHECKPOINT:
        return _of_checkpoint(place, store)
    if kind == BACKBONE_FORMAT or Path(place).is_dir():
        network = load_backbone(place, store)
        return network, _description(network)
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        imported = import_weights(place, folder, store)
        for line in imported.told:
            print(line, flush=True)
        network = load_backbone(imported.backbone)
    return network, _description(network)


def _of_checkpoint(place: str, store: ObjectStore) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher's backbone in a checkpoint of a run."""
    run = open_run(place.partition(CHECKPOINTS)[0], store)
    snapshot = read_source(InitConfig(source=place), run.config, store)
    network = create_backbone(run.config.model, run.config.augment.global_crops.size, drop_path=0.0)
    network.load_state_dict(fitting(network, part_of(snapshot.teacher, "backbone"), place, run.config.model.arch))
    step = int(place.rstrip("/").rpartition("/")[2])
    return network.eval(), describe_backbone(network, run.config) | {"run": run.uri, "step": step}


def _description(network: nn.Module) -> dict[str, Any]:
    return network.backbone_config  # type: ignore[return-value]


def _configuration(asked: Config, description: Mapping[str, Any]) -> Config:
    """What was asked for, with the architecture of the backbone and the images that it expects."""
    values = asked.model_dump(mode="json")
    crop = description["img_size"]
    values["recipe"] = f"evaluate {description.get('recipe', 'backbone')}"
    values["model"] = description["model"] | {"img_size": crop}
    values["init"] = InitConfig().model_dump()
    values["augment"]["global_crops"]["size"] = crop
    values["augment"].update({key: description[key] for key in ("mean", "std") if key in description})
    values["evaluation"].update(
        resize=description.get("eval_resize", asked.evaluation.resize),
        crop=description.get("eval_crop", asked.evaluation.crop),
    )
    values["data"]["store_short_side"] = description.get("store_short_side", asked.data.store_short_side)
    return Config.from_mapping(values, origin="configuration")


def _untrained(config: Config) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return create_backbone(config.model, config.augment.global_crops.size, drop_path=0.0)
