"""`esvit submit`: run a pipeline on a cluster."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import hashlib
import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_pipelines.cluster.client import Connection, words_of

if TYPE_CHECKING:
    from esvit_pipelines.cluster.registration import Registered

#: Names of this project's pipelines; others are sent with the run.
OWN = ("esvit-pretrain", "esvit-evaluate", "esvit-retrain")


@dataclass(frozen=True)
class Package:
    """A compiled pipeline in a file.

    Attributes:
        path: of the file.
        name: of the pipeline.
        parameters: its parameters as KFP describes them.
        image: of its steps; empty: they have none, or several.
        digest: SHA-256 of the text, without the comments before it.
        description: what the pipeline does, in a sentence.
    """

    path: Path
    name: str
    parameters: Mapping[str, Mapping[str, Any]]
    image: str = ""
    digest: str = ""
    description: str = ""

    @property
    def own(self) -> bool:
        """Whether it is one of this project's pipelines."""
        return self.name in OWN


@contextlib.contextmanager
def package(pipeline: str, config: Config) -> Iterator[Package]:
    """A pipeline to send: compiled now, or a file that was compiled before.

    Args:
        pipeline: one of the pipelines' names, or a file ending with ``.yaml``.
        config: for the former.

    Raises:
        UserError: there is no such pipeline or file, or the file holds none.
    """
    from esvit_pipelines.cluster.compile import compile_pipeline

    if pipeline.endswith((".yaml", ".yml")):
        yield _read(Path(pipeline))
        return
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_pipeline(pipeline, config, path)
        yield _read(path)


def _read(path: Path) -> Package:
    try:
        text = path.read_text(encoding="utf-8")
        spec = next(yaml.safe_load_all(text))
        name = spec["pipelineInfo"]["name"]
        parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    except OSError as error:
        raise UserError(f"pipeline {path}: cannot be read ({error.strerror}); `esvit compile` makes one") from None
    except (yaml.YAMLError, UnicodeDecodeError, StopIteration, KeyError, TypeError, AttributeError):
        raise UserError(f"pipeline {path}: no compiled pipeline of KFP 2; `esvit compile` makes one") from None
    executors = ((spec.get("deploymentSpec") or {}).get("executors") or {}).values()
    images = {one["container"]["image"] for one in executors if "image" in (one.get("container") or {})}
    body = re.sub(r"\A(#[^\n]*\n)+", "", text)
    digest = hashlib.sha256(body.encode()).hexdigest()
    description = str(spec["pipelineInfo"].get("description", ""))
    return Package(path, name, parameters, images.pop() if len(images) == 1 else "", digest, description)


def arguments(pipeline: Package, given: Sequence[str]) -> dict[str, Any]:
    """The pipeline's arguments, each of its parameter's type.

    Args:
        given: ``name=value`` each; of a list or a structure the value is YAML.

    Raises:
        UserError: a parameter is unknown or missing, or a value is not of its type.
    """
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or name not in pipeline.parameters:
            near = difflib.get_close_matches(name, pipeline.parameters, n=1)
            meant = f", did you mean {near[0]!r}?" if near else ""
            known = ", ".join(pipeline.parameters) or "none"
            raise UserError(f"parameter {item}: expected name=value with a name of {pipeline.name}{meant}: {known}")
        values[name] = _typed(item, text, str(pipeline.parameters[name]["parameterType"]))
    missing = [n for n, p in pipeline.parameters.items() if not p.get("isOptional") and n not in values]
    if missing:
        flags = ", ".join(f"--{n}" if n == "data" else f"-p {n}=..." for n in missing)
        raise UserError(f"pipeline {pipeline.name}: it needs {', '.join(missing)}; give {flags}")
    return values


def _typed(item: str, text: str, kind: str) -> Any:
    if kind == "STRING":
        return text
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "NUMBER_INTEGER": ((int,), "a whole number"),
        "NUMBER_DOUBLE": ((int, float), "a number"),
        "BOOLEAN": ((bool,), "true or false"),
        "LIST": ((list,), "a list"),
        "STRUCT": ((dict,), "a mapping"),
    }
    types, words = kinds[kind]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UserError(f"parameter {item}: expected {words}")
    return value


def submit(
    connection: Connection,
    pipeline: Package,
    values: Mapping[str, Any],
    name: str,
    experiment: str,
    service_account: str | None,
    caching: bool | None,
    version: Registered | None,
) -> Any:
    """Run a pipeline once, as `kfp run create` does.

    Args:
        values: the arguments.
        name: of the run.
        experiment: its id.
        service_account: of the steps; None: the server's default.
        caching: None: as compiled.
        version: that the run refers to; None: the pipeline is sent with the run.

    Returns:
        The run, as the server describes it.

    Raises:
        UserError: the server does not allow the service account.
    """
    with contextlib.redirect_stdout(io.StringIO()), account_allowed(connection, service_account):  # it prints the link
        return connection.client.run_pipeline(
            experiment_id=experiment,
            job_name=name,
            params=dict(values),
            enable_caching=caching,
            service_account=service_account,
            **source(pipeline, version),
        )


def source(pipeline: Package, version: Registered | None) -> dict[str, str]:
    """What a run is made of, in the words of KFP's client."""
    if version is None:
        return {"pipeline_package_path": str(pipeline.path)}
    return {"pipeline_id": version.pipeline_id, "version_id": version.version_id}


@contextlib.contextmanager
def account_allowed(connection: Connection, account: str | None) -> Iterator[None]:
    """Say what to change when the server refuses to run steps with a service account.

    Servers after KFP 2.17.0 take no other account than their default and those that ALLOWEDSERVICEACCOUNTS lists; with
    a namespace for each user the user needs the verb ``use`` on the account, too.

    Raises:
        UserError: it refuses.
    """
    import kfp_server_api

    try:
        yield
    except kfp_server_api.ApiException as error:
        said = words_of(error)
        about = re.search(r"service ?account", said, re.IGNORECASE) is not None
        if account is None or error.status not in (400, 403) or not about:
            raise
        raise UserError(
            f"service account {account}: {connection.host} does not allow it ({error.status}: {said}); let the server "
            f"list it (kubectl -n kubeflow set env deployment/ml-pipeline ALLOWEDSERVICEACCOUNTS={account}; with a "
            "namespace for each user, also a role with the verb `use` on it), or give --service-account '' for the "
            "server's default"
        ) from None


def run_name(pipeline: Package) -> str:
    """A name for a run: the pipeline's and the time."""
    return f"{pipeline.name} {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
