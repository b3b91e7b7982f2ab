"""Feature files, written row by row: Parquet for any number of images, or numpy's npz.

Both have the same columns: ``name`` (path below the source), ``label`` (name of the class; none if the source has no class
folders), ``view`` (D,) float32, and ``regions`` (H, W, D').
"""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from esvit_core.errors import UserError

SUFFIXES = (".parquet", ".npz")
_GROUP_BYTES = 32 * 2**20  # per row group, which is kept in memory until it is written


@dataclass(frozen=True)
class Rows:
    """Features of a batch of images.

    Attributes:
        names: paths below the source.
        labels: names of classes; None if there is none.
        view: (B, D) float32.
        regions: (B, H, W, D') float16 or float32; None without regions.
    """

    names: list[str]
    labels: list[str | None]
    view: np.ndarray
    regions: np.ndarray | None

    @property
    def bytes(self) -> int:
        return self.view.nbytes + (0 if self.regions is None else self.regions.nbytes)


class FeatureFile(Protocol):
    """Writer of a feature file."""

    def add(self, rows: Rows) -> None: ...

    def close(self, metadata: dict[str, Any]) -> None:
        """Finish the file; ``metadata`` is stored in it under ``esvit``."""


def open_feature_file(path: Path) -> FeatureFile:
    """Return the writer for the suffix of a path.

    Raises:
        UserError: the suffix is unknown, or pyarrow is missing.
    """
    if path.suffix == ".npz":
        return NpzFile(path)
    if path.suffix != ".parquet":
        raise UserError(f"--out {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    require_pyarrow()
    return ParquetFile(path)


def require_pyarrow() -> None:
    """Check that pyarrow is installed.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UserError("features as Parquet: pyarrow is not installed; pip install 'esvit[export]', or name an .npz")


class ParquetFile:
    """Writes Parquet in row groups of about 32 MiB; views are fixed-size lists, regions fixed-shape tensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[Rows] = []
        self._bytes = 0
        self._writer: Any = None

    def add(self, rows: Rows) -> None:
        self._pending.append(rows)
        self._bytes += rows.bytes
        if self._bytes >= _GROUP_BYTES:
            self._write()

    def close(self, metadata: dict[str, Any]) -> None:
        self._write()
        self._writer.add_key_value_metadata({"esvit": json.dumps(metadata)})
        self._writer.close()

    def _write(self) -> None:
        if not self._pending:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = self._pending
        view = np.concatenate([r.view for r in rows])  # (N, D)
        columns: dict[str, Any] = {
            "name": pa.array([name for r in rows for name in r.names], pa.string()),
            "label": pa.array([label for r in rows for label in r.labels], pa.string()),
            "view": pa.FixedSizeListArray.from_arrays(pa.array(view.ravel()), view.shape[1]),
        }
        if rows[0].regions is not None:
            regions = np.concatenate([r.regions for r in rows if r.regions is not None])  # (N, H, W, D')
            columns["regions"] = pa.FixedShapeTensorArray.from_numpy_ndarray(regions)
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path,
                table.schema,
                compression="none",
                use_dictionary=["label"],
                write_statistics=["name", "label"],
            )
        self._writer.write_table(table, row_group_size=len(table))
        self._pending, self._bytes = [], 0


class NpzFile:
    """Writes numpy's archive of arrays, through temporary files of raw values. Reading an array needs memory for all of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: list[str] = []
        self._labels: list[str] = []
        self._raw: dict[str, BinaryIO] = {}
        self._like: dict[str, np.ndarray] = {}

    def add(self, rows: Rows) -> None:
        self._names += rows.names
        self._labels += [label or "" for label in rows.labels]
        for column, values in (("view", rows.view), ("regions", rows.regions)):
            if values is None:
                continue
            if column not in self._raw:
                self._raw[column] = self._path.with_suffix(f".{column}").open("w+b")
                self._like[column] = values[:0]
            self._raw[column].write(np.ascontiguousarray(values).data)

    def close(self, metadata: dict[str, Any]) -> None:
        texts = {
            "name": np.array(self._names),
            "label": np.array(self._labels),
            "esvit": np.array(json.dumps(metadata)),
        }
        with zipfile.ZipFile(self._path, "w") as archive:
            for column, text in texts.items():
                with self._member(archive, column, zipfile.ZIP_DEFLATED) as member:
                    np.lib.format.write_array(member, text, allow_pickle=False)
            for column, raw in self._raw.items():
                like = self._like[column]
                header = {"descr": like.dtype.str, "fortran_order": False, "shape": (len(self._names), *like.shape[1:])}
                with self._member(archive, column, zipfile.ZIP_STORED) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    raw.seek(0)
                    shutil.copyfileobj(raw, member, 2**20)
                raw.close()

    @staticmethod
    def _member(archive: zipfile.ZipFile, column: str, compression: int) -> Any:
        info = zipfile.ZipInfo(f"{column}.npy")
        info.compress_type = compression
        return archive.open(info, "w", force_zip64=True)
