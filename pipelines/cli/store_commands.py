"""`esvit store`: the embedded store of this machine; and buckets, keys, policies and old runs of any store."""

from __future__ import annotations

import json as json_module
import os
import sys
import time
from typing import Annotated

import typer

from esvit_core.errors import UserError
from esvit_pipelines.cli.options import OutOption
from esvit_pipelines.settings import DEFAULT_BUCKET, DEFAULT_OUT, store_in

DEFAULT_PREFIX = f"s3://{DEFAULT_BUCKET}"

store_app = typer.Typer(help="Manage the object store, which holds all data of the runs.")

BucketName = Annotated[str, typer.Option("--bucket", help="Bucket that holds the runs.")]
SourcesOption = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="BUCKET", help="Another bucket from which the steps read images. Repeatable."),
]


@store_app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@store_app.command()
def start(out: OutOption = DEFAULT_OUT) -> None:
    """Start the embedded store in DIR unless it runs. It keeps running until `esvit store stop`."""
    from esvit_core.storage.embedded import EmbeddedStore

    store = EmbeddedStore(store_in(out))
    address = store.start()
    print(f"running at {address.url}, data in {store_in(out)}")


@store_app.command()
def stop(out: OutOption = DEFAULT_OUT) -> None:
    """Stop the embedded store in DIR."""
    from esvit_core.storage.embedded import EmbeddedStore

    print("stopped" if EmbeddedStore(store_in(out)).stop() else f"no store runs in {store_in(out)}")


@store_app.command()
def status(out: OutOption = DEFAULT_OUT) -> None:
    """Show whether the embedded store in DIR runs, and its address."""
    from esvit_core.storage.embedded import EmbeddedStore

    status = EmbeddedStore(store_in(out)).status()
    if status is None:
        print(f"no store runs in {store_in(out)}")
    else:
        print(f"running at {status.address.url} (process {status.pid}), data in {status.directory}")


@store_app.command()
def ls(
    prefix: Annotated[str, typer.Argument(help="s3://bucket or s3://bucket/prefix.")] = DEFAULT_PREFIX,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """List the objects below a prefix, in the store that ESVIT_S3_ENDPOINT names or else in that of DIR."""
    from esvit_core.storage.session import open_store

    if not os.environ.get("ESVIT_S3_ENDPOINT") and not store_in(out).is_dir():
        raise UserError(f"--out {out}: there is no store; name the folder of a run, or set ESVIT_S3_ENDPOINT")
    with open_store(store_in(out)) as store:
        number = size = 0
        if prefix == DEFAULT_PREFIX:
            store.ensure_bucket(DEFAULT_BUCKET)
        for entry in store.list(prefix):
            print(f"{entry.size:>13,}  {entry.uri}")
            number, size = number + 1, size + entry.size
        print(f"{size:>13,}  bytes in {number} objects")


@store_app.command()
def bucket(
    name: Annotated[str, typer.Argument(help="Name of the bucket.")] = DEFAULT_BUCKET, out: OutOption = DEFAULT_OUT
) -> None:
    """Create a bucket unless it exists, in the store that ESVIT_S3_ENDPOINT names or else in that of DIR."""
    from esvit_core.storage.session import open_store

    with open_store(store_in(out)) as store:
        store.ensure_bucket(name)
    print(f"bucket {name} exists")


@store_app.command()
def keys(
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the pods.")] = "esvit",
    endpoint: Annotated[str, typer.Option("--endpoint", help="Address at which the pods reach the store.")] = "",
    bucket: BucketName = DEFAULT_BUCKET,
    source: SourcesOption = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a vault instead of manifests for kubectl.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Print the keys even on a terminal.")] = False,
) -> None:
    """Generate keys for the store of the manifests, one per kind of step, and print them as Kubernetes secrets.

    Pipe the output into kubectl: esvit store keys | kubectl apply -f -
    """
    from esvit_core.storage.keys import new_keys, secret_manifests, secret_values

    if sys.stdout.isatty() and not force:
        raise UserError(
            "esvit store keys: it prints secret keys, and standard output is a terminal; "
            "pipe the output: esvit store keys | kubectl apply -f -, or add --force"
        )
    address = endpoint or f"http://esvit-object-store.{namespace}.svc:8333"
    values = secret_values(new_keys(), address, bucket, source or ())
    print(json_module.dumps(values, indent=1) if json else secret_manifests(values, namespace), end="")


@store_app.command()
def policies(
    role: Annotated[
        list[str], typer.Argument(metavar="ROLE...", help="prepare, train, evaluate, publish, prune or read.")
    ],
    bucket: BucketName = DEFAULT_BUCKET,
    source: SourcesOption = None,
) -> None:
    """Print what a kind of step may do in the store, as a policy for AWS or MinIO.

    Several kinds are joined into one policy, for a service account that they share.
    """
    from esvit_core.storage.roles import ROLES, joint_policy

    for one in role:
        if one not in ROLES:
            raise UserError(f"role {one}: expected one of {', '.join(ROLES)}")
    print(json_module.dumps(joint_policy(role, bucket, source or ()), indent=2))


@store_app.command()
def prune(
    keep_days: Annotated[float, typer.Option("--keep-days", min=1, help="Keep runs written to within this many days.")],
    keep_last: Annotated[int, typer.Option("--keep-last", min=0, help="Keep this many of the newest runs.")] = 3,
    bucket: BucketName = DEFAULT_BUCKET,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Remove old runs from the store that ESVIT_S3_ENDPOINT names, or else from that of DIR.

    A run is kept if a pointer such as champion, or the history of one, names it, or if a kept run started from it.
    """
    from esvit_core.runs.retention import DAY, UNFINISHED, plan_retention, remove_feature_entries, remove_run
    from esvit_core.storage.session import open_store

    with open_store(store_in(out)) as store:
        runs = plan_retention(store, bucket, keep_days, keep_last)
        freed, removed = 0, set()
        for run in runs:
            text = f"{run.name}  {run.bytes / 1e6:,.1f} MB, {(time.time() - run.modified) / DAY:.1f} days old"
            if run.kept_because:
                print(f"keep    {text}: {run.kept_because}")
            elif dry_run or remove_run(store, run):
                print(f"{'would remove' if dry_run else 'removed'}  {text}")
                removed.add(run.uri)
                freed += run.bytes
            else:
                print(f"keep    {text}: it has changed in the meantime")
        if removed and not dry_run:
            remove_feature_entries(store, bucket, removed)
        uploads = 0 if dry_run else store.abort_uploads(f"s3://{bucket}", UNFINISHED)
    print(
        f"{len(removed)} of {len(runs)} runs {'would be ' if dry_run else ''}removed, {freed / 1e6:,.1f} MB"
        + (f"; parts of {uploads} unfinished uploads removed" if uploads else "")
    )
