"""Keys for an object store on a cluster, and what its server reads, as Kubernetes secrets."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from esvit_core.errors import UserError
from esvit_core.storage import weed
from esvit_core.storage.address import ACCESS_KEY, ENDPOINT, REGION, SECRET_KEY, SECURE
from esvit_core.storage.roles import ADMIN, ROLES, Key, identities

SECRET = "esvit-object-store"
SERVER = "server"
SERVER_FOLDER = Path("/etc/seaweedfs")  # where the manifests mount the server's secret
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def new_keys() -> dict[str, Key]:
    """A new key for the administrator and for each role."""
    return {name: Key(secrets.token_hex(10).upper(), secrets.token_urlsafe(30)) for name in (ADMIN, *ROLES)}


def secret_values(
    keys: Mapping[str, Key], endpoint: str, bucket: str, sources: Sequence[str] = (), folder: Path = SERVER_FOLDER
) -> dict[str, dict[str, str]]:
    """The content of the secrets: ``admin`` and each role, with ``ESVIT_S3_*``; ``server``, with the server's files.

    Args:
        keys: of :func:`new_keys`.
        endpoint: where the pods reach the server, ``http://host:port``.
        bucket: of the runs.
        sources: other buckets of this server that the steps may read.
        folder: where the server finds its files.

    Raises:
        UserError: something else than a bucket is named; in the identities it could mean more than it says.
    """
    for name in (bucket, *sources):
        if not _BUCKET.fullmatch(name):
            raise UserError(f"bucket {name}: expected 3 to 63 of a-z, 0-9, - and .")
    place = {ENDPOINT: endpoint, SECURE: str(endpoint.startswith("https://")).lower(), REGION: "us-east-1"}
    values = {name: {**place, ACCESS_KEY: key.access_key, SECRET_KEY: key.secret_key} for name, key in keys.items()}
    certificate, private_key = weed.new_certificate()
    values[SERVER] = {
        weed.IDENTITIES: json.dumps(identities(keys, bucket, sources), indent=1),
        weed.SECURITY: weed.security(folder),
        weed.CERTIFICATE: certificate,
        weed.PRIVATE_KEY: private_key,
    }
    return values


def secret_manifests(values: Mapping[str, Mapping[str, str]], namespace: str) -> str:
    """The secrets for ``kubectl apply -f -``, as YAML; the keys themselves are in it."""
    labels = {"app.kubernetes.io/name": "esvit", "app.kubernetes.io/component": "object-store"}

    def secret(name: str, content: Mapping[str, str]) -> dict[str, Any]:
        metadata = {"name": f"{SECRET}-{name}", "namespace": namespace, "labels": labels}
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": metadata,
            "type": "Opaque",
            "stringData": dict(content),
        }

    return yaml.safe_dump_all([secret(name, content) for name, content in values.items()], sort_keys=False)
