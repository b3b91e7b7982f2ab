"""The summary of a finished training, ``training/summary.json``, which also marks it as complete."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from esvit_core.errors import UserError
from esvit_core.storage import NotFound, ObjectStore, join_uri

SUMMARY = "training/summary.json"
LATEST = "training/latest"  # pointer to the newest checkpoint; defined here because its readers do not import torch


@dataclass(frozen=True)
class TrainingSummary:
    """A finished training.

    Attributes:
        steps, epochs, images: totals, without work that was lost.
        seconds: time in the training loop, without work that was lost.
        images_per_second: ``images / seconds``.
        final_loss: mean over the steps of the last line of the log.
        precision: of the networks' arithmetic.
        processes, threads: of the last attempt; threads per process.
        resumes: the steps from which the run was resumed.
        backbone: address of the published teacher.
        versions, hardware: of the last attempt.
    """

    steps: int
    epochs: int
    images: int
    seconds: float
    images_per_second: float
    final_loss: float
    precision: str
    processes: int
    threads: int
    resumes: list[int]
    backbone: str
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str | int | float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_summary(store: ObjectStore, run_uri: str) -> TrainingSummary | None:
    """Read the summary of a training; None if the training is not finished.

    Raises:
        UserError: the object is not a summary of this version.
    """
    uri = join_uri(run_uri, SUMMARY)
    try:
        value = store.get_json(uri)
    except NotFound:
        return None
    try:
        return TrainingSummary(**value)
    except TypeError as error:
        raise UserError(f"{uri}: not a training summary of this version ({error}); use a new run id") from None
