"""What Kubeflow's launcher accepts of a step's outputs, as its Go code has it (tags 2.16.1 and 2.17.0, the same in both).

- ``backend/src/v2/component/launcher_v2.go``, ``getExecutorOutputFile``: the file of outputs is read with
  ``protojson`` as a ``pipelinespec.ExecutorOutput``. Unknown fields, NaN and infinity are errors.
- ``backend/src/v2/metadata/converter.go``, ``StructValueToMLMDValue``: a value of an artifact's metadata is a string, a
  number, a truth value, a list or a struct. Null ends the step with "unknown/unsupported value type NullValue".

Null within a list or a struct passes the launcher, and so does null as an output parameter. The latter comes back as an
input that is not there, so that neither is accepted here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2


def refused(text: str) -> list[str]:
    """Why Kubeflow would not take the outputs of a step; nothing where it would.

    Args:
        text: of the file that the step's executor wrote.
    """

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        output = json.loads(text, parse_constant=constant)
        json_format.ParseDict(output, pipeline_spec_pb2.ExecutorOutput())
    except (ValueError, json_format.ParseError) as error:
        return [str(error)]
    places = {f"parameter {name}": value for name, value in output.get("parameterValues", {}).items()}
    for name, artifacts in output.get("artifacts", {}).items():
        for artifact in artifacts["artifacts"]:
            places |= {f"{name}.metadata.{key}": value for key, value in artifact.get("metadata", {}).items()}
    return [f"{found}: unknown/unsupported value type NullValue" for found in _nulls(places)]


def executor_output(component: Any, returned: Any, artifacts: Mapping[str, Any]) -> str:
    """The file of outputs that KFP's executor writes for a function that was called directly.

    Args:
        component: that was called.
        returned: by its function.
        artifacts: its output artifacts by name.
    """
    names = [name for name in (component.component_spec.outputs or {}) if name not in artifacts]
    values = {} if returned is None else dict(zip(names, returned, strict=True))
    listed = {
        name: {"artifacts": [{"name": a.name, "uri": a.uri, "metadata": a.metadata}]} for name, a in artifacts.items()
    }
    return json.dumps({"parameterValues": values, "artifacts": listed})


def _nulls(value: Any, place: str = "") -> Iterator[str]:
    if value is None:
        yield place
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _nulls(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _nulls(item, f"{place}[{number}]")
