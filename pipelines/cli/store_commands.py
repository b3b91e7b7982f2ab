"""`esvit store` for a store on a cluster: its bucket, its keys, the policies of its users, and old runs."""

from __future__ import annotations

import json as json_module
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from esvit_core.errors import UserError
from esvit_pipelines.cli.settings import DEFAULT_OUT, store_in

BucketName = Annotated[str, typer.Option("--bucket", help="Bucket of the runs.")]
SourcesOption = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="BUCKET", help="Another bucket, with images, that the steps read. Repeatable."),
]


def bucket(
    name: Annotated[str, typer.Argument(help="Of the bucket to make.")] = "esvit", out: Path = DEFAULT_OUT
) -> None:
    """Make a bucket unless it exists, in the store of DIR or in the one that ESVIT_S3_ENDPOINT names."""
    from esvit_core.storage.session import open_store

    with open_store(store_in(out)) as store:
        store.ensure_bucket(name)
    print(f"bucket {name} is there")


def keys(
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Of the pods.")] = "esvit",
    endpoint: Annotated[str, typer.Option("--endpoint", help="Where the pods reach the store.")] = "",
    bucket: BucketName = "esvit",
    source: SourcesOption = None,
    json: Annotated[bool, typer.Option("--json", help="For a vault, not for kubectl.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Print them on a terminal, too.")] = False,
) -> None:
    """Make new keys for the store of the manifests, one per kind of step, and print them as Kubernetes secrets.

    They go through a pipe: esvit store keys | kubectl apply -f -
    """
    from esvit_core.storage.keys import new_keys, secret_manifests, secret_values

    if sys.stdout.isatty() and not force:
        raise UserError(
            "esvit store keys: prints secret keys, and this is a terminal; "
            "pipe it: esvit store keys | kubectl apply -f -, or add --force"
        )
    place = endpoint or f"http://esvit-object-store.{namespace}.svc:8333"
    values = secret_values(new_keys(), place, bucket, source or ())
    print(json_module.dumps(values, indent=1) if json else secret_manifests(values, namespace), end="")


def policies(
    role: Annotated[
        list[str], typer.Argument(metavar="ROLE...", help="prepare, train, evaluate, publish, prune or read.")
    ],
    bucket: BucketName = "esvit",
    source: SourcesOption = None,
) -> None:
    """Print what a kind of step may do in the store as a policy for AWS or MinIO.

    Several kinds make one policy: for a service account that they share, as all steps of a run do.
    """
    from esvit_core.storage.roles import ROLES, joint_policy

    for one in role:
        if one not in ROLES:
            raise UserError(f"role {one}: expected one of {', '.join(ROLES)}")
    print(json_module.dumps(joint_policy(role, bucket, source or ()), indent=2))


def prune(
    keep_days: Annotated[float, typer.Option("--keep-days", min=1, help="Runs written to within so many days stay.")],
    keep_last: Annotated[int, typer.Option("--keep-last", min=0, help="The newest runs stay, so many.")] = 3,
    bucket: BucketName = "esvit",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the store of this machine.")
    ] = DEFAULT_OUT,
) -> None:
    """Remove old runs from the store of DIR, or from the one that ESVIT_S3_ENDPOINT names.

    A run stays if a pointer such as champion, or the history of one, names it, or if a run that stays started from it.
    """
    from esvit_core.runs.retention import DAY, UNFINISHED, judge_runs, remove_run
    from esvit_core.storage.session import open_store

    with open_store(store_in(out)) as store:
        runs = judge_runs(store, bucket, keep_days, keep_last)
        freed = number = 0
        for run in runs:
            told = f"{run.name}  {run.bytes / 1e6:,.1f} MB, {(time.time() - run.touched) / DAY:.1f} days old"
            if run.kept:
                print(f"keep    {told}: {run.kept}")
            elif dry_run or remove_run(store, run):
                print(f"{'would remove' if dry_run else 'removed'}  {told}")
                number, freed = number + 1, freed + run.bytes
            else:
                print(f"keep    {told}: it has changed meanwhile")
        uploads = 0 if dry_run else store.abort_uploads(f"s3://{bucket}", UNFINISHED)
    print(
        f"{number} of {len(runs)} runs {'would be ' if dry_run else ''}removed, {freed / 1e6:,.1f} MB"
        + (f"; parts of {uploads} unfinished uploads removed" if uploads else "")
    )
