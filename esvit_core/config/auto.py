"""The recipe ``auto``: choose network, crops, epochs, batch and the rest from the data and the machine.

:func:`choose` is a pure function of facts that stay the same from one start of a run to the next, so that the same command
finds and resumes the same run: it measures nothing. docs/recipes.md has its rules as a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esvit_core.config.auto_choice import Choice, Row, count
from esvit_core.config.auto_networks import NETWORKS, PROCESS_BYTES, Device, Network, images_per_second
from esvit_core.config.recipes import domain_names
from esvit_core.config.rounding import power_of_two, two_digits
from esvit_core.errors import UserError

AUTO = "auto"
MIN_IMAGES = 50
DEFAULT_HOURS: dict[Device, float] = {"cpu": 1.0, "cuda": 8.0}
TRAINING_SHARE = 0.8  # of the hours; the rest is for preparation and evaluation, an assumption
MIN_PASSES = 10  # epochs, for which some images are left out if the time does not suffice
MAX_EPOCHS, MAX_EPOCHS_FROM_WEIGHTS = 400, 100
MIN_STEPS = 1500  # the run of docs/cifar10.md, which gained six points, had 1,560
LONG_STEPS = 50_000  # from here on the published temperatures and the region task are used
LAYER_DECAY = 0.9  # of runs from weights, an assumption
MEMORY_SHARE = 0.8
_DISAGREEMENT = 0.2  # share of held-out images on which two backbones disagree, an assumption


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        images: number of images, train and held-out together.
        held_out: number of images that the source itself holds out; None: it does not.
        labelled: whether there are classes.
        short_side: median of the shorter sides, pixels.
        device: what trains.
        devices: number of GPUs; 1 on a CPU.
        memory: memory of one GPU, or of the machine, bytes.
        cores: cores of the machine.
        bfloat16: whether the device computes bfloat16 natively.
        hours: time for the whole run; None: the default of the device.
        multiprocessors: streaming multiprocessors of a GPU.
        capability: compute capability of a GPU, such as 90 for 9.0.
    """

    images: int
    held_out: int | None
    labelled: bool
    short_side: int
    device: Device
    devices: int
    memory: float
    cores: int
    bfloat16: bool
    hours: float | None = None
    multiprocessors: int = 0
    capability: int = 0


def split_recipe(recipe: str) -> tuple[str | None, float | None] | None:
    """Split ``auto``, ``auto:hours=8``, or the same with a recipe for a kind of images, such as ``grey:hours=8``.

    Returns:
        The recipe for a kind of images, None with ``auto``; the hours, None if there are none. None: it is another recipe.

    Raises:
        UserError: what follows the colon is not a number of hours.
    """
    name, colon, rest = recipe.partition(":")
    if name != AUTO and name not in domain_names():
        return None
    key, _, text = rest.partition("=")
    try:
        hours = float(text) if colon else None
    except ValueError:
        hours = 0.0
    if colon and (key.strip() != "hours" or not hours or not 0 < hours < 10_000):
        raise UserError(f"recipe {recipe}: expected {name}, or {name}:hours=H with a number of hours")
    return (None if name == AUTO else name), hours


def require_enough(images: int, source: str) -> None:
    """Return if there are images enough to train on some and to hold out others.

    Raises:
        UserError: there are fewer than 50.
    """
    if images < MIN_IMAGES:
        raise UserError(
            f"{source}: {count(images, 'image')}; a training needs at least {MIN_IMAGES}; add images, or use a backbone that is "
            "trained already (`esvit import`, `esvit embed`)"
        )


