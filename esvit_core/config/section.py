"""The base class of the configuration's sections."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

#: Marks a setting, or a whole section, that changes how a run is executed and not what it computes:
#: ``Field(..., json_schema_extra=EXECUTION)``. It is not part of a run's identity; the latest start of a run sets it.
#: Every other setting is part of the identity: a run with another value is another run.
EXECUTION: dict[str, JsonValue] = {"execution": True}
#: Marks a setting of the identity that was added later. With its default it is not part of the identity, so that runs
#: which were started before keep their ids.
ADDED: dict[str, JsonValue] = {"added": True}
_NULL = ("none", "off")


class Section(BaseModel):
    """A frozen model that refuses unknown keys. ``none`` and ``off`` mean null where a setting may be null."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity_values(self) -> dict[str, Any]:
        """Return the settings that are part of a run's identity, as JSON values."""
        return self.model_dump(mode="json", exclude=_not_identity(self))

    def execution_values(self) -> dict[str, Any]:
        """Return the other settings, as JSON values."""
        return self.model_dump(mode="json", include=execution_fields(type(self)))

    @model_validator(mode="before")
    @classmethod
    def _convert_null_words(cls, given: Any) -> Any:
        """Convert ``none`` and ``off`` to None; YAML parses ``off`` as false, which would become 0 in a number."""
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {k: None if k in fields and _is_null_word(v, fields[k].annotation) else v for k, v in given.items()}


def execution_fields(section: type[BaseModel]) -> dict[str, Any]:
    """Return the settings of ``section`` marked with :data:`EXECUTION`, in the form of pydantic's ``include`` and ``exclude``."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if field.json_schema_extra == EXECUTION:
            found[name] = True
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {name: below} if (below := execution_fields(field.annotation)) else {}
    return found


def _not_identity(section: Section) -> dict[str, Any]:
    """Return the settings of ``section`` that are not part of its identity, in the form of pydantic's ``exclude``."""
    found = execution_fields(type(section))
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if field.json_schema_extra == ADDED and value == field.default:
            found[name] = True
        elif isinstance(value, Section) and found.get(name) is not True and (below := _not_identity(value)):
            found[name] = below
    return found


def _is_null_word(value: Any, annotation: Any) -> bool:
    kinds = get_args(annotation)
    return NoneType in kinds and (value in _NULL if isinstance(value, str) else value is False and bool not in kinds)
