"""Types of Kubernetes names, labels and quantities, validated here rather than by the cluster."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

AUTO = "auto"
_UNITS = {
    "": 1,
    **{unit: 1000 ** (power + 1) for power, unit in enumerate(("k", "M", "G", "T", "P", "E"))},
    **{unit: 1024 ** (power + 1) for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
}
_BYTES = re.compile(r"^([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([A-Za-z]*)$")
_CORES = re.compile(r"^([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m?)$")
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_VALUE = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_MIN_BYTES = 2**20


def quantity_bytes(text: str) -> int:
    """Convert a quantity such as ``4Gi`` or ``1.5G`` to bytes, rounded up.

    Raises:
        ValueError: it is not a quantity.
    """
    match = _BYTES.match(text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            "expected a Kubernetes quantity such as 4Gi or 500M; units are k, M, G, T (of 1000) and Ki, Mi, Gi, Ti (of 1024)"
        )
    return math.ceil(float(match[1]) * _UNITS[match[2]])


def quantity_cores(text: str) -> float:
    """Convert a quantity such as ``2``, ``0.5`` or ``500m`` to cores.

    Raises:
        ValueError: it is not a positive number of cores.
    """
    match = _CORES.match(text)
    cores = float(match[1]) / (1000 if match[2] else 1) if match else 0.0
    if cores <= 0:
        raise ValueError("expected a number of cores above 0, such as 2, 0.5 or 500m")
    return cores


def bytes_quantity(size: float) -> str:
    """Convert bytes to a quantity in whole Ti, Gi or Mi, rounded up to Mi."""
    whole = math.ceil(size)
    for unit in ("Ti", "Gi", "Mi"):
        if whole >= _UNITS[unit] and whole % _UNITS[unit] == 0:
            return f"{whole // _UNITS[unit]}{unit}"
    return f"{math.ceil(size / _UNITS['Mi'])}Mi"


def cores_quantity(cores: float) -> str:
    """Convert cores to a quantity: a whole number, or millicores."""
    return f"{cores:.0f}" if cores == round(cores) else f"{math.ceil(1000 * cores)}m"


def _text(value: Any) -> str:
    """Accept numbers: YAML parses `cpu: 8` as one, Kubernetes writes it as text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.12g}"
    if not isinstance(value, str):
        raise ValueError("expected text")
    return value


def _cpu(value: Any) -> str:
    text = _text(value)
    quantity_cores(text)
    return text


def _memory(value: Any) -> str:
    text = _text(value)
    if quantity_bytes(text) < _MIN_BYTES:
        raise ValueError("less than 1Mi; expected a size with a unit, such as 8Gi")
    return text


def _or_auto(check: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: AUTO if value == AUTO else check(value)


def _matching(pattern: str, longest: int, expected: str) -> AfterValidator:
    compiled = re.compile(rf"^{pattern}$")

    def check(text: str) -> str:
        if len(text) > longest or not compiled.match(text):
            raise ValueError(f"expected {expected}, at most {longest} characters")
        return text

    return AfterValidator(check)


def _limit_memory(value: Any) -> str:
    if value is None:
        raise ValueError(
            "expected a size or auto; with null the namespace's LimitRange would decide, whose default may be too small "
            "for the pod"
        )
    return _or_auto(_memory)(value)


Cpu = Annotated[str, BeforeValidator(_cpu)]
AutoCpu = Annotated[str, BeforeValidator(_or_auto(_cpu))]
Bytes = Annotated[str, BeforeValidator(_memory)]
AutoBytes = Annotated[str, BeforeValidator(_or_auto(_memory))]
LimitBytes = Annotated[str, BeforeValidator(_limit_memory)]

#: Name of most objects: DNS labels joined by dots.
ObjectName = Annotated[
    str,
    _matching(rf"{_LABEL}(\.{_LABEL})*", 253, "the name of a Kubernetes object: a-z, 0-9, - and ."),
]
#: Name of a namespace, or of an object that becomes a volume: no dots.
LabelName = Annotated[
    str,
    _matching(_LABEL, 63, "a name of a-z, 0-9 and - that begins and ends with a letter or a digit, without dots"),
]
#: Key of a label, taint or resource: ``example.com/name``.
QualifiedName = Annotated[
    str, _matching(rf"({_LABEL}(\.{_LABEL})*/)?{_VALUE}", 317, "a Kubernetes key such as gpu or example.com/gpu")
]
LabelValue = Annotated[str, _matching(rf"({_VALUE})?", 63, "the value of a label: letters, digits, -, _ and .")]
EnvironmentName = Annotated[
    str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", 253, "the name of an environment variable: letters, digits and _")
]