def choose(
    facts: Facts,
    network: Network | None = None,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    from_weights: bool = False,
) -> Choice:
    """Choose a recipe.

    Args:
        facts: data and machine.
        network: the network, if the user or the initial weights determine it.
        epochs: number of epochs, if the user sets it; what depends on it follows.
        batch_size: batch size, if the user sets it; what depends on it follows.
        from_weights: whether the run starts from weights, which are then protected: a lower learning rate, a shorter
            warm-up, a slower teacher, and fewer epochs.
    """
    hours = facts.hours or DEFAULT_HOURS[facts.device]
    fraction = _held_out_fraction(facts.images)
    held_out = round(fraction * facts.images) if facts.held_out is None else facts.held_out
    train = max(1, facts.images - held_out)
    reason_network = "given, or that of the initial weights"
    if network is None:
        network, reason_network = _network(facts, train)
    most = MAX_EPOCHS_FROM_WEIGHTS if from_weights else MAX_EPOCHS
    used, chosen_epochs, batch, reason_batch = _schedule(facts, network, train, most, epochs, batch_size)
    rate, source = _rate(facts, network, batch)
    memory, micro_batch = _memory(facts, network, batch, _processes(facts))
    steps = max(1, used // batch) * chosen_epochs
    limit = None if used == train else round(used * facts.images / train)
    chosen = _Chosen(facts, network, used, chosen_epochs, batch, steps, from_weights)
    values = chosen.values(fraction, limit, micro_batch)
    shown = round(held_out * used / train)
    about = "about " if facts.held_out is None or used < train else ""  # each image is drawn by its name
    rows = (
        Row("network", network.name, reason_network, "model.arch"),
        Row("crops", _crops(network), _reason_crops(facts), "augment"),
        Row(
            "images",
            f"{about}{used:,} of {facts.images:,} for training",
            _reason_images(used, train),
            "data.max_images",
        ),
        Row(
            "epochs",
            f"{chosen_epochs:,}, {steps:,} steps",
            _reason_epochs(epochs, chosen_epochs, most, hours),
            "training",
        ),
        Row("batch", _batch_text(batch, micro_batch), reason_batch, "training"),
        *chosen.rows(values),
        Row("held out", f"{about}{shown:,} images", _reason_held_out(facts, shown), "data.val_fraction"),
    )
    return Choice(values, rows, chosen_epochs * used / rate / TRAINING_SHARE, memory, rate, source)


def allowed_samples(facts: Facts, network: Network, batch: int | None = None) -> float:
    """Return how many samples, images times epochs, a training on this machine takes in the given time.

    Args:
        batch: batch size; None: the network's.
    """
    hours = facts.hours or DEFAULT_HOURS[facts.device]
    return TRAINING_SHARE * 3600 * hours * _rate(facts, network, batch or network.batch)[0]


@dataclass(frozen=True)
class _Chosen:
    """What the remaining settings follow from."""

    facts: Facts
    network: Network
    images: int
    epochs: int
    batch: int
    steps: int
    from_weights: bool

    @property
    def long(self) -> bool:
        """Whether the run is long enough for the published schedules."""
        return self.steps >= LONG_STEPS

    def values(self, fraction: float, max_images: int | None, micro_batch: int | None) -> dict[str, Any]:
        """Return the recipe."""
        network, side, epochs = self.network, self.network.side, self.epochs
        small = self.images < 20_000
        warm_up = math.ceil(epochs / (20 if self.from_weights else 10))
        return {
            "recipe": AUTO,
            "data": {
                "max_images": max_images,
                "store_short_side": 2 * side if self.facts.short_side > 2 * side else None,
                "val_fraction": fraction,
            },
            "augment": {
                "global_crops": {"size": side},
                "local_crops": {"size": network.local[0], "number": network.local[1]},
            },
            "model": {**network.model, **({} if self.long else {"drop_path": 0.0})},
            "head": {
                "out_dim": min(network.prototypes, max(64, power_of_two(self.images / 2))),
                "hidden_dim": network.head[0],
                "bottleneck_dim": network.head[1],
            },
            "objective": {
                "region": self.long,
                "teacher_temp": 0.07 if self.long else 0.04,
                "warmup_teacher_temp_epochs": math.ceil(epochs / 10) if self.long else 0,
            },
            "optimizer": {
                "lr": network.lr / 10 if self.from_weights else network.lr,
                "warmup_epochs": min(5 if self.from_weights else 10, warm_up, epochs - 1),
                "freeze_last_layer_epochs": min(1, epochs - 1),
                "teacher_momentum": self._momentum(),
                **(
                    {"layer_decay": LAYER_DECAY, "freeze_backbone_epochs": int(epochs >= 5)}
                    if self.from_weights
                    else {}
                ),
            },
            "training": {
                "epochs": epochs,
                "batch_size": self.batch,
                "max_images_per_process": micro_batch,
            },
            "evaluation": {
                "resize": side if self.facts.short_side <= side else round(side * 8 / 7),
                "crop": side,
                **({"linear": {"lr": 0.1, "batch_size": 64}} if small else {}),
            },
        }

    def _momentum(self) -> float:
        if self.from_weights or self.long:
            return 0.996
        return 0.99 if self.steps < 10_000 else 0.994

    def rows(self, values: Mapping[str, Any]) -> tuple[Row, ...]:
        """Explain the settings that follow from the number of images and steps."""
        optimizer, objective = values["optimizer"], values["objective"]
        cpu = self.facts.device == "cpu"
        first = (
            "a tenth, which protects the initial weights" if self.from_weights else "of this network's reference run"
        )
        tenth = "a twentieth" if self.from_weights else "a tenth"
        pace = "as published" if self.long else f"fewer than {LONG_STEPS:,} steps"
        slow = "a slow teacher, which protects the initial weights" if self.from_weights else f"{self.steps:,} steps"
        cores = max(1, self.facts.cores // self.facts.devices)
        protection = Row(
            "protection",
            f"layer decay {LAYER_DECAY:g}, heads alone for {count(optimizer.get('freeze_backbone_epochs', 0), 'epoch')}",
            "early blocks change less, and random heads do not spoil the weights",
            "optimizer.layer_decay",
        )
        return (
            *([protection] if self.from_weights else []),
            Row("prototypes", f"{values['head']['out_dim']:,}", "at most one for two images", "head.out_dim"),
            Row("learning rate", f"{optimizer['lr']:g} per 256 images", first, "optimizer.lr"),
            Row(
                "warm-up",
                count(optimizer["warmup_epochs"], "epoch"),
                f"{tenth} of the epochs",
                "optimizer.warmup_epochs",
            ),
            Row("teacher", f"momentum {optimizer['teacher_momentum']:g}", slow, "optimizer.teacher_momentum"),
            Row("temperature", f"{objective['teacher_temp']:g}", f"of the teacher; {pace}", "objective.teacher_temp"),
            Row("region task", "yes" if self.long else "no", f"{pace}; see docs/cifar10.md", "objective.region"),
            Row(
                "workers",
                "in the process" if cpu else f"up to {min(6, cores)} per GPU",
                "no cores to spare on a CPU" if cpu else "as far as cores and shared memory suffice",
                "training.workers",
            ),
            Row(
                "precision",
                "bfloat16" if self.facts.bfloat16 else "float32",
                "native here" if self.facts.bfloat16 else "bfloat16 is not native here",
                "training.precision",
            ),
        )


def _network(facts: Facts, train: int) -> tuple[Network, str]:
    """Choose the largest network for which images are large enough and the time suffices."""
    smaller, processes = "", _processes(facts)
    for network in reversed(NETWORKS):
        samples = allowed_samples(facts, network)
        possible = min(samples, MAX_EPOCHS * train)
        if _memory(facts, network, 2 * processes, processes)[0] > facts.memory:
            smaller = "for the next larger one there is too little memory"
        elif facts.short_side < network.min_side:
            smaller = f"the images are too small for {network.side} pixels"
        elif possible < network.min_samples:
            what = "hours" if samples <= MAX_EPOCHS * train else "images"
            smaller = f"for the next larger one there are too few {what}"
        else:
            break
    return network, smaller or "the largest, and there are time and images enough for it"


def _processes(facts: Facts) -> int:
    return facts.devices if facts.device == "cuda" else min(2, facts.cores)


def _rate(facts: Facts, network: Network, batch: int) -> tuple[float, str]:
    return images_per_second(
        network,
        facts.device,
        batch=batch,
        cores=facts.cores,
        bfloat16=facts.bfloat16,
        devices=facts.devices,
        multiprocessors=facts.multiprocessors,
        capability=facts.capability,
    )


def _held_out_fraction(images: int) -> float:
    """Return the share of the images to hold out: more of few, and at most about 10,000."""
    share = 0.3 if images < 1000 else 0.2 if images < 10_000 else 0.1
    return min(share, round(max(0.005, 10_000 / images), 3))


def _schedule(
    facts: Facts, network: Network, train: int, most: int, epochs: int | None, batch_size: int | None
) -> tuple[int, int, int, str]:
    """Choose images, epochs and batch, with the batch's reason.

    A small batch is slower, so that fewer epochs fit into the time, and fewer epochs ask for a smaller batch.
    """
    batch = batch_size or network.batch
    while True:
        samples, used = allowed_samples(facts, network, batch), train
        if epochs is None and samples < MIN_PASSES * train:
            used = min(train, max(1000, two_digits(samples / MIN_PASSES)))
        chosen = epochs or min(most, max(1, two_digits(samples / used)))
        smaller, reason = _batch(network, used, chosen, batch_size)
        if smaller >= batch:
            return used, chosen, batch, reason
        batch = smaller


def _batch(network: Network, images: int, epochs: int, given: int | None) -> tuple[int, str]:
    if given is not None:
        return given, "given"
    most = min(images / 4, images * epochs / MIN_STEPS)
    if most >= network.batch:
        return network.batch, "of this network's reference run"
    return max(8, power_of_two(most)), f"smaller than {network.batch}, for {MIN_STEPS:,} steps from so few images"


def _memory(facts: Facts, network: Network, batch: int, processes: int) -> tuple[float, int | None]:
    """Return the memory of the device, bytes, and the micro-batch of a process; None: its whole share of the batch."""
    image = network.image_bytes[facts.device == "cuda"] * (1 if facts.bfloat16 else 2)
    share = -(-batch // processes)
    together = 1 if facts.device == "cuda" else processes  # processes that share the memory
    fixed = together * (network.fixed_bytes + PROCESS_BYTES)
    room = MEMORY_SHARE * facts.memory - fixed
    fitting = max(2, int(room // (together * image)))
    micro_batch = None if share <= fitting else power_of_two(fitting)
    return fixed + together * image * (micro_batch or share), micro_batch


def _crops(network: Network) -> str:
    size, number = network.local
    return f"2 of {network.side} and {number} of {size} pixels"


def _batch_text(batch: int, micro_batch: int | None) -> str:
    return f"{batch}" if micro_batch is None else f"{batch}, {micro_batch} at a time to fit into memory"


def _reason_crops(facts: Facts) -> str:
    return f"half of the images have a shorter side of at most {facts.short_side:,} pixels"


def _reason_images(used: int, train: int) -> str:
    if used < train:
        return f"so that there is time for {MIN_PASSES} passes; more hours use more images"
    return "all but the held-out ones"


def _reason_epochs(given: int | None, epochs: int, most: int, hours: float) -> str:
    if given is not None:
        return "given"
    if epochs == most:
        return f"at most {most}; the time would allow more"
    return f"what {hours:g} hours allow" if hours != 1 else "what an hour allows"


def _reason_held_out(facts: Facts, held_out: int) -> str:
    whose = "the source's own; " if facts.held_out is not None else ""
    if not facts.labelled:
        return f"{whose}there are no classes, so k-NN and linear probe are left out"
    points = 100 * 1.96 * math.sqrt(_DISAGREEMENT / max(1, held_out))
    return f"{whose}they cannot show a difference below about {points:.1f} points"
