"""A training step written as in the published code, for comparison: with its loops, its 18 pairs and its gathers.

The mathematics is that of :func:`esvit_core.training.loop.training_step`, and ``tests/test_benchmarks.py`` checks that
both compute equal numbers. The implementation differs: every pair of crops has its own softmax and its own gather of
K-wide distributions, the networks compute as in :mod:`plain_networks`, gradient clipping, gradient cancelling and the
moving average are Python loops over the parameters, and the step waits for the device to read the loss.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from plain_networks import plainly
from torch import Tensor, nn

from esvit_core.config import Config
from esvit_core.models.multicrop import NetworkOutput, build_student_teacher
from esvit_core.training.optim.optimizer import parameter_groups
from esvit_core.training.optim.schedules import ScheduleValues


class PlainObjective(nn.Module):
    """The view and region tasks over all pairs of crops, and the two centers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config.objective
        self.register_buffer("center_view", torch.zeros(1, config.head.out_dim))
        self.register_buffer("center_region", torch.zeros(1, config.head.out_dim))

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, teacher_temp: float) -> Tensor:
        region = self.config.region
        crops = len(student.regions_per_crop)
        views = (student.view_logits / self.config.student_temp).chunk(crops)
        targets = F.softmax((teacher.view_logits - self.center_view) / teacher_temp, -1).detach().chunk(2)
        B = len(targets[0])
        if region:
            T = teacher.regions_per_crop[0]
            rows = [n * B for n in student.regions_per_crop]
            regions = (student.region_logits / self.config.student_temp).split(rows)
            features = student.region_features.split(rows)
            keys = teacher.region_features.chunk(2)
            region_targets = F.softmax((teacher.region_logits - self.center_region) / teacher_temp, -1)
            region_targets = region_targets.detach().chunk(2)
        total, pairs = 0, 0
        for q, target in enumerate(targets):
            for v, view in enumerate(views):
                if v == q:
                    continue
                loss = (-target * F.log_softmax(view, -1)).sum(-1)  # (B,)
                if region:
                    N = student.regions_per_crop[v]
                    logits, query = regions[v].view(B, N, -1), features[v].view(B, N, -1)
                    candidates, key = region_targets[q].view(B, T, -1), keys[q].view(B, T, -1)
                    similarity = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).permute(0, 2, 1)
                    best = similarity.max(2)[1]  # (B, N)
                    matched = torch.gather(candidates, 1, best[..., None].expand(-1, -1, candidates.shape[2]))
                    loss = 0.5 * loss + 0.5 * (-matched * F.log_softmax(logits, -1)).sum(-1).mean(-1)
                total = total + loss.mean()
                pairs += 1
        self.center_view = self._moved(self.center_view, teacher.view_logits)
        if region:
            self.center_region = self._moved(self.center_region, teacher.region_logits)
        return total / pairs

    @torch.no_grad()
    def _moved(self, center: Tensor, logits: Tensor) -> Tensor:
        mean = logits.sum(0, keepdim=True) / len(logits)
        momentum = self.config.center_momentum
        return center * momentum + mean * (1 - momentum)


class PlainStep:
    """Student, teacher, objective and optimizer, and the step over them.

    Args:
        config: configuration of the run.
        device: device of networks, objective and optimizer.
        dtype: precision of autocast, which the published code applies to networks and objective; float32: no autocast.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        networks = [plainly(network).to(device) for network in build_student_teacher(config)]
        self.student: nn.Module
        self.teacher: nn.Module
        self.student, self.teacher = networks
        self.objective: nn.Module = PlainObjective(config).to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student))
        self.scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None

    def __call__(self, crops: list[Tensor], at: ScheduleValues) -> float:
        """Run one step and return the loss."""
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = at.lr
            if number == 0:
                group["weight_decay"] = at.weight_decay
        crops = [crop.to(self.device, non_blocking=True) for crop in crops]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            teacher_out = self.teacher(crops[:2])
            student_out = self.student(crops)
            loss = self._loss(student_out, teacher_out, at)
        if not math.isfinite(loss.item()):
            sys.exit(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
        self._wait()
        self._clip(at)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            m = at.teacher_momentum
            for of_student, of_teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                of_teacher.data.mul_(m).add_((1 - m) * of_student.detach().data)
        self._wait()
        return loss.item()

    def _loss(self, student: Any, teacher: Any, at: ScheduleValues) -> Tensor:
        loss: Tensor = self.objective(student, teacher, at.teacher_temp)
        return loss

    def _clip(self, at: ScheduleValues) -> None:
        """Clip the gradients, and cancel those of the prototypes in the first epochs."""
        for p in self.student.parameters():
            if p.grad is not None:
                norm = p.grad.data.norm(2)
                factor = self.config.optimizer.clip_grad / (norm.item() + 1e-6)
                if factor < 1:
                    p.grad.data.mul_(factor)
        if at.epoch < self.config.optimizer.freeze_last_layer_epochs:
            for name, p in self.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
