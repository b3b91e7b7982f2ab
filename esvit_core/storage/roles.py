"""Roles in the object store: one key per group of steps, and the objects that each key may write.

This table is the single definition. The identities of a SeaweedFS server (``esvit store keys``) and the policies for AWS
and MinIO (``esvit store policies``) are generated from it.

The behavior of SeaweedFS 4.48 is tested with the server itself (``tests/manifests/test_store_roles.py``): an action
``Write:bucket/pattern`` covers put, multipart upload, copy to, and delete, and a bulk delete is checked key by key. As in
the policies of AWS, ``*`` also matches slashes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ADMIN = "admin"


@dataclass(frozen=True)
class Role:
    """A role in the object store.

    Attributes:
        purpose: users of the role, in a few words.
        writes: patterns of the keys that the role may create, replace and delete, in the bucket of the runs.
        deletes: patterns of the keys that the role may only delete. SeaweedFS has one action for writing and deleting, so
            there the role may write them too; the policies of AWS and MinIO distinguish the two.
    """

    purpose: str
    writes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()


ROLES: Mapping[str, Role] = {
    "prepare": Role(
        "steps that turn images into shards",
        (
            *("runs/*/config.yaml", "runs/*/auto.json", "runs/*/runtime", "runs/*/data/*", "runs/*/transfer/*"),
            # A retraining starts by scanning the source and by claiming the lease.
            *("runs/*/retrain.json", "runs/*/retrain/*", "leases/*"),
        ),
    ),
    "train": Role(
        "pre-training, and the training pods that it starts",
        ("runs/*/training/*", "runs/*/events/*", "runs/*/baseline/*", "runs/*/backbone/*"),
    ),
    "evaluate": Role(
        "steps that compute and evaluate features",
        (
            *("runs/*/features/*", "runs/*/evaluation/*", "runs/*/comparison/*", "runs/*/visualization/*"),
            "features/*",  # which run has the features of a network and images
        ),
    ),
    "publish": Role(
        "report, promotion, export, and the import of a backbone to evaluate: what people and other systems rely on",
        (
            *("runs/*/report/*", "runs/*/promotion.json", "pointers/*", "exports/*"),
            "runs/*/events/*-evaluated.json",  # the verdict
            # A run that evaluates a backbone creates it first. Whoever can move the champion can choose any backbone anyway.
            *("runs/*/config.yaml", "runs/*/measured.json", "runs/*/backbone/*", "runs/*/baseline/*"),
            "runs/*/runtime",
            # If another run has become champion in the meantime, the promotion step evaluates it.
            "runs/*/comparison/*",
        ),
    ),
    "prune": Role("removal of old runs; it reads the pointers and cannot move them", deletes=("runs/*", "features/*")),
    "read": Role("people and programs that only read: `esvit status`, `esvit logs`, `load_backbone`"),
}


@dataclass(frozen=True)
class Key:
    """Credentials of a role."""

    access_key: str
    secret_key: str


def may_write(role: str, key: str) -> bool:
    """Return whether a role may create or replace an object in the bucket of the runs."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in ROLES[role].writes)


def identities(keys: Mapping[str, Key], bucket: str, sources: Sequence[str] = ()) -> dict[str, Any]:
    """Return the ``-s3.config`` of a SeaweedFS server.

    Args:
        keys: keys of the administrator, who creates buckets, and of the roles.
        bucket: bucket of the runs.
        sources: other buckets with images on this server, which the steps may read.
    """

    def identity(name: str, actions: list[str]) -> dict[str, Any]:
        key = keys[name]
        return {
            "name": f"esvit-{name}",
            "credentials": [{"accessKey": key.access_key, "secretKey": key.secret_key}],
            "actions": actions,
        }

    reads = [f"{action}:{one}" for one in (bucket, *sources) for action in ("Read", "List")]
    roles = (
        identity(name, [*reads, *(f"Write:{bucket}/{pattern}" for pattern in (*role.writes, *role.deletes))])
        for name, role in ROLES.items()
    )
    return {"identities": [identity(ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]), *roles]}


def joint_policy(roles: Sequence[str], bucket: str, sources: Sequence[str] = ()) -> dict[str, Any]:
    """Return one policy with the permissions of several roles, for an account that they share."""
    policies = [policy(role, bucket, sources) for role in roles]
    statements: list[dict[str, Any]] = []
    for statement in (one for each in policies for one in each["Statement"]):
        if statement not in statements:
            statements.append(statement)
    return policies[0] | {"Statement": statements}


def policy(role: str, bucket: str, sources: Sequence[str] = ()) -> dict[str, Any]:
    """Return the permissions of a role as an AWS policy document, which MinIO accepts too."""
    buckets = [f"arn:aws:s3:::{one}" for one in (bucket, *sources)]
    statements = [
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": buckets},
        {"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": [f"{one}/*" for one in buckets]},
    ]
    remove = ["s3:DeleteObject", "s3:AbortMultipartUpload"]
    for patterns, actions in ((ROLES[role].writes, ["s3:PutObject", *remove]), (ROLES[role].deletes, remove)):
        if patterns:
            statements += [
                {
                    "Effect": "Allow",
                    "Action": actions,
                    "Resource": [f"{buckets[0]}/{pattern}" for pattern in patterns],
                },
                {"Effect": "Allow", "Action": ["s3:ListBucketMultipartUploads"], "Resource": buckets[:1]},
            ]
    return {"Version": "2012-10-17", "Statement": statements}
