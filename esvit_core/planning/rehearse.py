"""Run a few real training steps on noise on this machine's processors to measure their time and memory.

The steps run in as many processes and threads as the training will have, with two small numbers of images per process.
Time and memory for the full share of the batch are extrapolated linearly from the two.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from esvit_core.config import Config
from esvit_core.data.shards.reader import decode_image
from esvit_core.errors import UserError
from esvit_core.launch.launcher import divide_cores
from esvit_core.launch.signals import RENDEZVOUS_VARIABLE
from esvit_core.runs.environment import TORCH_ENVIRONMENT, device_memory
from esvit_core.torch_private import import_timm_without_dynamo

WARM_UP = 2
MAX_FLOPS = 6e11  # per step, and over all steps of a size where they are small: a few seconds on a core
MIN_STEPS, MAX_STEPS = 3, 20
# Memory of a training process outside its steps: metrics, log, store client, the checkpoint being written.
SERVICES_BYTES = 200e6
SHORT_SIDE = 375  # typical short side of ImageNet images, pixels


@dataclass(frozen=True)
class Rehearsal:
    """Measurements of the rehearsed steps.

    Attributes:
        processes: number of processes that trained together.
        threads: threads per process.
        images: images per process, the two sizes.
        seconds: time of a step with each size, including data loading.
        bytes: peak memory of a process with each size.
    """

    processes: int
    threads: int
    images: tuple[int, int]
    seconds: tuple[float, float]
    bytes: tuple[float, float]

    def seconds_of(self, images: int) -> float:
        """Extrapolated time of a step on ``images`` per process."""
        return _extrapolate(self.images, self.seconds, images)

    def bytes_of(self, images: int) -> float:
        """Extrapolated peak memory of a process with micro-batches of ``images``."""
        return SERVICES_BYTES + _extrapolate(self.images, self.bytes, images)


def _extrapolate(x: Sequence[float], y: Sequence[float], at: float) -> float:
    slope = max(0.0, (y[1] - y[0]) / max(1, x[1] - x[0]))
    return y[1] + slope * (at - x[1])


def rehearse(config: Config, flops: float) -> Rehearsal:
    """Run a few real steps of ``config`` on this machine's processors.

    Args:
        config: configuration of the run.
        flops: FLOPs per image, which limit the images of a step.

    Raises:
        UserError: a process fails.
    """
    processes, threads = divide_cores(config, use_gpus=False)
    share = config.training.largest_share(processes)
    most = min(share, config.training.max_images_per_process or share)
    larger = int(min(most, max(4, MAX_FLOPS // flops)))
    sizes = max(1, larger // 2), larger
    steps = int(min(MAX_STEPS, max(MIN_STEPS, MAX_FLOPS // (flops * larger))))
    with tempfile.TemporaryDirectory(prefix="esvit-plan-") as folder:
        recipe = Path(folder) / "config.yaml"
        recipe.write_text(config.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(recipe), str(steps), *map(str, sizes)]
        running = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # as torchrun does: Linux schedules each session fairly on a busy machine
                env={
                    **TORCH_ENVIRONMENT,
                    **os.environ,
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
                    **{"OMP_NUM_THREADS": str(threads), RENDEZVOUS_VARIABLE: folder},
                },
            )
            for rank in range(processes)
        ]
        try:
            outputs = [process.communicate()[0] for process in running]
        finally:
            for process in running:
                process.kill()
    if any(process.returncode for process in running):
        raise UserError(
            "plan: the rehearsed steps failed, see above; if this machine has too little memory for them, plan for a GPU"
        )
    found = [json.loads(text.splitlines()[-1]) for text in outputs]
    seconds, memory = (tuple(max(one[name][i] for one in found) for i in (0, 1)) for name in ("seconds", "bytes"))
    return Rehearsal(processes, threads, sizes, seconds, memory)


class Noise:
    """A dataset of coarse noise, aspect ratio 4:3, decoded from JPEG like the images of a run."""

    def __init__(self, config: Config, count: int) -> None:
        short = min(config.data.store_short_side or SHORT_SIDE, SHORT_SIDE)
        pixels = np.random.default_rng(0).integers(0, 256, (short // 8, short // 6, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(file, "JPEG", quality=90)
        self._image, self._count = file.getvalue(), count

    weights = None

    @property
    def shard_sizes(self) -> list[int]:
        return [self._count]

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> np.ndarray:
        return decode_image(self._image)


def main(recipe: str, steps: str, *sizes: str) -> None:
    """Run the steps of one process; print step time and peak memory for each number of images as JSON."""
    import_timm_without_dynamo()
    from esvit_core.data.loading.loader import TrainLoader
    from esvit_core.training.allocator import keep_freed_memory
    from esvit_core.training.distributed.processes import init_world
    from esvit_core.training.loop import training_step
    from esvit_core.training.state import apply_activation_checkpointing_, assemble_train_state, make_deterministic

    config = Config.from_yaml(Path(recipe).read_text(encoding="utf-8"))
    keep_freed_memory()
    if config.training.deterministic:
        make_deterministic()
    world = init_world(use_gpus=False)
    seconds, memory = [], []
    for images in map(int, sizes):
        batch_size = images * world.size
        training = config.training.model_copy(update={"batch_size": batch_size, "max_images_per_process": None})
        small = config.model_copy(update={"training": training})
        loader = TrainLoader(
            Noise(small, (WARM_UP + int(steps)) * batch_size), small, small.seed, world.rank, world.size
        )
        state = assemble_train_state(small, world, loader)
        if config.launch.activation_checkpointing:
            apply_activation_checkpointing_(state.student, config.model.arch)
        times, start = [], time.perf_counter()
        for batch in loader.epoch(0):
            training_step(state, batch, state.schedule_values())
            state.progress.step += 1
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        seconds.append(float(np.median(times[WARM_UP:])))
        memory.append(device_memory(world.device)["peak"])
        del state, loader
    print(json.dumps({"seconds": seconds, "bytes": memory}), flush=True)
    world.close()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(*sys.argv[1:])
