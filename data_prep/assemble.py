"""The prepared data as it is handed on: shards, dropped rows, counts and statistics; and reading it back."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.decide import Decided
from data_prep.mask_pass import Part, part_schema
from data_prep.read_pass import Block
from recipes.errors import RetortError

SHARD_ROWS = 50_000
STATISTICS = "statistics.json"
PERCENTILES = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
BARS = 40  # bars of a length histogram
NAMES = ("train", "eval")
SHOWN_OVERLAPS = 20


def write(
    folder: Path, blocks: Sequence[Block], parts: Sequence[Part], decided: Decided, seq_len: int
) -> dict[str, Any]:
    """Write shards, dropped.jsonl and statistics.json; returns the counts for the manifest.

    Args:
        blocks: of pass one, in order; those of benchmarks have no part.
        parts: of pass two, in the order of the other blocks.

    Raises:
        RetortError: a row came in and went nowhere.
    """
    own = [block for block in blocks if block.role != "benchmark"]
    for name in (*NAMES, "requests"):
        _write_shards(folder, name, parts)
    with (folder / "dropped.jsonl").open("wb") as out:
        for block, part in zip(own, parts, strict=True):
            for path in (block.folder / "dropped.jsonl", part.folder / "dropped.jsonl"):
                with path.open("rb") as lines:
                    shutil.copyfileobj(lines, out)
    lengths = {name: np.concatenate([part.lengths(name) for part in parts]) for name in NAMES}
    counts = _counts(own, parts, lengths, seq_len)
    shown = {
        "lengths": {name: histogram(values) for name, values in lengths.items() if len(values)},
        "sources": _by_source(own, parts),
        "clusters": decided.clusters,
        "groups": decided.groups,
        "overlaps": _overlaps(parts),
    }
    (folder / STATISTICS).write_text(json.dumps(shown, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return counts


def _write_shards(folder: Path, name: str, parts: Sequence[Part]) -> None:
    """Join the parts into shards of about SHARD_ROWS rows, one row group at a time."""
    import pyarrow.parquet as pq

    writer, shard, room = None, 0, 0
    for part in parts:
        file = pq.ParquetFile(part.folder / f"{name}.parquet")
        for group in range(file.num_row_groups):
            if writer is None or room <= 0:
                if writer is not None:
                    writer.close()
                path = folder / f"{name}-{shard:05d}.parquet"
                writer, shard, room = pq.ParquetWriter(path, part_schema(), compression="zstd"), shard + 1, SHARD_ROWS
            table = file.read_row_group(group)
            writer.write_table(table)
            room -= len(table)
    if writer is not None:
        writer.close()


def dropped(blocks: Iterable[Block], parts: Iterable[Part]) -> Counter[str]:
    """Dropped rows by reason, over both passes."""
    own = [block.statistics["dropped"] for block in blocks if block.role != "benchmark"]
    return sum((Counter(found) for found in (*own, *(part.statistics["dropped"] for part in parts))), Counter())


def _overlaps(parts: Sequence[Part]) -> dict[str, Any]:
    """Held-out and benchmark items that training rows overlapped with: how many, and those with most such rows."""
    found: Counter[str] = sum((Counter(part.statistics["overlaps"]) for part in parts), Counter())
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_OVERLAPS]
    return {"items": len(found), "most": [{"item": item, "rows": rows} for item, rows in most]}


def _by_source(blocks: Sequence[Block], parts: Sequence[Part]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for block, part in zip(blocks, parts, strict=True):
        key = (block.role, block.statistics["source"])
        line = found.setdefault(
            key, {"role": key[0], "source": key[1], "rows_in": 0, "train": 0, "eval": 0, "dropped": {}}
        )
        line["rows_in"] += block.statistics["rows_in"]
        for name in NAMES:
            line[name] += part.statistics["rows"][name]
        line["dropped"] = dict(sorted((Counter(line["dropped"]) + dropped([block], [part])).items()))
    return list(found.values())


def _counts(
    blocks: Sequence[Block], parts: Sequence[Part], lengths: dict[str, NDArray[np.int32]], seq_len: int
) -> dict[str, Any]:
    def total(name: str) -> int:
        return sum(int(part.statistics[name]) for part in parts)

    rows_in = sum(block.statistics["rows_in"] for block in blocks)
    rows_out = sum(part.statistics["rows"][name] for part in parts for name in NAMES)
    lines = {name: sum(int(part.statistics["lines"][name]) for part in parts) for name in NAMES}
    out = dropped(blocks, parts)
    if rows_in != rows_out + out.total():
        raise RetortError(f"{rows_in} rows came in, {rows_out} + {out.total()} left: a row was lost")
    train = lengths["train"]
    return {
        "rows_in": rows_in,
        "rows_out": rows_out,
        "dropped": dict(sorted(out.items())),
        "train_rows": lines["train"],
        "eval_rows": lines["eval"],
        "train_tokens": int(train.sum(dtype=np.int64)),
        "trained_tokens": sum(int(part.statistics["trained_tokens"]["train"]) for part in parts),
        "eval_tokens": int(lengths["eval"].sum(dtype=np.int64)),
        "packs": count_packs(train, seq_len),
        "length": percentiles(train),
        "requests": total("requests"),
        "truncated_rows": total("truncated_rows"),
        "lost_tokens": total("lost_tokens"),
    }


def histogram(values: NDArray[np.int32]) -> dict[str, Any]:
    """Counts of lengths in equal bars from 0 to the longest, and their percentiles."""
    width = max(1, -(-int(values.max()) // BARS))
    counts = np.bincount((values - 1) // width, minlength=1).tolist()
    return {"width": width, "counts": counts, "percentiles": percentiles(values)}


def percentiles(values: NDArray[np.int32]) -> dict[str, int]:
    """Shortest, median, 90 %, 99 % and longest; zeros where there are no values."""
    found = np.percentile(values, list(PERCENTILES.values())) if len(values) else [0] * len(PERCENTILES)
    return {name: int(value) for name, value in zip(PERCENTILES, found, strict=True)}


def count_packs(lengths: Iterable[int] | NDArray[np.int32], seq_len: int) -> int:
    """How many sequences of `seq_len` tokens best-fit-decreasing packing makes of rows; no row is cut.

    Open packs are counted by the room that is left in them; a bit set of those rooms finds the tightest fit.
    """
    rows = np.bincount(np.fromiter(lengths, dtype=np.int64), minlength=1)
    open_packs = [0] * (seq_len + 1)
    rooms = packs = 0
    for length in np.flatnonzero(rows)[::-1].tolist():
        for _ in range(int(rows[length])):
            fitting = rooms >> length
            if fitting:
                room = length + ((fitting & -fitting).bit_length() - 1)
                open_packs[room] -= 1
                if not open_packs[room]:
                    rooms &= ~(1 << room)
            else:
                room = seq_len
                packs += 1
            left = room - length
            if left:
                open_packs[left] += 1
                rooms |= 1 << left
    return packs


def shards(folder: Path, name: str) -> list[Path]:
    """Files of `train`, `eval` or `requests` of prepared data, in order."""
    return sorted(folder.glob(f"{name}-*.parquet"))


def read_rows(folder: Path, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of `train`, `eval` or `requests` of prepared data, with their free-form parts decoded from JSON.

    Args:
        limit: read the first rows alone.
    """
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for path in shards(folder, name):
        for batch in pq.ParquetFile(path).iter_batches(2048):
            rows += batch.to_pylist()
            if limit is not None and len(rows) >= limit:
                break
    for row in rows[:limit]:
        for part in ("messages", "tools", "chosen", "rejected", "extra"):
            row[part] = json.loads(row[part]) if row[part] else None
    return rows[:limit]
