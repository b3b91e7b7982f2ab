"""The networks among which the recipe ``auto`` chooses, and how fast they train.

Operations and bytes are those that ``esvit plan`` counts (``tests/test_auto.py`` compares them). The speed of a processor
follows from measured steps, that of a GPU from a published training; both are scaled to the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Device = Literal["cpu", "cuda"]

MEASURED_CORES = 2  # threads with which the speeds of the table were measured
# Seconds of a step that do not depend on the batch: the micro Swin took 0.157 s with 16 images and 0.40 s with 64, on two
# threads of an AMD EPYC with AVX-512 bf16, 2026-11-30.
CPU_STEP_SECONDS = 0.08
MAX_CORES = 16  # the speed is assumed to grow with the cores up to here
FLOAT32_SPEED = {
    "cpu": 0.6,
    "cuda": 0.25,
}  # of that in bfloat16; CPU: measured (docs/performance.md), GPU: an assumption
# Peak of dense bfloat16 (Volta and Turing: float16) products by compute capability, FLOP/s per multiprocessor: data sheets
# of V100, T4, A100, RTX 3090, RTX 4090, H100 and B200.
_PEAK = {70: 1.56e12, 75: 1.63e12, 80: 2.89e12, 86: 0.87e12, 89: 1.29e12, 90: 7.49e12, 100: 15.2e12}
# facebookresearch/dino, README: ViT-S/16, 100 epochs of ImageNet-1K in 1.75 days on 8 GPUs, V100 in the paper: 106 images/s
# and GPU, at 114 GFLOPs per image a tenth of the peak.
_SHARE_OF_PEAK = 0.1
PROCESS_BYTES = 0.72 * 2**30  # interpreter and libraries (docs/performance.md)


@dataclass(frozen=True)
class Network:
    """A network with its crops.

    Attributes:
        name: description for the user.
        model: values of the section ``model``.
        side: side of a global crop, pixels.
        local: side and number of the local crops.
        head: width of the hidden layers of the heads, and of the bottleneck.
        prototypes: maximum number of prototypes.
        batch: batch size, if there are images and memory enough.
        lr: learning rate per 256 images.
        flops: FLOPs per image and step; of the last one with the region task, of the others without.
        image_bytes: memory per image of a batch: in bfloat16 on a CPU, in bfloat16 on a GPU. float32 takes twice that.
        fixed_bytes: memory of a process that does not depend on the batch, without interpreter and libraries.
        min_side: smallest median short side of the images for which the network is chosen, pixels.
        min_samples: number of samples, images times epochs, below which a smaller network is chosen.
        cpu_flops: FLOP/s of a training in bfloat16 with two threads.
        cpu_source: where ``cpu_flops`` comes from.
    """

    name: str
    model: dict[str, Any]
    side: int
    local: tuple[int, int]
    head: tuple[int, int]
    prototypes: int
    batch: int
    lr: float
    flops: float
    image_bytes: tuple[float, float]
    fixed_bytes: float
    min_side: int
    min_samples: float
    cpu_flops: float
    cpu_source: str


_SWIN_TINY = {"arch": "swin_tiny_w7", "drop_path": 0.1}
_ESTIMATED = "interpolated between the measured speeds of the micro Swin and of Swin-T"

#: From the smallest to the largest.
NETWORKS = (
    Network(
        name="micro Swin, two stages",
        model={
            **{"arch": "swin", "patch_size": 8, "embed_dim": 96, "depths": [2, 4], "num_heads": [3, 6]},
            **{"window_size": 4, "drop_path": 0.0},
        },
        side=64,
        local=(32, 4),
        head=(512, 128),
        prototypes=2048,
        batch=64,
        lr=0.001,
        flops=1.04e9,
        image_bytes=(2.3e6, 3.2e6),
        fixed_bytes=0.06e9,
        min_side=0,
        min_samples=0,
        cpu_flops=133e9,
        cpu_source="measured: 128 images/s on two threads of an AMD EPYC with AVX-512 bf16, docs/cifar10.md",
    ),
    Network(
        name="small Swin, three stages",
        model={
            **{"arch": "swin", "patch_size": 4, "embed_dim": 64, "depths": [2, 2, 6], "num_heads": [2, 4, 8]},
            **{"window_size": 6, "drop_path": 0.0},
        },
        side=96,
        local=(48, 4),
        head=(512, 128),
        prototypes=4096,
        batch=128,
        lr=0.001,
        flops=6.85e9,
        image_bytes=(14.1e6, 19.8e6),
        fixed_bytes=0.14e9,
        min_side=64,
        min_samples=5e5,
        cpu_flops=180e9,
        cpu_source=_ESTIMATED,
    ),
    Network(
        name="Swin-T window 7 on crops of half the published side",
        model=_SWIN_TINY,
        side=112,
        local=(56, 6),
        head=(2048, 256),
        prototypes=16384,
        batch=256,
        lr=0.0005,
        flops=31.8e9,
        image_bytes=(38.8e6, 77.0e6),
        fixed_bytes=0.9e9,
        min_side=64,
        min_samples=2e6,
        cpu_flops=220e9,
        cpu_source=_ESTIMATED,
    ),
    Network(
        name="Swin-T window 7, the published recipe's network and crops",
        model=_SWIN_TINY,
        side=224,
        local=(96, 8),
        head=(2048, 256),
        prototypes=65536,
        batch=512,
        lr=0.0005,
        flops=141.7e9,
        image_bytes=(142e6, 281e6),
        fixed_bytes=1.93e9,
        min_side=160,
        min_samples=5e6,
        cpu_flops=280e9,
        cpu_source="measured: 8 images in 4.04 s on two threads of an AMD EPYC with AVX-512 bf16, docs/performance.md",
    ),
)


def images_per_second(
    network: Network,
    device: Device,
    *,
    batch: int,
    cores: int,
    bfloat16: bool,
    devices: int = 1,
    multiprocessors: int = 0,
    capability: int = 0,
) -> tuple[float, str]:
    """Estimate the speed of a training, and say where the estimate comes from.

    Args:
        network: network and crops.
        device: ``cpu`` or ``cuda``.
        batch: batch size. On a CPU, small ones are slower than the network's own, with which it was measured.
        cores: cores of the machine.
        bfloat16: whether the networks compute in bfloat16.
        devices: number of GPUs.
        multiprocessors: streaming multiprocessors of a GPU.
        capability: compute capability of a GPU, such as 90 for 9.0.

    Returns:
        Images per second of all devices together, and the provenance in a few words.
    """
    slower = 1.0 if bfloat16 else FLOAT32_SPEED[device]
    if device == "cpu":
        seconds = network.flops * MEASURED_CORES / (network.cpu_flops * min(cores, MAX_CORES) * slower)
        seconds += CPU_STEP_SECONDS * max(0.0, 1 / batch - 1 / network.batch)
        slow = f", slower with a batch of {batch}" if batch < network.batch else ""
        return 1 / seconds, network.cpu_source + slow
    known = [found for found in sorted(_PEAK) if found <= capability]
    speed = devices * multiprocessors * _PEAK[known[-1] if known else 70] * _SHARE_OF_PEAK
    source = "assumed: a tenth of the GPU's peak, as in the published training of DINO's ViT-S/16; not measured"
    return speed * slower / network.flops, source


def network_like(
    *,
    name: str,
    model: dict[str, Any],
    side: int,
    flops: float,
    image_bytes: float,
    fixed_bytes: float,
    local: tuple[int, int] | None = None,
) -> Network:
    """Describe a network that is not among the ones to choose from; the rest is that of the one with the nearest crops.

    Args:
        name: description for the user.
        model: values of the section ``model``.
        side: side of a global crop, pixels.
        flops: FLOPs per image and step; of the last one with the region task, of the others without.
        image_bytes: memory per image of a batch in bfloat16, bytes.
        fixed_bytes: memory that does not depend on the batch, bytes.
        local: side and number of the local crops; None: those of the other network.
    """
    like = max((each for each in NETWORKS if each.side <= side), key=lambda each: each.side, default=NETWORKS[0])
    return replace(
        like,
        name=name,
        model=model,
        side=side,
        local=local or like.local,
        flops=flops,
        image_bytes=(image_bytes, image_bytes),
        fixed_bytes=fixed_bytes,
    )
