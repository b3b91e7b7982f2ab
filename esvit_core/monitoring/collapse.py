"""Diagnostics of the teacher, and the three ways in which it can collapse.

Self-distillation has trivial solutions (EsViT, section 3; DINO, section 5.3 studies them): the teacher gives every
picture the same prototype, or every picture the uniform distribution, or the backbone every picture the same
feature. Centring works against the first, sharpening against the second. All of them end the same way, the loss
flat and the features worthless, hours before anybody looks: so the run watches for them and stops with the name.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

REGION_ROWS = 512  # regions looked at per process: the mean of these tells enough, of all of them costs a step

# Healthy runs keep far from these: Swin-T starts at 10 nats, 0.5 nats and 0.7; the demo recipe stays above 2.9, 1.0
# and 0.8; without centring (centre_momentum 1) its entropy sinks to 0.7 within 250 steps.
ONE_PROTOTYPE_ENTROPY = math.log(2)  # nats: the mean distribution uses fewer than two prototypes
UNIFORM_INFORMATION = 1e-2  # nats that the distribution of a picture tells beyond the mean one
CONSTANT_FEATURE_STD = 1e-2


@dataclass(frozen=True)
class Diagnostics:
    """What the teacher's outputs look like over one global batch.

    Attributes:
        entropy_view: entropy of the mean view distribution, nats: log K when all prototypes are used alike, 0 when one is.
        kl_view: mean divergence of a picture's distribution from the mean one, nats: what it tells of the picture.
        entropy_region, kl_region: the same of the regions; None when the run has no region task.
        feature_std: spread of the unit view features, 0 (all alike) to 1 (in all directions).
    """

    entropy_view: float
    kl_view: float
    entropy_region: float | None
    kl_region: float | None
    feature_std: float

    def figures(self) -> dict[str, float]:
        """By name, without those not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class TeacherStatistics:
    """Sums over one process's outputs, in one vector so that one all-reduce joins the processes.

    Args:
        view_logits: the teacher's (2B, K).
        view_features: the teacher's (2B, D).
        region_logits: the teacher's (2B*N, K), None without the region task.
        view_centre, region_centre: (1, K), as the loss subtracts them.
        temperature: of the teacher.
    """

    def __init__(
        self,
        view_logits: Tensor,
        view_features: Tensor,
        region_logits: Tensor | None,
        view_centre: Tensor,
        region_centre: Tensor | None,
        temperature: float,
    ) -> None:
        self._K = view_logits.shape[-1]
        self._has_regions = region_logits is not None and region_centre is not None
        parts = [*_distribution(view_logits, view_centre, temperature)]
        if region_logits is not None and region_centre is not None:
            stride = max(1, region_logits.shape[0] // REGION_ROWS)
            parts += _distribution(region_logits[::stride], region_centre, temperature)
        parts.append(F.normalize(view_features.float(), dim=-1).mean(0))  # (D,)
        self.vector = torch.cat(parts)  # of means: the mean of the processes' vectors is that of the global batch

    def diagnostics(self) -> Diagnostics:
        """Of the vector as it is now, before or after it was averaged over the processes."""
        vector, K = self.vector.double().cpu(), self._K
        entropy_view, kl_view = _entropy_and_information(vector[:K], vector[K])
        rest = vector[K + 1 :]
        entropy_region = kl_region = None
        if self._has_regions:
            entropy_region, kl_region = _entropy_and_information(rest[:K], rest[K])
            rest = rest[K + 1 :]
        # Unit vectors: their variance over all dimensions is 1 - |mean|^2.
        feature_std = math.sqrt(max(0.0, 1.0 - float(rest.square().sum())))
        return Diagnostics(entropy_view, kl_view, entropy_region, kl_region, feature_std)


def _distribution(logits: Tensor, centre: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax((logits.float() - centre) / temperature, dim=-1)  # (rows, K)
    p = log_p.exp()
    return p.mean(0), -(p * log_p).sum(-1).mean().reshape(1)  # (K,), (1,)


def _entropy_and_information(mean: Tensor, mean_entropy: Tensor) -> tuple[float, float]:
    entropy = float(-(mean * mean.clamp_min(1e-30).log()).sum())
    return entropy, max(0.0, entropy - float(mean_entropy))


_ONE_PROTOTYPE = "one prototype for every picture"
_UNIFORM = "the uniform distribution for every picture"
_CONSTANT = "the same feature for every picture"
_ADVICE = {
    _ONE_PROTOTYPE: "raise objective.teacher_temp and objective.warmup_teacher_temp, "
    "lower objective.centre_momentum or optimizer.lr",
    _UNIFORM: "lower objective.teacher_temp and objective.warmup_teacher_temp, or lower optimizer.lr",
    _CONSTANT: "lower optimizer.lr, or raise optimizer.teacher_momentum",
}


def _signs(diagnostics: Diagnostics) -> dict[str, bool]:
    one_prototype = diagnostics.entropy_view < ONE_PROTOTYPE_ENTROPY
    return {
        _ONE_PROTOTYPE: one_prototype,
        _UNIFORM: not one_prototype and diagnostics.kl_view < UNIFORM_INFORMATION,
        _CONSTANT: diagnostics.feature_std < CONSTANT_FEATURE_STD,
    }


class CollapseWatch:
    """Tells a collapse from a bad moment: the same sign at every measurement over ``patience`` steps.

    Args:
        patience: steps (``training.collapse_patience``).
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._since: dict[str, int] = {}

    def observe(self, step: int, diagnostics: Diagnostics) -> str | None:
        """Note the measurement at ``step``; the reason to stop and what to change, or None."""
        for sign, seen in _signs(diagnostics).items():
            if not seen:
                self._since.pop(sign, None)
                continue
            since = self._since.setdefault(sign, step)
            if step - since >= self.patience:
                measured = ", ".join(f"{name} {value:.3g}" for name, value in diagnostics.figures().items())
                return f"the teacher has collapsed: {sign} from step {since} to {step} ({measured}); {_ADVICE[sign]}"
        return None

    def state_dict(self) -> dict[str, int]:
        return dict(self._since)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._since = dict(state)
