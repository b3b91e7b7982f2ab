"""Objective (EsViT, equation 3): half the view task, half the region task, and the centers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esvit_core.config import ObjectiveConfig
from esvit_core.losses.center import Center
from esvit_core.losses.region import region_loss
from esvit_core.losses.strategy import CHUNKED, LossStrategy
from esvit_core.losses.view import view_loss
from esvit_core.models.multicrop import NetworkOutput


class ObjectiveTerms(NamedTuple):
    """``total`` has the gradient; ``view`` and ``region`` are the losses of the two tasks, for the log."""

    total: Tensor
    view: Tensor
    region: Tensor | None

    def plus(self, other: ObjectiveTerms | None) -> ObjectiveTerms:
        """Add the terms of ``other``, without gradient; None adds nothing."""
        if other is None:
            return ObjectiveTerms(self.total.detach(), self.view, self.region)
        region = None if self.region is None or other.region is None else self.region + other.region
        return ObjectiveTerms(self.total.detach() + other.total, self.view + other.view, region)

    def times(self, weight: float) -> ObjectiveTerms:
        """Multiply each term by ``weight``."""
        region = None if self.region is None else self.region * weight
        return ObjectiveTerms(self.total * weight, self.view * weight, region)


class Objective(nn.Module):
    """Loss of a step; computing it also updates the centers with the teacher's logits.

    Args:
        config: the ``objective`` section.
        out_dim: number of prototypes K.
        share: fraction of the global batch that this process sees; None: all processes see the same.
        strategy: implementation of the cross-entropy.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        out_dim: int,
        share: Fraction | None = None,
        strategy: LossStrategy = CHUNKED,
    ) -> None:
        super().__init__()
        self.strategy = strategy
        self.student_temp = config.student_temp
        self.center_view = Center(out_dim, config.center_momentum, share)
        self.center_region = Center(out_dim, config.center_momentum, share) if config.region else None

    def forward(
        self,
        student: NetworkOutput,
        teacher: NetworkOutput,
        teacher_temp: float,
        mix: Sequence[Tensor] | None = None,
        last: bool = True,
    ) -> ObjectiveTerms:
        """Compare all crops of the student with the two global crops of the teacher.

        Args:
            student: output for V crops, the two global crops first.
            teacher: output for the two global crops.
            teacher_temp: tau_t of this epoch.
            mix: see :func:`~esvit_core.losses.view.view_loss`; only in view-only runs.
            last: False: more micro-batches of this step follow; the centers are updated with the last one, and
                :meth:`finish` completes that.

        Returns:
            The means over the given images.
        """
        if mix is not None and self.center_region is not None:
            raise ValueError("mixup and CutMix support the view task only: regions of mixed images have no match")
        share = 1.0 if self.center_region is None else 0.5
        with torch.autocast(student.view_logits.device.type, enabled=False):
            view = view_loss(
                student.view_logits,
                teacher.view_logits,
                self.center_view.value,
                self.student_temp,
                teacher_temp,
                len(student.regions_per_crop),
                mix,
                share,
                self.strategy,
            )
            region = None if self.center_region is None else self._region(student, teacher, teacher_temp, share)
            self.center_view.update(teacher.view_logits, last)
            if self.center_region is not None:
                assert teacher.region_logits is not None
                self.center_region.update(teacher.region_logits, last)
        if region is None:
            return ObjectiveTerms(view, view.detach(), None)
        return ObjectiveTerms(view + region, view.detach() / share, region.detach() / share)

    def finish(self) -> None:
        """Complete the updates of the centers, which run over all processes during the backward pass."""
        self.center_view.finish()
        if self.center_region is not None:
            self.center_region.finish()

    def _region(self, student: NetworkOutput, teacher: NetworkOutput, teacher_temp: float, weight: float) -> Tensor:
        assert self.center_region is not None
        assert student.region_logits is not None and student.region_features is not None
        assert teacher.region_logits is not None and teacher.region_features is not None
        return region_loss(
            student.region_logits,
            teacher.region_logits,
            student.region_features,
            teacher.region_features,
            self.center_region.value,
            self.student_temp,
            teacher_temp,
            student.regions_per_crop,
            teacher.regions_per_crop[0],
            weight,
            self.strategy,
        )
