"""The whole objective (EsViT, equation 3): half the view task, half the region task, and the centres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esvit_core.config import ObjectiveConfig
from esvit_core.losses.centre import Centre
from esvit_core.losses.region import region_loss
from esvit_core.losses.view import view_loss
from esvit_core.models.multicrop import NetworkOutput


class ObjectiveTerms(NamedTuple):
    """``total`` takes the gradient; ``view`` and ``region`` are the two tasks' own losses, for the log."""

    total: Tensor
    view: Tensor
    region: Tensor | None


class Objective(nn.Module):
    """Loss of a step; afterwards the centres have taken in the teacher's logits.

    Args:
        config: the ``objective`` section.
        out_dim: number of prototypes K.
    """

    def __init__(self, config: ObjectiveConfig, out_dim: int) -> None:
        super().__init__()
        self.student_temp = config.student_temp
        self.centre_view = Centre(out_dim, config.centre_momentum)
        self.centre_region = Centre(out_dim, config.centre_momentum) if config.region else None

    def forward(
        self,
        student: NetworkOutput,
        teacher: NetworkOutput,
        teacher_temp: float,
        mix: Sequence[Tensor] | None = None,
    ) -> ObjectiveTerms:
        """Compare all crops of the student with the two global crops of the teacher.

        Args:
            student: output for V crops, the two global crops first.
            teacher: output for the two global crops.
            teacher_temp: tau_t of this epoch.
            mix: see :func:`~esvit_core.losses.view.view_loss`; view-only runs.
        """
        if mix is not None and self.centre_region is not None:
            raise ValueError("mixup and CutMix go with the view task only: regions of mixed pictures have no match")
        with torch.autocast(student.view_logits.device.type, enabled=False):
            view = view_loss(
                student.view_logits,
                teacher.view_logits,
                self.centre_view.value,
                self.student_temp,
                teacher_temp,
                len(student.regions_per_crop),
                mix,
            )
            region = None if self.centre_region is None else self._region(student, teacher, teacher_temp)
            self.centre_view.update(teacher.view_logits)
            if self.centre_region is not None:
                assert teacher.region_logits is not None
                self.centre_region.update(teacher.region_logits)
        total = view if region is None else 0.5 * view + 0.5 * region
        return ObjectiveTerms(total, view.detach(), None if region is None else region.detach())

    def _region(self, student: NetworkOutput, teacher: NetworkOutput, teacher_temp: float) -> Tensor:
        assert self.centre_region is not None
        assert student.region_logits is not None and student.region_features is not None
        assert teacher.region_logits is not None and teacher.region_features is not None
        return region_loss(
            student.region_logits,
            teacher.region_logits,
            student.region_features,
            teacher.region_features,
            self.centre_region.value,
            self.student_temp,
            teacher_temp,
            student.regions_per_crop,
            teacher.regions_per_crop[0],
        )
