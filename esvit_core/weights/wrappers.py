"""Find the backbone in a state dict that other tools wrote around it.

Lightning modules, DistributedDataParallel, ``torch.compile`` and classes of users put prefixes before the names of a
network: ``module.``, ``_orig_mod.``, ``model.``, ``backbone.``, ``encoder.``, ``vit.``, ``student_backbone.`` and any
combination of them. A prefix is recognized by what follows it, the first layer of a backbone, so that no list of prefixes
is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

# The first layer of each family: Swin, ViT and DeiT; transformers' ViT and Swin; ResNet; CvT; ViL; ConvNeXt, EfficientNet.
_FIRST_LAYERS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "layer1.0.conv1.weight",
    "stage0.",
    "layer1.0.proj.",
    "stem.0.weight",
    "stem.conv1.weight",
    "conv_stem.weight",
)
_HEADS = ("head.mlp.", "head.last_layer.")  # those of a training of ours or of the published code
_PLAIN = ("", "backbone.", "backbone.backbone.")  # of this project and the published code
_AVERAGED = ("teacher", "ema", "momentum", "averaged")  # in the name of a network that is a moving average


def unwrap(state: Mapping[str, Value]) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return the network in ``state`` without prefixes, and what lies beside it.

    Args:
        state: names and tensors of one file.

    Returns:
        The entries of the backbone; of several, those of the moving average. A network with heads of a training, or one
        without a known first layer, is returned whole. Then the entries beside the backbone, grouped as ``head.* (2)``.
    """
    named = {_without_wrappers(name): value for name, value in state.items()}
    prefix = find_prefix(named)
    if prefix is None or prefix in _PLAIN or any(_bare(name).startswith(_HEADS) for name in named):
        return named, ()
    inside = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    return inside, group_by_first(name for name in named if not name.startswith(prefix))


def find_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of the backbone's names, or None if no first layer is known."""
    found = set()
    for name in names:
        for layer in _FIRST_LAYERS:
            start = f".{name}".find(f".{layer}")
            if start >= 0:
                found.add(name[:start])
    if not found:
        return None
    return min(found, key=lambda prefix: (not any(word in prefix for word in _AVERAGED), prefix not in _PLAIN, prefix))


def group_by_first(names: Iterable[str]) -> tuple[str, ...]:
    """Group names by their first part: ``classifier.* (2)``; a single one keeps its name."""
    given = list(names)
    counts = Counter(name.partition(".")[0] for name in given)
    singles = {name.partition(".")[0]: name for name in given}
    return tuple(singles[first] if count == 1 else f"{first}.* ({count})" for first, count in counts.items())


def _without_wrappers(name: str) -> str:
    """Remove what DistributedDataParallel puts first, and ``torch.compile`` anywhere."""
    return str(name).replace("_orig_mod.", "").removeprefix("module.")


def _bare(name: str) -> str:
    return name.removeprefix("backbone.").removeprefix("backbone.")
