"""Generate keys and server configuration for an object store on a cluster, as Kubernetes secrets."""

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
    """Generate a key for the administrator and for each role."""
    return {name: Key(secrets.token_hex(10).upper(), secrets.token_urlsafe(30)) for name in (ADMIN, *ROLES)}


def secret_values(
    keys: Mapping[str, Key], endpoint: str, bucket: str, sources: Sequence[str] = (), folder: Path = SERVER_FOLDER
) -> dict[str, dict[str, str]]:
    """Return the content of the secrets: ``ESVIT_S3_*`` for ``admin`` and each role, and the server's files for ``server``.

    Args:
        keys: from :func:`new_keys`.
        endpoint: URL of the server for the pods, ``http://host:port``.
        bucket: bucket of the runs.
        sources: other buckets of this server that the steps may read.
        folder: folder in which the server finds its files.

    Raises:
        UserError: a name is not a valid bucket name; in the identities it could grant more than intended.
    """
    for name in (bucket, *sources):
        if not _BUCKET.fullmatch(name):
            raise UserError(f"bucket {name}: expected 3 to 63 of a-z, 0-9, - and .")
    address = {ENDPOINT: endpoint, SECURE: str(endpoint.startswith("https://")).lower(), REGION: "us-east-1"}
    values = {name: {**address, ACCESS_KEY: key.access_key, SECRET_KEY: key.secret_key} for name, key in keys.items()}
    certificate, private_key = weed.new_certificate()
    values[SERVER] = {
        weed.IDENTITIES: json.dumps(identities(keys, bucket, sources), indent=1),
        weed.SECURITY: weed.security(folder),
        weed.CERTIFICATE: certificate,
        weed.PRIVATE_KEY: private_key,
    }
    return values


def secret_manifests(values: Mapping[str, Mapping[str, str]], namespace: str) -> str:
    """Return the secrets as YAML for ``kubectl apply -f -``; it contains the keys in plain text."""
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
