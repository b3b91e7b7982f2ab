"""What all sections of the configuration have in common."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

#: Marks a setting, or a whole section, that says how a run is executed and not what it computes:
#: ``Field(..., json_schema_extra=EXECUTION)``. It is no part of a run's identity, and the latest start of a run decides.
#: Every other setting is part of the identity: a run with another value is another run.
EXECUTION: dict[str, JsonValue] = {"execution": True}
_NULL = ("none", "off")


class Section(BaseModel):
    """Frozen, and without keys that it does not know. ``none`` and ``off`` say null where a setting may be null."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity_values(self) -> dict[str, Any]:
        """The settings that are part of a run's identity, as JSON."""
        return self.model_dump(mode="json", exclude=execution_fields(type(self)))

    def execution_values(self) -> dict[str, Any]:
        """The others, as JSON."""
        return self.model_dump(mode="json", include=execution_fields(type(self)))

    @model_validator(mode="before")
    @classmethod
    def _null_in_words(cls, given: Any) -> Any:
        """YAML reads ``off`` as false, which would become 0 where a number is expected."""
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {k: None if k in fields and _says_null(v, fields[k].annotation) else v for k, v in given.items()}


def execution_fields(section: type[BaseModel]) -> dict[str, Any]:
    """The settings of ``section`` that are marked with :data:`EXECUTION`, as ``include`` and ``exclude`` of pydantic."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if field.json_schema_extra == EXECUTION:
            found[name] = True
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {name: below} if (below := execution_fields(field.annotation)) else {}
    return found


def _says_null(value: Any, annotation: Any) -> bool:
    kinds = get_args(annotation)
    return NoneType in kinds and (value in _NULL if isinstance(value, str) else value is False and bool not in kinds)
