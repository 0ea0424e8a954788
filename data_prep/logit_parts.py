"""The files of the cache of teacher distributions: whole Parquet files with small row groups (logit_cache.py).

A row group holds about a thousand positions, so one sequence of a large cache is read in about a millisecond.
Byte-stream-split and zstd take the 198 bytes of a position with 32 tokens down to about 105, and cost a training step
nothing that it would notice. Pages carry checksums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recipes.errors import DataError
from recipes.lineage import sha256_json

if TYPE_CHECKING:
    from data_prep.logit_cache import Sparse

REMEDY = "run `retort generate` with the recipe"
GROUP = 1024  # positions of a row group
LISTS = {
    "counts": "uint16", "ids": "uint32", "log_probs": "float16", "weights": "float16", "actual": "float16",
    "tail": "float16",
}  # fmt: skip


class Part:
    """A whole file of a cache: its rows (positions by key) and sums.

    Raises:
        DataError: it cannot be read, or belongs to another cache.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                stated = {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items()}
                content = json.loads(stated.get("retort", "{}"))
                if content.get("about") != sha256_json(dict(about)):
                    raise DataError("is part of another cache", str(path), REMEDY)
                table = file.read(columns=["key", "n"], use_threads=False)
                self.groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise unreadable(path, error) from None
        self.rows = dict(zip(table["key"].to_pylist(), table["n"].to_pylist(), strict=True))
        self.positions, self.head_mass = sum(self.rows.values()), float(content["head_mass"])

    def places(self) -> Iterator[tuple[int, int]]:
        """Row group and row in it, of every row."""
        return ((group, row) for group, count in enumerate(self.groups) for row in range(count))


class Reader:
    """Row groups of many files, by path and number; the last few stay at hand."""

    def __init__(self, groups: int = 32, files: int = 64) -> None:
        self._opened = lru_cache(maxsize=files)(_open)
        self.group = lru_cache(maxsize=groups)(self._read)

    def _read(self, path: Path, group: int) -> Any:
        """A table of the columns in LISTS.

        Raises:
            DataError: it cannot be read.
        """
        import pyarrow as pa

        try:
            return self._opened(path).read_row_group(group, columns=list(LISTS), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) from None


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, page_checksum_verification=True)


def unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot be read ({' '.join(str(error).split())[:120]})", str(path), REMEDY)


def write_part(path: Path, rows: Mapping[str, Sparse], about: str) -> None:
    """Write rows as one file and bring it to the disk.

    Args:
        about: hash of what the cache says that it holds.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "key": pa.array(list(rows), pa.string()),
        "n": pa.array([len(sparse.counts) for sparse in rows.values()], pa.uint32()),
    }
    for name, kind in LISTS.items():
        columns[name] = _list_column([getattr(sparse, name) for sparse in rows.values()], pa.from_numpy_dtype(kind))
    head = sum(float(-np.expm1(sparse.tail.astype(np.float64)).sum()) for sparse in rows.values())
    table = pa.table(columns).replace_schema_metadata({"retort": json.dumps({"about": about, "head_mass": head})})
    positions = sum(len(sparse.counts) for sparse in rows.values())
    with path.open("wb") as stream:
        pq.write_table(
            table,
            stream,
            row_group_size=max(1, len(rows) * GROUP // max(1, positions)),
            compression="zstd",
            use_dictionary=False,
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in LISTS if name != "counts"},
            write_statistics=False,
            write_page_checksum=True,
        )
        stream.flush()
        os.fsync(stream.fileno())


def _list_column(values: Sequence[NDArray[Any] | None], kind: Any) -> Any:
    import pyarrow as pa

    there = [v for v in values if v is not None]
    if not there:
        return pa.nulls(len(values), pa.list_(kind))
    offsets = np.cumsum([0, *map(len, there)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(there), type=kind))
