"""Content of a weight file, under this project's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Teacher, student and training state, as far as a file contains them.

    Attributes:
        origin: source of the weights, for messages.
        kind: kind of file, such as ``published checkpoint``.
        teacher: entries of a :class:`~esvit_core.models.multicrop.MultiCropNetwork`; if the file contains one network, it
            is this one, possibly without heads.
        student: likewise; None if there is none.
        centers: entries of :class:`~esvit_core.losses.objective.Objective`.
        optimizer: ``state_dict()`` of the optimizer; parameters are numbered in the order of ``student``.
        epoch: completed epochs; None if unknown.
        arguments: command line of the published code, by option.
        scaler: state of the published code's gradient scaler, which this project does not use.
        ignored: names of entries that are not part of a training.
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
    ignored: tuple[str, ...] = ()

    def has(self, part: str) -> bool:
        """Return whether the teacher has the part ``backbone``, ``head`` or ``head_dense``."""
        return any(name.startswith(f"{part}.") for name in self.teacher)


def part_of(weights: Mapping[str, Tensor], part: str) -> Weights:
    """Return the entries of a part, without the prefix."""
    return {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
