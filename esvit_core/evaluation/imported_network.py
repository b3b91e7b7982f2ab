"""The networks of a run that evaluates an existing backbone: the backbone, and its architecture with initial weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esvit_core.config import Config, InitConfig
from esvit_core.models.factory import create_backbone
from esvit_core.runs.run import open_run
from esvit_core.storage import ObjectStore
from esvit_core.training.initial_weights import read_source
from esvit_core.weights.backbone import describe_backbone, load_backbone
from esvit_core.weights.fit import fit_weights
from esvit_core.weights.import_checkpoint import import_weights
from esvit_core.weights.snapshot import part_of
from esvit_core.weights.weight_source import BACKBONE, CHECKPOINT, CHECKPOINTS, kind_of


def load_network(location: str, store: ObjectStore) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network and the content of its ``backbone.json``."""
    kind = kind_of(location, store) if location.startswith("s3://") else None
    if kind == CHECKPOINT:
        return _load_checkpoint(location, store)
    if kind == BACKBONE or Path(location).is_dir():
        network = load_backbone(location, store)
    else:
        with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
            imported = import_weights(location, folder, store)
            for line in imported.messages:
                print(line, flush=True)
            network = load_backbone(imported.backbone)
    return network, network.backbone_config  # type: ignore[return-value]


def _load_checkpoint(location: str, store: ObjectStore) -> tuple[nn.Module, dict[str, Any]]:
    """Load the teacher's backbone from a checkpoint of a run."""
    run = open_run(location.partition(CHECKPOINTS)[0], store)
    snapshot = read_source(InitConfig(source=location), run.config, store)
    network = create_backbone(run.config.model, run.config.augment.global_crops.size, drop_path=0.0)
    network.load_state_dict(
        fit_weights(network, part_of(snapshot.teacher, "backbone"), location, run.config.model.arch)
    )
    step = int(location.rstrip("/").rpartition("/")[2])
    return network.eval(), describe_backbone(network, run.config) | {"run": run.uri, "step": step}


def initial_network(config: Config) -> nn.Module:
    """Return the network with initial weights drawn from the seed of ``config``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return create_backbone(config.model, config.augment.global_crops.size, drop_path=0.0)
