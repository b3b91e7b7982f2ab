"""Diagnostics of student and teacher over one global batch.

Each process computes sums over its own outputs (:class:`BatchStatistics`), which add up to those of the global batch;
only the effective rank needs the rows of all processes.

Diagnostics draw no random numbers and change nothing that the training uses. They are meant for every few steps: wide
softmaxes are computed for a sample of the rows, one chunk at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels.chunked_softmax import rows_per_chunk, softmax_and_log_sum
from esvit_core.losses.objective import Objective
from esvit_core.losses.region import match_crops
from esvit_core.models.lazy_logits import Logits
from esvit_core.models.multicrop import NetworkOutput

SAMPLED_ROWS = 256  # views or regions per process: a mean over all of them would take as long as a step
_BLOCK_VALUES = 1 << 24  # teacher logits computed together: 256 rows of 65,536 make an efficient matrix product
RANKED_ROWS = 512  # over all processes; the time for singular values grows with the cube of it


@dataclass(frozen=True)
class TaskDiagnostics:
    """Diagnostics of the view task, whose rows are views, or of the region task, whose rows are regions.

    Attributes:
        entropy: entropy of the teacher's mean distribution, nats; log K if all prototypes are used equally, 0 if one
            prototype takes everything.
        kl: mean divergence of the teacher's distributions from their mean, nats: the information they carry about an
            image or a region; 0 if all distributions are the same.
        student_kl: mean KL(teacher || student) between the two global crops of an image, at their temperatures, nats.
            Regions are compared with their best match, as in the loss. The loss is this plus the entropy of the target,
            so this is the part that the student can still reduce. None with mixup, where targets are mixed.
        prototypes: number of prototypes that are the teacher's first choice in some row of the batch, 1 to K. It counts
            all views and regions, so it grows with the batch.
        center_norm: Euclidean norm of the center, in units of the logits.
    """

    entropy: float
    kl: float
    student_kl: float | None
    prototypes: int
    center_norm: float


@dataclass(frozen=True)
class Diagnostics:
    """Diagnostics of one global batch.

    Attributes:
        view, region: of the two tasks; a view-only run has no region task.
        mutual_matches: share of the student's regions whose match is mutual: the region is in turn the best match of
            its best match in the teacher's other global crop, 0 to 1.
        feature_std: standard deviation of the teacher's unit view features, over all dimensions together: 0 if all
            features are equal, 1 if they point in all directions.
        feature_rank: effective rank of the teacher's view features, see :func:`effective_rank`.
    """

    view: TaskDiagnostics
    region: TaskDiagnostics | None
    mutual_matches: float | None
    feature_std: float
    feature_rank: float

    def figures(self) -> dict[str, float | int]:
        """Return the values by their names in the log, such as ``entropy_view``, without those not measured."""
        named: dict[str, float | int | None] = {}
        for task, of_task in (("view", self.view), ("region", self.region)):
            if of_task is not None:
                named |= {f"{name}_{task}": value for name, value in asdict(of_task).items()}
        named |= {
            "mutual_matches": self.mutual_matches,
            "feature_std": self.feature_std,
            "feature_rank": self.feature_rank,
        }
        return {name: value for name, value in named.items() if value is not None}


class BatchStatistics:
    """Statistics of one process over its share of the batch; of the last micro-batch, if there are several.

    Args:
        student, teacher: outputs of the step for V and 2 crops of B images, the global crops first.
        objective: its centers have been updated with the teacher's logits of the step.
        teacher_temp: tau_t of the step.
        mixed: whether the student's images are mixed; its divergence is then left out.
        processes: number of training processes.

    Attributes:
        sums: means over this share, and 1, all times B; to be summed (or averaged) over the processes.
        features: view features, (rows, D), to be concatenated over the processes; the same number of rows in each,
            padded with zeros.
    """

    @torch.no_grad()
    def __init__(
        self,
        student: NetworkOutput,
        teacher: NetworkOutput,
        objective: Objective,
        teacher_temp: float,
        mixed: bool = False,
        processes: int = 1,
    ) -> None:
        assert teacher.view_features is not None
        temps = objective.student_temp, teacher_temp
        B = len(teacher.view_logits) // 2
        other_crop = torch.arange(2 * B, device=teacher.view_logits.device).roll(B)
        center = objective.center_view.value
        parts = [center.new_ones(1), F.normalize(teacher.view_features.float(), dim=-1).mean(0)]  # (1,), (D,)
        parts += _task(student.view_logits, teacher.view_logits, other_crop, 1, center, *temps)
        if objective.center_region is not None:
            assert student.region_logits is not None and teacher.region_logits is not None
            match, mutual = _matches(student, teacher)
            T, center = teacher.regions_per_crop[0], objective.center_region.value
            parts += _task(student.region_logits, teacher.region_logits, match, T, center, *temps)
            parts.append(mutual.float().mean().reshape(1))
        self._sizes, self._mixed = [len(part) for part in parts], mixed
        self.sums = B * torch.cat(parts)
        rows = max(1, RANKED_ROWS // processes)
        features = teacher.view_features[:rows].float()
        self.features = F.pad(features, (0, 0, 0, rows - len(features)))  # zeros do not change the effective rank

    def diagnostics(self) -> Diagnostics:
        """Return the diagnostics of the current ``sums`` and ``features``: of one process, or of all after a reduction."""
        weight, unit_feature, *parts = self.sums.double().cpu().split(self._sizes)
        parts = [part / weight for part in parts]
        has_regions = len(parts) > _TASK_PARTS
        variance = 1.0 - float((unit_feature / weight).square().sum())  # of unit vectors, in all: 1 - |mean|^2
        return Diagnostics(
            view=_task_diagnostics(*parts[:_TASK_PARTS], mixed=self._mixed),
            region=_task_diagnostics(*parts[_TASK_PARTS:-1], mixed=self._mixed) if has_regions else None,
            mutual_matches=float(parts[-1]) if has_regions else None,
            feature_std=math.sqrt(max(0.0, variance)),
            feature_rank=effective_rank(self.features[self.features.any(-1)]),
        )


def effective_rank(features: Tensor) -> float:
    """Effective rank RankMe (Garrido et al., 2023, equation 1): the number of directions over which features spread.

    It is exp of the entropy of the singular values, normalized to sum to one, of the features without centering,
    computed from the eigenvalues of the Gram matrix of the smaller side, in float64 on the CPU. Like the rank it cannot
    exceed the number of rows, so values are comparable only between batches of the same size.

    Args:
        features: (N, D).

    Returns:
        1 (one direction) to min(N, D); 0 if all features are 0; NaN if one is not finite.
    """
    z = features.cpu().double()
    if not z.isfinite().all():
        return math.nan
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    return float(torch.special.entr(singular / total).sum().exp()) if total > 0 else 0.0


def _task(
    student_logits: Logits,
    teacher_logits: Logits,
    match: Tensor,
    regions: int,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, ...]:
    """Compute the statistics of one task that are averaged over the processes.

    Args:
        match: the teacher row matched to each student row of the global crops, (2 * B * regions,).

    Returns:
        Mean distribution, (K,), mean entropy and mean divergence, (1,), first choices, (K,), norm of the center, (1,).
    """
    mean, chosen = torch.zeros_like(center[0]), torch.zeros_like(center[0])
    entropy, divergence = center.new_zeros(1), center.new_zeros(1)
    stride = _stride(len(match), regions)
    student_logits = student_logits.detach()
    for rows in _blocks(len(match), regions, len(mean), match.device):
        teacher = teacher_logits[rows]  # once: computing lazy logits takes as long as the rest
        _mark_first_choices(chosen, teacher, center)
        sampled = rows[rows % stride == 0]
        positions = torch.searchsorted(rows, torch.cat((sampled, match[sampled])))
        needed, where = positions.unique(return_inverse=True)
        own, matched = where[: len(sampled)], where[len(sampled) :]
        p, entropies = _sharpened(teacher, needed, center, teacher_temp)
        del teacher  # frees the wide logits before the student's are computed
        mean += torch.zeros_like(entropies).index_fill_(0, own, 1.0) @ p
        entropy += entropies[own].sum()
        divergence += _cross_entropy(student_logits[sampled], p, matched, student_temp) - entropies[matched].sum()
    count = -(-len(match) // stride)
    return mean / count, entropy / count, divergence / count, chosen, center.norm().reshape(1)


_TASK_PARTS = 5


def _task_diagnostics(
    distribution: Tensor, entropy: Tensor, divergence: Tensor, chosen: Tensor, center_norm: Tensor, *, mixed: bool
) -> TaskDiagnostics:
    of_mean = float(torch.special.entr(distribution).sum())
    return TaskDiagnostics(
        entropy=of_mean,
        kl=max(0.0, of_mean - float(entropy)),
        student_kl=None if mixed else float(divergence),
        prototypes=int(chosen.count_nonzero()),
        center_norm=float(center_norm),
    )


def _stride(count: int, regions: int) -> int:
    """Return the step between sampled rows, so that at most :data:`SAMPLED_ROWS` of ``count`` rows are sampled."""
    stride = max(1, math.ceil(count / SAMPLED_ROWS))
    while math.gcd(stride, regions) > 1:  # otherwise only some positions of the map would be sampled
        stride += 1
    return stride


def _blocks(count: int, regions: int, prototypes: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of a few images at a time, in both global crops; matches never leave a block."""
    crops = torch.arange(count, device=device).view(2, -1)
    for block in crops.split(regions * max(1, _BLOCK_VALUES // (2 * regions * prototypes)), dim=1):
        yield block.flatten()


def _matches(student: NetworkOutput, teacher: NetworkOutput) -> tuple[Tensor, Tensor]:
    """Match the T regions of each global crop of the student to rows of the teacher.

    Returns:
        The matched rows, and whether each match is mutual; both (2 * B * T,).
    """
    assert student.region_features is not None and teacher.region_features is not None
    queries, keys = student.region_features[: len(teacher.region_features)], teacher.region_features
    T = teacher.regions_per_crop[0]
    there = torch.cat(match_crops(queries, keys, [T, T], T)).flatten()
    back = torch.cat(match_crops(keys, queries, [T, T], T)).flatten()
    return there, back[there] == torch.arange(len(there), device=there.device)


def _mark_first_choices(chosen: Tensor, logits: Tensor, center: Tensor) -> None:
    """Set ``chosen`` (K,) to 1 for each prototype with the highest centered logit in some row of the logits (r, K)."""
    for chunk in logits.split(rows_per_chunk(logits)):
        chosen[(chunk - center).argmax(-1)] = 1.0


def _sharpened(logits: Tensor, rows: Tensor, center: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Return the teacher's distributions for these rows of the logits, (r, K), and their entropies, (r,)."""
    p, entropies = center.new_empty(len(rows), center.shape[1]), center.new_empty(len(rows))
    step = rows_per_chunk(logits)
    for chunk, out, entropy in zip(rows.split(step), p.split(step), entropies.split(step), strict=True):
        z = (logits[chunk] - center).mul_(1 / temp)
        _, log_sum = softmax_and_log_sum(z, out)
        torch.sub(log_sum, torch.linalg.vecdot(z, out), out=entropy)
    return p, entropies


def _cross_entropy(logits: Tensor, targets: Tensor, matched: Tensor, temp: float) -> Tensor:
    """Return the sum of the cross-entropies of the student's logits (r, K) with their matched targets, (1,)."""
    total, step = targets.new_zeros(1), rows_per_chunk(logits)
    for chunk, rows in zip(logits.split(step), matched.split(step), strict=True):
        z = chunk.to(targets.dtype) * (1 / temp)
        total += (softmax_and_log_sum(z)[1] - torch.linalg.vecdot(z, targets[rows])).sum()
    return total
