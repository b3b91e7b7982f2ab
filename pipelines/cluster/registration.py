"""`esvit register`: register pipelines and their versions with KFP, so that the UI groups and compares the runs.

A version is named after the pipeline, the package's version, the image and a digest of the compiled text, so that the
same text is registered only once.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from esvit_core import __version__
from esvit_core.errors import UserError
from esvit_pipelines.cluster.client import Connection, pages, server_message
from esvit_pipelines.cluster.package import Package

_PAGE = 100
_DIGEST = 12  # characters
_LONGEST = 100  # characters of a version's name; KFP takes 127


@dataclass(frozen=True)
class Registered:
    """A version of a pipeline on the server.

    Attributes:
        pipeline, version: their names.
        pipeline_id, version_id: their ids.
        new: it was registered by this call.
    """

    pipeline: str
    version: str
    pipeline_id: str
    version_id: str
    new: bool


def version_name(pipeline: Package) -> str:
    """Return the name of the version. Its characters are valid in Kubernetes, where KFP can store pipelines."""
    image, _, digest = pipeline.image.partition("@sha256:")
    base, _, tag = image.rpartition("/")[2].partition(":")
    parts = [pipeline.name, __version__, base, digest[:_DIGEST] or tag, pipeline.digest[:_DIGEST]]
    clean = [re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.") for part in parts]
    return "-".join(part for part in clean if part)[-_LONGEST:].strip("-.")


def register(connection: Connection, pipeline: Package, name: str | None = None) -> Registered:
    """Find the version of a compiled pipeline on the server, or register it.

    Args:
        name: name of the pipeline on the server; None: the package's.

    Raises:
        UserError: the server does not permit it.
    """
    import kfp_server_api

    name = name or pipeline.name
    version = version_name(pipeline)
    try:
        identity = _pipeline_id(connection, name, pipeline.description)
        if version_id := _version_id(connection, identity, version):
            return Registered(name, version, identity, version_id, new=False)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a link
            created = connection.client.upload_pipeline_version(
                str(pipeline.path), version, pipeline_id=identity, description=_description(pipeline)
            )
        return Registered(name, version, identity, str(created.pipeline_version_id), new=True)
    except kfp_server_api.ApiException as error:
        if error.status in (409, 500) and (version_id := _version_id(connection, identity, version)):
            return Registered(
                name, version, identity, version_id, new=False
            )  # another process registered it at the same time
        if error.status in (400, 403, 409):
            raise UserError(
                f"pipeline {name}: {connection.host} does not permit its registration ({error.status}: "
                f"{server_message(error)}); check your permissions on pipelines, or send the pipeline with the run: "
                "`esvit submit --inline`"
            ) from None
        raise


def _description(pipeline: Package) -> str:
    return f"esvit {__version__}, image {pipeline.image or 'unknown'}, text sha256:{pipeline.digest}"


def _pipeline_id(connection: Connection, name: str, description: str) -> str:
    """Return the id of the pipeline of that name, which is created with the description if it does not exist."""
    import kfp_server_api

    parameters = {"namespace": connection.namespace} if connection.namespace else {}
    path = f"/apis/v2beta1/pipelines/names/{quote(name)}?{urlencode(parameters)}".rstrip("?")
    try:
        return _id(connection.request("GET", path))
    except kfp_server_api.ApiException as error:
        if error.status != 404:
            raise
    try:
        return _id(
            connection.request(
                "POST", "/apis/v2beta1/pipelines", {"display_name": name, "description": description, **parameters}
            )
        )
    except kfp_server_api.ApiException as error:
        if error.status != 409:
            raise
        return _id(connection.request("GET", path))


def _id(answer: bytes) -> str:
    return str(json.loads(answer)["pipeline_id"])


def _version_id(connection: Connection, pipeline_id: str, name: str) -> str | None:
    def page(token: str) -> Any:
        return connection.client.list_pipeline_versions(
            pipeline_id, page_token=token, page_size=_PAGE, sort_by="created_at desc"
        )

    for item in pages(page, "pipeline_versions"):
        if name in (item.display_name, item.name):
            return str(item.pipeline_version_id)
    return None
