"""What a file holds of a training, under our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Teacher, student and what belongs to them, as far as they are there.

    Attributes:
        origin: what was read, for messages.
        kind: in words, such as ``published checkpoint``.
        teacher: entries of a :class:`~esvit_core.models.multicrop.MultiCropNetwork`; the only network where there is
            one only, and then perhaps without heads.
        student: the same; None where there is none.
        centers: entries of :class:`~esvit_core.losses.objective.Objective`.
        optimizer: its ``state_dict()``; parameters are numbered in the order of ``student``.
        epoch: epochs done; None where nobody knows.
        arguments: the command line of the published code, by option.
        scaler: state of the published code's gradient scaler. Training here needs none.
        passed_over: entries that are no part of a training, by name.
    """

    origin: str
    kind: str
    teacher: Weights
    student: Weights | None = None
    centers: Weights = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    epoch: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None
    passed_over: tuple[str, ...] = ()

    def has(self, part: str) -> bool:
        """Whether the teacher has the part: ``backbone``, ``head`` or ``head_dense``."""
        return any(name.startswith(f"{part}.") for name in self.teacher)


def part_of(weights: Mapping[str, Tensor], part: str) -> Weights:
    """The entries of a part, under its own names."""
    return {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
