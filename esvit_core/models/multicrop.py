"""Student and teacher: a backbone with its heads that takes crops of several sizes (EsViT, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esvit_core.config import Config
from esvit_core.models.factory import create_backbone
from esvit_core.models.heads import ProjectionHead
from esvit_core.models.lazy_logits import Logits
from esvit_core.models.timm_backbone import TimmBackbone

#: Computes views (n * B, D) and regions (n * B, N, D) of each batch (n * B, 3, S, S) with a backbone.
Passes = Callable[[Any, list[Tensor]], list[tuple[Tensor, Tensor]]]


def passes_one_by_one(backbone: Any, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Compute a pass of the backbone for each batch, see :data:`Passes`."""
    return [backbone.views_and_regions(batch) for batch in batches]


class NetworkOutput(NamedTuple):
    """Output for V crops of B images; rows are ordered by crop, then image, then region."""

    view_logits: Logits  # (V * B, K)
    region_logits: Logits | None  # (sum of B * N, K)
    region_features: Tensor | None  # (sum of B * N, D)
    regions_per_crop: list[int]  # N for each crop
    view_features: Tensor | None = None  # (V * B, D)


class MultiCropNetwork(nn.Module):
    """A backbone with a view head and, for the region task, a region head.

    Attributes:
        passes: computes views and regions of batches of several sizes; None: each batch has its own pass of the backbone.
            :mod:`esvit_core.kernels.choose` sets it.
    """

    passes: Passes | None = None

    def __init__(self, backbone: nn.Module, head: nn.Module, head_dense: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head
        self.head_dense = head_dense

    def set_lazy_logits(self, enable: bool = True) -> None:
        """Let the projection heads return lazy logits, see :mod:`esvit_core.models.lazy_logits`."""
        for head in (self.head, self.head_dense):
            if isinstance(head, ProjectionHead):
                head.last_layer.lazy = enable

    def forward(self, crops: list[Tensor]) -> NetworkOutput:
        """Map crops (B, 3, S, S) to logits and features; consecutive crops of equal size share one pass."""
        views, regions, counts = [], [], []
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]
        passes = self.passes or passes_one_by_one
        for group, (view, region) in zip(groups, passes(self.backbone, [torch.cat(g) for g in groups]), strict=True):
            views.append(view)
            regions.append(region.flatten(0, 1))
            counts += [region.shape[1]] * len(group)
        view_features = torch.cat(views)
        view_logits = self.head(view_features)
        if self.head_dense is None:
            return NetworkOutput(view_logits, None, None, counts, view_features)
        features = torch.cat(regions)
        return NetworkOutput(view_logits, self.head_dense(features), features, counts, view_features)


def build_network(config: Config, drop_path: float | None = None) -> MultiCropNetwork:
    """Build a backbone with the heads of the recipe.

    Raises:
        UserError: there is no such backbone, or a timm backbone does not accept the crop sizes of the recipe.
    """
    backbone: Any = create_backbone(config.model, config.augment.global_crops.size, drop_path)
    if isinstance(backbone, TimmBackbone):
        kinds = (config.augment.global_crops, *config.augment.local_kinds)
        backbone.check_sizes(sorted({kind.size for kind in kinds if kind.number}))
    # In some timm networks the view feature is wider than the region features.
    widths = [backbone.num_features, getattr(backbone, "num_region_features", backbone.num_features)]
    heads = [
        ProjectionHead(
            width,
            config.head.out_dim,
            config.head.hidden_dim,
            config.head.bottleneck_dim,
            config.head.norm_last_layer,
            config.head.batch_norm,
        )
        for width in (widths if config.objective.region else widths[:1])
    ]
    return MultiCropNetwork(backbone, *heads)


def build_student_teacher(config: Config) -> tuple[MultiCropNetwork, MultiCropNetwork]:
    """Build student and teacher with equal weights, drawn from ``config.seed``.

    The teacher has no gradients and no stochastic depth. As published, it stays in training mode, which matters
    for batch norms and for ViL's random neighbors. The global random state of torch does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = build_network(config)
        teacher = build_network(config, drop_path=0.0)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)
