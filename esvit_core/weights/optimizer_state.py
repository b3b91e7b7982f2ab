"""Transfer an optimizer's state by parameter names.

torch numbers parameters by their position in the groups: first those with weight decay, then biases and one-dimensional
ones, each in the order of the network's definition. The numbers change with the heads; the names do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

Groups = list[list[str]]


def optimized_names(order: Iterable[str], network: nn.Module) -> Groups:
    """Return the parameter names of each group in torch's order.

    Args:
        order: names of a state of ``network`` in their original order.
        network: determines which of them are trainable; a shared weight counts under its first name.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    names = [name for name in order if name in parameters]
    no_decay = {name for name in names if name.endswith(".bias") or parameters[name].ndim == 1}
    return [[name for name in names if name not in no_decay], [name for name in names if name in no_decay]]


def renumber_state(state: Mapping[str, Any], there: Groups, here: Groups) -> dict[str, Any] | None:
    """Renumber an optimizer's ``state_dict()`` for the same parameters in another order.

    Parameters without a step so far, such as the frozen prototypes in the first epoch, have no state.

    Args:
        state: a ``state_dict()``.
        there: names of its parameters.
        here: names of the parameters in the new order.

    Returns:
        The state; None if it does not match ``there``, or if the parameters differ.
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
