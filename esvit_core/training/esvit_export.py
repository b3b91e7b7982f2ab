"""Export a run's newest checkpoint in the format of the published code (microsoft/esvit), which can resume from it.

Such a file contains student, teacher, heads, centers and optimizer, not only the backbone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.runs.run import Run
from esvit_core.storage.atomic_write import atomic_write, require_absent
from esvit_core.training.checkpoint import newest_checkpoint
from esvit_core.weights.esvit_checkpoint import read_published_checkpoint, write_published_checkpoint
from esvit_core.weights.formats.export import Exported, size_of

SUFFIX = ".pth"


def export_published(run: Run, out: Path) -> Exported:
    """Write the newest checkpoint of a run in the published format, read it back safely, and compare every bit.

    Args:
        run: the run to export.
        out: the ``.pth`` file; it is written atomically.

    Raises:
        UserError: the run has no valid checkpoint; ``out`` exists or cannot be written.
    """
    require_absent(out, (SUFFIX,))
    restored = newest_checkpoint(run.store, run.uri)
    if restored is None:
        raise UserError(f"run {run.uri}: it has no checkpoint; format published needs one, with student and optimizer")
    train = Manifest.read(run.store, run.at("data")).splits["train"]
    epoch = restored.step // (train.epoch_samples // run.config.training.batch_size)
    with atomic_write(out) as written:
        write_published_checkpoint(written, restored.states, run.config, epoch)
        _compare(written, restored.states, out)
    message = f"step {restored.step:,}, epoch {epoch}: student, teacher and centers were read back bit for bit"
    usage = [
        "import torch",
        f"checkpoint = torch.load({str(out)!r}, weights_only=False)  # as the published code does",
    ]
    return Exported(out, size_of(out), message, usage)


def _compare(path: Path, states: dict[str, Any], out: Path) -> None:
    snapshot = read_published_checkpoint(path)
    for name, weights in (
        ("student", snapshot.student),
        ("teacher", snapshot.teacher),
        ("objective", snapshot.centers),
    ):
        exported = weights or {}
        if exported.keys() != states[name].keys() or not all(
            torch.equal(exported[k], states[name][k]) for k in exported
        ):
            raise UserError(
                f"format published: {name} was read back different from what was written; {out} was not created"
            )
