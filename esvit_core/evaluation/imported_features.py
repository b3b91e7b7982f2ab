"""Features from a file instead of a network: a run that evaluates what ``esvit embed`` or another tool has written.

A file has a row per image: its name, below the folder of the images, and its feature. Rows are matched with the images of a
run by name. Such a run has no network, so it has no baseline of initial weights either.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import NotFound

SUFFIXES = (".parquet", ".npz", ".npy")
KIND = "named-features"
NO_NETWORK = "the run evaluates a file of features, and this needs the network"
_NAMES, _FEATURES = ("name", "path"), ("view", "features")
_COLUMN = re.compile(r"f(\d+)")
_ARRAYS, _LIST = "features.safetensors", "names.json"
_LIMIT_SHOWN = 3


@dataclass(frozen=True)
class NamedFeatures:
    """Features by the name of the image.

    Attributes:
        origin: the file, for messages.
        names: (N,), each once.
        view: (N, D) float32, finite.
    """

    origin: str
    names: list[str]
    view: np.ndarray


def is_features_file(model: str) -> bool:
    """Return whether a model is named by a file of features."""
    return model.endswith(SUFFIXES)


def read_features_file(path: Path, origin: str) -> NamedFeatures:
    """Read names and features.

    Parquet: a column ``name`` or ``path``, and a list column ``view`` or ``features`` or columns ``f0``, ``f1``, ...; other
    columns are ignored. An npz has arrays of these names. A ``.npy`` has the features, and a ``.txt`` of the same name beside it
    one name per line.

    Args:
        path: the file.
        origin: its name in messages.

    Raises:
        UserError: the file cannot be read, names are missing or repeated, or features are not finite or have several lengths.
    """
    try:
        names, view = {".parquet": _of_parquet, ".npz": _of_npz, ".npy": _of_npy}[path.suffix](path, origin)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"features {origin}: it cannot be read ({reason}); write it again") from None
    if view.ndim != 2 or not view.size or not np.issubdtype(view.dtype, np.number):
        raise UserError(f"features {origin}: expected numbers of shape (images, values), got {view.dtype} {view.shape}")
    if len(names) != len(view):
        raise UserError(f"features {origin}: it has {len(names):,} names and {len(view):,} features; expected one each")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(
            f"features {origin}: {len(repeated):,} of {len(set(names)):,} names occur more than once, {_shown(repeated)}; "
            "write one row per image"
        )
    view = np.ascontiguousarray(view, np.float32)
    bad = np.flatnonzero(~np.isfinite(view).all(1))
    if len(bad):
        raise UserError(
            f"features {origin}: {len(bad):,} of {len(view):,} rows have NaN or infinite values, "
            f"{_shown([names[i] for i in bad[:_LIMIT_SHOWN]])}; compute them again, in float32"
        )
    return NamedFeatures(origin, names, view)


def publish_named_features(store: ObjectStore, prefix: str, features: NamedFeatures) -> None:
    """Keep features in a run, in the place of a backbone; ``values`` of the manifest is their number per image."""
    names = json.dumps({"origin": features.origin, "names": features.names}, ensure_ascii=False)
    files = {_ARRAYS: save({"view": features.view}), _LIST: names.encode()}
    store.publish(prefix, files, KIND, {"values": features.view.shape[1]})


def read_named_features(store: ObjectStore, prefix: str) -> NamedFeatures:
    """Read what :func:`publish_named_features` has kept."""
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        store.fetch(prefix, Path(folder))
        listed = json.loads((Path(folder) / _LIST).read_text(encoding="utf-8"))
        return NamedFeatures(listed["origin"], listed["names"], load_file(Path(folder) / _ARRAYS)["view"])


def has_network(store: ObjectStore, run_uri: str) -> bool:
    """Return whether a run has a network; False if it evaluates a file of features."""
    try:
        manifest = store.read_manifest(join_uri(run_uri, "backbone"))
    except NotFound:
        return True
    return manifest is None or manifest["format"] != f"esvit-{KIND}/1"


def match_features(features: NamedFeatures, names: Sequence[str]) -> np.ndarray:
    """Return the features of images in their order, (M, D).

    The names in the file may all lie in one more folder than those of the images, such as ``/data/cat/1.png`` for
    ``cat/1.png``. Rows of other images are ignored.

    Args:
        names: names of the images below their source, (M,).

    Raises:
        UserError: images have no row.
    """
    row = {name: i for i, name in enumerate(features.names)}
    folder = _common_folder(features.names, names, row)
    missing = [name for name in names if folder + name not in row]
    if missing:
        raise UserError(
            f"features {features.origin}: {len(missing):,} of {len(names):,} images have no row, {_shown(missing)}, and "
            f"the file has names {_shown(features.names)}; write every image under its name below the folder of the images"
        )
    return features.view[[row[folder + name] for name in names]]


def _common_folder(rows: Sequence[str], names: Sequence[str], row: dict[str, int]) -> str:
    """Return the folder below which the file has the most of the images; empty if it has any without one."""
    if any(name in row for name in names):
        return ""
    for name in names[:_LIMIT_SHOWN]:
        folders = {each.removesuffix(name) for each in rows if each.endswith(f"/{name}")}
        if folders:
            return max(sorted(folders), key=lambda folder: sum(folder + one in row for one in names))
    return ""


def _of_parquet(path: Path, origin: str) -> tuple[list[str], np.ndarray]:
    if find_spec("pyarrow") is None:
        raise UserError(f"features {origin}: pyarrow is not installed; pip install 'esvit[export]', or give an .npz")
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    name, columns = _columns(file.schema_arrow.names, origin)
    table = file.read([name, *columns])
    names = _checked_names(table[name].to_pylist(), origin)
    if columns[0] not in _FEATURES:
        return names, np.stack([table[column].to_numpy().astype(np.float32) for column in columns], 1)
    return names, _of_lists(table[columns[0]], names, origin)


def _of_lists(column: Any, names: list[str], origin: str) -> np.ndarray:
    """Return the values of a column of lists, (N, D); a null becomes NaN."""
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()  # (N,)
    width = int(np.bincount(lengths).argmax()) if len(lengths) else 0
    other = np.flatnonzero(lengths != width)
    if len(other):
        found = ", ".join(f"{names[i]} with {lengths[i]}" for i in other[:_LIMIT_SHOWN])
        raise UserError(
            f"features {origin}: {len(other):,} of {len(names):,} rows do not have {width:,} values as the others, such as "
            f"{found}; write features of one length"
        )
    return np.asarray(pc.list_flatten(column).to_numpy()).reshape(len(names), width)


def _of_npz(path: Path, origin: str) -> tuple[list[str], np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        name, columns = _columns(list(arrays), origin)
        names = _checked_names(arrays[name].tolist(), origin)
        if columns[0] in _FEATURES:
            return names, arrays[columns[0]]
        return names, np.stack([arrays[column] for column in columns], 1)


def _of_npy(path: Path, origin: str) -> tuple[list[str], np.ndarray]:
    listed = path.with_suffix(".txt")
    if not listed.is_file():
        raise UserError(f"features {origin}: it has no names; expected {listed.name} beside it, one name per line")
    return listed.read_text(encoding="utf-8").splitlines(), np.load(path, allow_pickle=False)


def _columns(present: Sequence[str], origin: str) -> tuple[str, list[str]]:
    """Return the column of the names and those of the features."""
    name = next((column for column in _NAMES if column in present), None)
    numbered = sorted((column for column in present if _COLUMN.fullmatch(column)), key=lambda each: int(each[1:]))
    listed = [column for column in _FEATURES if column in present]
    if name is None or not (listed or numbered):
        raise UserError(
            f"features {origin}: expected a column name or path, and view, features or f0, f1, ...; it has "
            f"{', '.join(present[:10]) or 'no columns'}"
        )
    missing = next((i for i, column in enumerate(numbered) if column != f"f{i}"), None)
    if not listed and missing is not None:
        raise UserError(f"features {origin}: column f{missing} is missing; expected f0 to f{len(numbered) - 1}")
    return name, listed[:1] or numbered


def _checked_names(names: list[Any], origin: str) -> list[str]:
    bad = sum(not isinstance(name, str) or not name for name in names)
    if bad:
        raise UserError(f"features {origin}: {bad:,} of {len(names):,} rows have no name; write the path of each image")
    return names


def _shown(names: Sequence[str]) -> str:
    return f"such as {', '.join(names[:_LIMIT_SHOWN])}"
