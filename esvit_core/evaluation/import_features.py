"""Start a run that evaluates a file of features instead of a network."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from esvit_core.config import Config, InitConfig
from esvit_core.data.ingest.sources import source_fingerprint
from esvit_core.errors import UserError
from esvit_core.evaluation.imported_features import publish_named_features, read_features_file
from esvit_core.runs.run import MEASURED, Run, run_id, run_uri, start_run
from esvit_core.storage import NotFound, ObjectStore
from esvit_core.storage.parallel_transfer import sha256_of

_RECIPE = "evaluate features"


def import_features(file: str, source: str, config: Config, uri: str, store: ObjectStore, setting: str) -> Run:
    """Start a run with the features of a file, or return the run that was started with the same arguments.

    Args:
        file: a path, or an ``s3://`` address, of a file that
            :func:`~esvit_core.evaluation.imported_features.read_features_file` reads.
        source: images that the features are of.
        config: protocols and data; its sections ``model`` and ``init`` are not used.
        uri: address of the run; empty: derived from file, configuration and data.
        store: object store.
        setting: what the file was given as, for error messages.

    Raises:
        UserError: there is no such file, its content cannot be used, or the run exists with another configuration.
    """
    config = config.model_copy(update={"recipe": _RECIPE, "init": InitConfig()})
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = _local_copy(file, Path(folder), store, setting)
        digest = sha256_of(path)
        if not uri:
            prints = {s.name: source_fingerprint(s.source) for s in config.evaluation.transfer}
            name = run_id(config, f"{source_fingerprint(source)}\nfeatures {digest}", prints)
            uri = run_uri(config.bucket, name)
        run = Run(uri, store, config)
        manifest = store.read_manifest(run.at("backbone"))
        features = read_features_file(path, file) if manifest is None else None
        location = file if file.startswith("s3://") else str(path.resolve())
    run = start_run(config, source, uri, store)
    if features is not None:
        publish_named_features(store, run.at("backbone"), features)
        print(f"features {file}: {len(features.names):,} images, {features.view.shape[1]:,} values each", flush=True)
    record = {"backbone": location, "sha256": digest, "features": True}
    store.put_if_absent(run.at(MEASURED), (json.dumps(record, indent=1) + "\n").encode())
    return run


def _local_copy(file: str, folder: Path, store: ObjectStore, setting: str) -> Path:
    if not file.startswith("s3://"):
        if not Path(file).is_file():
            raise UserError(f"{setting} {file}: no such file; expected features as .parquet, .npz or .npy")
        return Path(file)
    path = folder / file.rpartition("/")[2]
    try:
        store.get_file(file, path)
    except NotFound:
        raise UserError(f"{setting} {file}: there is no such object") from None
    return path
