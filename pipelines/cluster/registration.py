"""`esvit register`: pipelines and their versions on KFP's page "Pipelines", so that runs are grouped and compared.

A version is named after the pipeline, the package's version, the image and a digest of the compiled text: the same text
is registered once, however often it is asked for.
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
from esvit_pipelines.cluster.client import Connection, pages, words_of
from esvit_pipelines.cluster.submit import Package

_PAGE = 100
_DIGEST = 12  # characters
_LONGEST = 100  # characters of a version's name; KFP takes 127


@dataclass(frozen=True)
class Registered:
    """A version of a pipeline on the server.

    Attributes:
        pipeline, version: their names.
        pipeline_id, version_id: their ids.
        new: it was not there before.
    """

    pipeline: str
    version: str
    pipeline_id: str
    version_id: str
    new: bool


def version_name(pipeline: Package) -> str:
    """The name of the version, in the characters that Kubernetes allows: KFP can keep pipelines as its objects."""
    image, _, digest = pipeline.image.partition("@sha256:")
    base, _, tag = image.rpartition("/")[2].partition(":")
    parts = [pipeline.name, __version__, base, digest[:_DIGEST] or tag, pipeline.digest[:_DIGEST]]
    clean = [re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.") for part in parts]
    return "-".join(part for part in clean if part)[-_LONGEST:].strip("-.")


def register(connection: Connection, pipeline: Package, name: str | None = None) -> Registered:
    """Find the version of a compiled pipeline on the server, or put it there.

    Args:
        name: of the pipeline; None: its own.

    Raises:
        UserError: the server does not allow it.
    """
    import kfp_server_api

    name = name or pipeline.name
    version = version_name(pipeline)
    try:
        identity = _pipeline_id(connection, name, pipeline.description)
        if found := _version_id(connection, identity, version):
            return Registered(name, version, identity, found, new=False)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a link
            made = connection.client.upload_pipeline_version(
                str(pipeline.path), version, pipeline_id=identity, description=_description(pipeline)
            )
        return Registered(name, version, identity, str(made.pipeline_version_id), new=True)
    except kfp_server_api.ApiException as error:
        if error.status in (409, 500) and (found := _version_id(connection, identity, version)):
            return Registered(name, version, identity, found, new=False)  # another one was faster
        if error.status in (400, 403, 409):
            raise UserError(
                f"pipeline {name}: {connection.host} does not let it be registered ({error.status}: "
                f"{words_of(error)}); look at the rights on pipelines, or let `esvit submit --inline` send the "
                "pipeline with the run"
            ) from None
        raise


def _description(pipeline: Package) -> str:
    return f"esvit {__version__}, image {pipeline.image or 'not named'}, text sha256:{pipeline.digest}"


def _pipeline_id(connection: Connection, name: str, description: str) -> str:
    """The id of the pipeline of that name, which is made with the description if it is not there."""
    import kfp_server_api

    where = {"namespace": connection.namespace} if connection.namespace else {}
    path = f"/apis/v2beta1/pipelines/names/{quote(name)}?{urlencode(where)}".rstrip("?")
    try:
        return _id(connection.ask("GET", path))
    except kfp_server_api.ApiException as error:
        if error.status != 404:
            raise
    try:
        return _id(
            connection.ask(
                "POST", "/apis/v2beta1/pipelines", {"display_name": name, "description": description, **where}
            )
        )
    except kfp_server_api.ApiException as error:
        if error.status != 409:
            raise
        return _id(connection.ask("GET", path))


def _id(answer: bytes) -> str:
    return str(json.loads(answer)["pipeline_id"])


def _version_id(connection: Connection, pipeline_id: str, name: str) -> str | None:
    def page(token: str) -> Any:
        return connection.client.list_pipeline_versions(
            pipeline_id, page_token=token, page_size=_PAGE, sort_by="created_at desc"
        )

    for one in pages(page, "pipeline_versions"):
        if name in (one.display_name, one.name):
            return str(one.pipeline_version_id)
    return None
