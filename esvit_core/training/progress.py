"""How far a run is: the part of its state that is neither network nor optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Position:
    """How far the run is.

    Attributes:
        step: steps done.
        images: images trained on.
        seconds: spent in the loop.
        resumes: the steps from which it went on.
        nonfinite: the latest steps that were not finite.
        lr_scale: factor of the learning rate; below 1 after a step that was not finite has led back.
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
