"""The training step of a checkout of the published code (microsoft/esvit), for comparison.

The published files run unchanged. Stubs replace only what is missing from current torch and timm, or is not needed for a
step: the old module of timm's layers, the package that reads configurations, einops. The published loop itself cannot be
called, because it is written for CUDA; the order of its calls is that of :class:`plain_step.PlainStep`.
"""

from __future__ import annotations

import ast
import importlib
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_step import PlainStep
from torch import Tensor, nn

from esvit_core.config import Config
from esvit_core.models.multicrop import build_student_teacher
from esvit_core.models.swin import SwinStage, SwinTransformer
from esvit_core.training.optim.schedules import ScheduleValues
from esvit_core.weights.published_names import to_published


class PublishedStep(PlainStep):
    """Student, teacher, objective and optimizer of the published code, with our initial weights.

    Args:
        config: configuration of the run, with a Swin network.
        device: device of networks, objective and optimizer.
        dtype: precision of autocast; float16 with a gradient scaler, as published; float32: no autocast.
        checkout: folder with ``main_esvit.py``.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, checkout: Path) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        swin, vision_transformer, self.functions = load(checkout)
        networks = []
        for ours, is_teacher in zip(build_student_teacher(config), (False, True), strict=True):
            if not isinstance(ours.backbone, SwinTransformer):
                sys.exit(f"--arch {config.model.arch}: the published code is timed with Swin networks only")
            described = describe_swin(config, ours.backbone)
            network = swin.get_cls_model(described, is_teacher, config.objective.region)
            for name in ("head", "head_dense")[: 1 + config.objective.region]:
                head = vision_transformer.DINOHead(
                    network.num_features,
                    config.head.out_dim,
                    norm_last_layer=False,
                    hidden_dim=config.head.hidden_dim,
                    bottleneck_dim=config.head.bottleneck_dim,
                )
                setattr(network, name, head)
            missing, unexpected = network.load_state_dict(to_published(ours.state_dict()), strict=False)
            if unexpected or [name for name in missing if not name.endswith("attn_mask")]:
                sys.exit(f"{checkout}: other weights than ours: {[*missing, *unexpected][:3]}")
            networks.append(network.to(device))
        self.student, self.teacher = networks
        self.teacher.requires_grad_(False)
        self.objective = published_objective(self.functions, config).to(device)
        self.optimizer = torch.optim.AdamW(self.functions.get_params_groups(self.student))
        self.scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None

    def _loss(self, student: Any, teacher: Any, at: ScheduleValues) -> Tensor:
        loss: Tensor = self.objective(student, teacher, at.epoch, None)
        return loss

    def _clip(self, at: ScheduleValues) -> None:
        self.functions.clip_gradients(self.student, self.config.optimizer.clip_grad)
        frozen = self.config.optimizer.freeze_last_layer_epochs
        self.functions.cancel_gradients_last_layer(at.epoch, self.student, frozen)


def published_objective(functions: Any, config: Config) -> nn.Module:
    """``DDINOLoss``, or ``DINOLoss`` without the region task; it averages over a process group."""
    if not dist.is_initialized():
        store = f"file://{tempfile.mkdtemp(prefix='esvit-')}/store"
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store, rank=0, world_size=1)
    kind, ours = functions.DDINOLoss if config.objective.region else functions.DINOLoss, config.objective
    crops = 2 + sum(kind.number for kind in config.augment.local_kinds)
    temperatures = ours.warmup_teacher_temp, ours.teacher_temp, ours.warmup_teacher_temp_epochs
    made: nn.Module = kind(config.head.out_dim, crops, *temperatures, config.training.epochs)
    return made


def describe_swin(config: Config, backbone: SwinTransformer) -> Any:
    """Build the configuration that the published network reads."""
    stages: list[SwinStage] = backbone._stages()
    spec = {
        "PATCH_SIZE": backbone.patch_size,
        "DIM_EMBED": backbone.embed_dim,
        "DEPTHS": list(backbone.depths),
        "NUM_HEADS": [stage.blocks[0].attn.num_heads for stage in stages],  # type: ignore[union-attr]
        "WINDOW_SIZE": backbone.window_size,
        "MLP_RATIO": 4,
        "QKV_BIAS": True,
        "DROP_RATE": 0,
        "ATTN_DROP_RATE": 0,
        "DROP_PATH_RATE": config.model.drop_path,
        "USE_APE": False,
        "PATCH_NORM": True,
    }
    space = types.SimpleNamespace
    side = config.augment.global_crops.size
    return space(
        MODEL=space(SPEC=spec, NUM_CLASSES=0, INIT_WEIGHTS=False),
        TRAIN=space(IMAGE_SIZE=(side, side)),
        FINETUNE=space(FINETUNE=False),
    )


def load(checkout: Path) -> tuple[Any, Any, Any]:
    """Load the modules of Swin and of the heads, and the functions and objectives of a step.

    Returns:
        ``models.swin_transformer``, ``models.vision_transformer``, and the names of ``main_esvit`` and ``utils``.
    """
    main = checkout / "main_esvit.py"
    if not main.is_file():
        sys.exit(f"--reference {checkout}: expected a checkout of microsoft/esvit, with main_esvit.py in it")
    try:
        importlib.import_module("einops")
    except ImportError:
        sys.modules["einops"] = types.ModuleType("einops")
        sys.modules["einops"].__dict__.update(dict.fromkeys(("rearrange", "repeat")))
    sys.path.insert(0, str(checkout))
    package = types.ModuleType("models")  # without its __init__, which imports every architecture
    package.__path__ = [str(checkout / "models")]
    sys.modules["models"] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swin = importlib.import_module("models.swin_transformer")
        vision_transformer = importlib.import_module("models.vision_transformer")
        functions = importlib.import_module("utils")
    # The module itself imports data sets and parts of timm that no longer exist; the objectives need none of them.
    wanted = ("DINOLoss", "DDINOLoss")
    tree = ast.parse(main.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in wanted]
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "np": np, "dist": dist}
    exec(compile(tree, str(main), "exec"), names)
    functions.__dict__.update({name: names[name] for name in wanted})
    return swin, vision_transformer, functions
