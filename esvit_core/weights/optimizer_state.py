"""An optimizer's state by the names of the parameters.

torch numbers parameters by their place in the groups: first those that decay, then biases and one-dimensional ones,
each in the order of the network's definition. The numbers change with the heads; names do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

Groups = list[list[str]]


def optimized_names(order: Iterable[str], network: nn.Module) -> Groups:
    """Names of the parameters of each group, as torch numbers them.

    Args:
        order: names of a state of ``network``, in the order in which it was defined there.
        network: says which of them take a gradient. Of a weight that two modules share it counts the first name.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    names = [name for name in order if name in parameters]
    spared = {name for name in names if name.endswith(".bias") or parameters[name].ndim == 1}
    return [[name for name in names if name not in spared], [name for name in names if name in spared]]


def renumbered(state: Mapping[str, Any], there: Groups, here: Groups) -> dict[str, Any] | None:
    """An optimizer's ``state_dict()`` for the same parameters in another order.

    Parameters that have had no step, such as the frozen prototypes in the first epoch, have no state.

    Args:
        state: a ``state_dict()``.
        there: names of its parameters.
        here: names of the parameters that shall take it over.

    Returns:
        The state; None where it is not one of ``there``, or where the two have not the same parameters.
    """
    groups = state.get("param_groups")
    if not isinstance(groups, list) or [len(group["params"]) for group in groups] != [len(names) for names in there]:
        return None
    if [set(names) for names in there] != [set(names) for names in here]:
        return None
    name_of = {
        number: name
        for group, names in zip(groups, there, strict=True)
        for number, name in zip(group["params"], names, strict=True)
    }
    if not name_of.keys() >= state["state"].keys():
        return None
    numbers = {name: number for number, name in enumerate(name for names in here for name in names)}
    by_number = {numbers[name_of[number]]: dict(value) for number, value in state["state"].items()}
    return {
        "state": {number: by_number[number] for number in sorted(by_number)},
        "param_groups": [
            {**group, "params": [numbers[name] for name in names]} for group, names in zip(groups, here, strict=True)
        ],
    }
