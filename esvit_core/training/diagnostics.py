"""Diagnostics of student and teacher over one global batch, by the names that they have in the log.

Each process measures its own outputs (:class:`BatchStatistics`) as sums, so that the sum of the processes is that of the
global batch; only the effective rank needs rows of all processes side by side.

Measuring draws no random numbers and changes nothing that the training uses. It is made for every few steps: wide
softmaxes are taken of a sample of the rows, and a chunk of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels.chunked_softmax import rows_per_chunk, softmax_and_log_sum
from esvit_core.losses.blockwise import Logits
from esvit_core.losses.objective import Objective
from esvit_core.losses.region import match_crops
from esvit_core.models.lazy_logits import LazyLogits
from esvit_core.models.multicrop import NetworkOutput

SAMPLED_ROWS = 256  # of one process's views or regions: the mean of these tells enough, of all of them costs a step
_BLOCK_VALUES = 1 << 24  # of the teacher's logits of a few images: 256 rows of 65,536 make an efficient product
RANKED_ROWS = 512  # over all processes; their singular values take time with the cube of it


@dataclass(frozen=True)
class TaskDiagnostics:
    """Of the view task, whose rows are views, or of the region task, whose rows are regions.

    Attributes:
        entropy: of the teacher's mean distribution, nats. log K when all prototypes are used alike, 0 when one takes
            everything.
        kl: mean divergence of the teacher's distributions from their mean, nats: what it tells of an image or of a
            region. 0 when it says the same of all.
        student_kl: mean KL(teacher || student) between the two global crops of an image, at their temperatures, nats.
            Regions are compared with their best match, as in the loss; the loss is this plus the target's entropy, so
            this is what of it the student can still win. None with mixup, where targets are mixed.
        prototypes: how many are the teacher's first choice somewhere in the batch, 1 to K. All of its views and
            regions are looked at, so a larger batch shows more of them.
        center_norm: Euclidean norm of the center, in units of the logits.
    """

    entropy: float
    kl: float
    student_kl: float | None
    prototypes: int
    center_norm: float


@dataclass(frozen=True)
class Diagnostics:
    """Of one global batch.

    Attributes:
        view, region: of the two tasks; a view-only run has no region task.
        mutual_matches: share of the student's regions whose best match in the teacher's other global crop has them as
            its best match in turn, 0 to 1.
        feature_std: standard deviation of the teacher's unit view features, over all dimensions together: 0 when
            they are all alike, 1 when they point in all directions.
        feature_rank: effective rank of the teacher's view features, see :func:`effective_rank`.
    """

    view: TaskDiagnostics
    region: TaskDiagnostics | None
    mutual_matches: float | None
    feature_std: float
    feature_rank: float

    def figures(self) -> dict[str, float | int]:
        """By their names in the log, such as ``entropy_view``, without those not measured."""
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
    """What one process measures of its share of the batch; of its last micro-batch, where it works off several.

    Args:
        student, teacher: outputs of the step for V and 2 crops of B images, the global crops first.
        objective: its centers have taken in the teacher's logits of the step.
        teacher_temp: tau_t of the step.
        mixed: whether the student's images are mixed, which leaves out its divergence.
        processes: that train.

    Attributes:
        sums: means over this share, and 1, all times B, to be added up (or averaged) over the processes.
        features: view features, (rows, D), to be joined; equally many of each process, filled up with zeros.
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
        self.features = F.pad(features, (0, 0, 0, rows - len(features)))  # zeros have no part in the effective rank

    def diagnostics(self) -> Diagnostics:
        """Of ``sums`` and ``features`` as they are now, before or after the processes have joined theirs."""
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
    """RankMe (Garrido et al., 2023, equation 1): over how many directions the features are spread.

    exp of the entropy of the singular values, scaled to the sum one, of the features as they are, not centered. It is
    taken from the eigenvalues of the Gram matrix of the smaller side, in float64 on the processor. Like the rank it
    cannot exceed the number of rows: figures compare between batches of one size.

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
    """What is averaged over the processes for one task.

    Args:
        match: for each student row of the global crops the teacher's row, (2 * B * regions,).

    Returns:
        Mean distribution, (K,), mean entropy and mean divergence, (1,), first choices, (K,), norm of the center, (1,).
    """
    mean, chosen = torch.zeros_like(center[0]), torch.zeros_like(center[0])
    entropy, divergence = center.new_zeros(1), center.new_zeros(1)
    stride = _stride(len(match), regions)
    if isinstance(student_logits, LazyLogits):
        student_logits = student_logits.converted()
    for rows in _blocks(len(match), regions, len(mean), match.device):
        teacher = teacher_logits[rows]  # once: they may be a product, which takes as long as all the rest
        _mark_first_choices(chosen, teacher, center)
        sampled = rows[rows % stride == 0]
        here = torch.searchsorted(rows, torch.cat((sampled, match[sampled])))
        needed, where = here.unique(return_inverse=True)
        own, matched = where[: len(sampled)], where[len(sampled) :]
        p, entropies = _sharpened(teacher, needed, center, teacher_temp)
        del teacher  # before the student's are made: they are wide
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
    """From which row to the next, where at most :data:`SAMPLED_ROWS` of ``count`` are looked at."""
    stride = max(1, math.ceil(count / SAMPLED_ROWS))
    while math.gcd(stride, regions) > 1:  # else it would meet some places of the map only
        stride += 1
    return stride


def _blocks(count: int, regions: int, prototypes: int, device: torch.device) -> Iterator[Tensor]:
    """The rows, in order, of a few images in both global crops: matches never leave a block."""
    crops = torch.arange(count, device=device).view(2, -1)
    for block in crops.split(regions * max(1, _BLOCK_VALUES // (2 * regions * prototypes)), dim=1):
        yield block.flatten()


def _matches(student: NetworkOutput, teacher: NetworkOutput) -> tuple[Tensor, Tensor]:
    """Of the T regions of each global crop of the student: the teacher's row matched to it, and whether mutually.

    Returns:
        Both (2 * B * T,).
    """
    assert student.region_features is not None and teacher.region_features is not None
    queries, keys = student.region_features[: len(teacher.region_features)], teacher.region_features
    T = teacher.regions_per_crop[0]
    there = torch.cat(match_crops(queries, keys, [T, T], T)).flatten()
    back = torch.cat(match_crops(keys, queries, [T, T], T)).flatten()
    return there, back[there] == torch.arange(len(there), device=there.device)


def _mark_first_choices(chosen: Tensor, logits: Tensor, center: Tensor) -> None:
    """Set ``chosen`` (K,) to 1 for each prototype that some row of the logits (r, K) likes best."""
    for chunk in logits.split(rows_per_chunk(logits)):
        chosen[(chunk - center).argmax(-1)] = 1.0


def _sharpened(logits: Tensor, rows: Tensor, center: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """The teacher's distributions in these rows of the logits, (r, K), and their entropies, (r,)."""
    p, entropies = center.new_empty(len(rows), center.shape[1]), center.new_empty(len(rows))
    step = rows_per_chunk(logits)
    for chunk, out, entropy in zip(rows.split(step), p.split(step), entropies.split(step), strict=True):
        z = (logits[chunk] - center).mul_(1 / temp)
        _, log_sum = softmax_and_log_sum(z, out)
        torch.sub(log_sum, torch.linalg.vecdot(z, out), out=entropy)
    return p, entropies


def _cross_entropy(logits: Tensor, targets: Tensor, matched: Tensor, temp: float) -> Tensor:
    """Sum of the cross-entropies of the student's logits (r, K) with their matched targets, (1,)."""
    total, step = targets.new_zeros(1), rows_per_chunk(logits)
    for chunk, rows in zip(logits.split(step), matched.split(step), strict=True):
        z = chunk.to(targets.dtype) * (1 / temp)
        total += (softmax_and_log_sum(z)[1] - torch.linalg.vecdot(z, targets[rows])).sum()
    return total
