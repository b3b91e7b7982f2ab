"""Who may do what in the object store: a key per kind of step, and what each key may write.

The table is the one place where this is said. From it come the identities of a SeaweedFS server (``esvit store keys``)
and the policies of AWS and MinIO (``esvit store policies``).

What SeaweedFS 4.48 enforces was tried against the server itself (``tests/manifests/test_store_roles.py``): an action
``Write:bucket/pattern`` covers put, multipart upload, copy to, and delete, and a bulk delete is judged key by key. As
in the policies of AWS, ``*`` also stands for slashes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ADMIN = "admin"


@dataclass(frozen=True)
class Role:
    """A key of the object store.

    Attributes:
        purpose: who uses it, in a few words.
        writes: patterns of the keys that it may make, replace and delete, in the bucket of the runs.
        deletes: patterns of the keys that it may delete only. SeaweedFS has one action for writing and deleting, so that
            there the key may write them too; the policies of AWS and MinIO tell the two apart.
    """

    purpose: str
    writes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()


ROLES: Mapping[str, Role] = {
    "prepare": Role(
        "steps that turn images into shards",
        (
            *("runs/*/config.yaml", "runs/*/runtime", "runs/*/data/*", "runs/*/transfer/*"),
            # A retraining begins with a look at what is new, and with a claim that no other one makes it too.
            *("runs/*/retrain.json", "runs/*/retrain/*", "claims/*"),
        ),
    ),
    "train": Role(
        "pre-training, and the training pods that it starts",
        ("runs/*/training/*", "runs/*/journal/*", "runs/*/untrained/*", "runs/*/backbone/*"),
    ),
    "evaluate": Role(
        "steps that compute and measure features",
        ("runs/*/features/*", "runs/*/evaluation/*", "runs/*/comparison/*", "runs/*/visualization/*"),
    ),
    "publish": Role(
        "report, promotion, export, and a backbone that is taken to be measured: what people and other systems go by",
        (
            *("runs/*/report/*", "runs/*/promotion.json", "pointers/*", "exports/*"),
            # A run that measures a backbone begins with it. Whoever moves the champion could name any backbone anyway.
            *("runs/*/config.yaml", "runs/*/measured.json", "runs/*/backbone/*", "runs/*/untrained/*"),
            "runs/*/runtime",
            # Where another run became champion in the meantime it is measured by the step that promotes.
            "runs/*/comparison/*",
        ),
    ),
    "prune": Role("removal of old runs; it reads the pointers and cannot move them", deletes=("runs/*",)),
    "read": Role("people and programs that look: `esvit status`, `esvit logs`, `load_backbone`"),
}


@dataclass(frozen=True)
class Key:
    """Credentials of a role."""

    access_key: str
    secret_key: str


def may_write(role: str, key: str) -> bool:
    """Whether the table lets a role make or replace an object of the bucket of the runs."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in ROLES[role].writes)


def identities(keys: Mapping[str, Key], bucket: str, sources: Sequence[str] = ()) -> dict[str, Any]:
    """The ``-s3.config`` of a SeaweedFS server.

    Args:
        keys: of the administrator, who makes buckets, and of the roles.
        bucket: of the runs.
        sources: other buckets on this server, with images; the steps may read them.
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
    """One policy with what several roles may do: for an account that all of them share."""
    policies = [policy(role, bucket, sources) for role in roles]
    statements: list[dict[str, Any]] = []
    for statement in (one for each in policies for one in each["Statement"]):
        if statement not in statements:
            statements.append(statement)
    return policies[0] | {"Statement": statements}


def policy(role: str, bucket: str, sources: Sequence[str] = ()) -> dict[str, Any]:
    """The same as a policy document of AWS, which MinIO takes too."""
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
