"""The progress of a run: the part of its state that is neither network nor optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """How far the run has come.

    Attributes:
        step: steps done.
        images: images trained on.
        seconds: time spent in the training loop.
        resumes: the steps from which the run was resumed.
        nonfinite: the most recent steps whose loss or gradient was not finite.
        lr_scale: factor of the learning rate; below 1 after a rollback.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    resumes: list[int] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)
    lr_scale: float = 1.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
