"""`esvit export`, `esvit embed` and `esvit search`: commands that use a published backbone."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_core.data.ingest.source_lists import split_sources
from esvit_core.errors import UserError
from esvit_core.storage.session import open_store
from esvit_pipelines.settings import store_in

if TYPE_CHECKING:
    from torch import nn

    from esvit_core.storage import ObjectStore
    from esvit_core.weights.formats.export import Exported

PUBLISHED = "published"
_POINTER = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def export(model: str, format: str, out: Path, regions: bool, runs: Path) -> None:
    """Export a backbone to another format, and print how closely the result matches.

    Args:
        model: pointer, ``s3://`` prefix, folder, or a file that `esvit import` accepts.
        runs: folder of the runs on this machine, whose store is searched.

    Raises:
        UserError: the backbone does not exist, or it cannot be exported.
    """
    from esvit_core.storage.atomic_write import require_absent

    require_absent(out)
    with _store_for(runs, model) as store:
        done = _published(model, out, store) if format == PUBLISHED else _exported(model, format, out, regions, store)
    print(f"{done.path}  {done.bytes / 2**20:,.1f} MiB\n{done.summary}\n\nUse it:")
    for line in done.usage:
        print(f"    {line}")


def embed(model: str, data: str, out: Path, settings: dict[str, Any], runs: Path) -> None:
    """Compute the features of images, write them to a file, and print a summary.

    Args:
        model: pointer, ``s3://`` prefix, folder, or a file that `esvit import` accepts.
        data: folder, archive or ``s3://`` prefix.
        settings: fields of :class:`~esvit_core.embedding.embed.EmbedSettings`, by name.
        runs: folder of the runs on this machine, whose store is searched.

    Raises:
        UserError: the backbone or the images do not exist, or the file cannot be written.
    """
    from esvit_core.data.ingest.sources import check_source
    from esvit_core.embedding.feature_files import SUFFIXES
    from esvit_core.storage.atomic_write import require_absent

    require_absent(out, SUFFIXES)
    with _store_for(runs, model, data) as store:
        check_source(data)
        from esvit_core.torch_private import import_timm_without_dynamo

        import_timm_without_dynamo()
        from esvit_core.embedding.embed import EmbedSettings
        from esvit_core.embedding.embed import embed as embed_images

        done = embed_images(_load(model, store), data, out, EmbedSettings(**settings), store)
    print(f"{done.path}  {done.describe()}\n\nUse it:")
    for line in done.usage:
        print(f"    {line}")


def search(model: str, data: str, queries: list[str], out: Path, count: int, runs: Path) -> None:
    """Find the images that are most similar to each query; print them, and write a contact sheet.

    Args:
        model: pointer, ``s3://`` prefix, folder, or a file that `esvit import` accepts.
        data: folder, archive or ``s3://`` prefix.
        queries: files, or names of images of ``data``.
        out: image to write.
        count: number of images per query.
        runs: folder of the runs on this machine, whose store is searched.

    Raises:
        UserError: the backbone, the images or a query do not exist, or the file cannot be written.
    """
    from esvit_core.data.image_sheet import save_sheet
    from esvit_core.data.ingest.sources import check_source

    with _store_for(runs, model, data) as store:
        check_source(data)
        from esvit_core.torch_private import import_timm_without_dynamo

        import_timm_without_dynamo()
        from esvit_core.embedding.search import search as search_images

        found = search_images(_load(model, store), data, queries, count, store)
    save_sheet(found.sheet, out)
    for query, matches in zip(found.queries, found.matches, strict=True):
        print(f"\n{query}")
        width = max((len(match.name) for match in matches), default=0)
        for number, match in enumerate(matches, 1):
            print(f"{number:4}  {match.similarity:.3f}  {match.name:{width}}  {match.label}".rstrip())
    print(f"\nsheet  {out}")


def _exported(model: str, format: str, out: Path, regions: bool, store: ObjectStore | None) -> Exported:
    from esvit_core.weights.formats.export import export_backbone, format_named

    format_named(format)
    return export_backbone(_load(model, store), format, out, regions)


def _published(model: str, out: Path, store: ObjectStore | None) -> Exported:
    """Export the training checkpoint of the run that ``model`` is or comes from."""
    from esvit_core.runs.run import CONFIG, open_run
    from esvit_core.storage import join_uri
    from esvit_core.training.esvit_export import export_published
    from esvit_core.weights.backbone import load_backbone

    if store is None:
        raise UserError(
            f"{model}: format {PUBLISHED} contains student, teacher, heads and optimizer, which a backbone lacks; "
            "name the run, s3://bucket/runs/<run id>, or champion"
        )
    if model.startswith("s3://") and store.exists(join_uri(model, CONFIG)):
        return export_published(open_run(model, store), out)
    description: Any = load_backbone(model, store).backbone_config
    if "run" not in description:
        raise UserError(
            f"{model}: no {PUBLISHED} checkpoint can be written, because the backbone does not name the run that trained it; "
            "name the run, s3://bucket/runs/<run id>"
        )
    return export_published(open_run(description["run"], store), out)


def _load(model: str, store: ObjectStore | None) -> nn.Module:
    """Load a backbone, also from a weights file of the published code or of timm."""
    from esvit_core.weights.backbone import load_backbone

    if not Path(model).is_file():
        return load_backbone(model, store)
    from esvit_core.weights.import_checkpoint import import_weights

    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        imported = import_weights(model, folder)
        print("\n".join(imported.messages), flush=True)
        return load_backbone(imported.backbone)


@contextmanager
def _store_for(runs: Path, model: str, data: str = "") -> Iterator[ObjectStore | None]:
    """Open the object store if ``model`` or ``data`` lies in one: that of ESVIT_S3_ENDPOINT, or that of ``runs``."""
    remote = [address for address in (model, *split_sources(data)) if address.startswith("s3://")]
    if _is_pointer(model):
        remote.append(model)
    directory: Any = None
    if not remote or os.environ.get("ESVIT_S3_ENDPOINT"):
        pass
    elif store_in(runs).is_dir():
        directory = store_in(runs)
    elif os.environ.get("ESVIT_STORE_DIR"):
        directory = Path(os.environ["ESVIT_STORE_DIR"])
    else:
        raise UserError(
            f"{remote[0]}: no object store is configured, and there is none in {store_in(runs)}; "
            "name the folder of a run with --runs, or set ESVIT_S3_ENDPOINT and its keys"
        )
    with open_store(directory) if remote else nullcontext() as store:
        yield store


def _is_pointer(model: str) -> bool:
    return bool(_POINTER.fullmatch(model)) and not Path(model).exists()
