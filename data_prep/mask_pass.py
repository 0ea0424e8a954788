"""Pass two over a block: the rows that are left -> contamination check -> token ids with a loss mask -> Parquet parts.
Memory stays flat: a batch of rows is held, never a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cache import entry, entry_key, make_entry, statistics
from data_prep.decide import BY_ROW_STEP, EVAL, TRAIN, Decision, reason_of
from data_prep.lines import Line, lines_of, trained
from data_prep.masks import Masked
from data_prep.read_pass import Block, open_drops, row_schema, write_drop
from data_prep.requests import requests_of
from data_prep.rows import STORED, Row, decode, encode
from data_prep.steps import Drop
from data_prep.tokens import shared_tokenizer
from recipes.errors import DataError
from recipes.schema import Recipe

PARTS = {TRAIN: "train", EVAL: "eval"}
HELD_OUT = "_held_out"  # column of requests that were made of a held-out passage


@dataclass(frozen=True)
class MaskJob:
    """A block, what was decided about its rows, and how they are to be tokenised.

    Attributes:
        tokenizer: fingerprint of the tokenizer, chat template included.
        index: folder of the contamination index, None where nothing is compared.
    """

    block: Block
    decision: Decision
    recipe: Recipe
    cache: Path
    tokenizer: str
    index: Path | None = None

    @property
    def key(self) -> str:
        data = self.recipe.data
        asked: list[Any] = [data.train_on, data.too_long, data.on_bad_row, self.recipe.longest_row]
        asked += [self.recipe.method.kinds, [task.model_dump() for task in data.requests]]
        index = self.index.name if self.index is not None else None
        kwargs = self.recipe.model.template_kwargs
        content = self.block.statistics["sha256"]
        return entry_key(content, self.block.role, self.decision.key, asked, kwargs, self.tokenizer, index)


@dataclass(frozen=True)
class Part:
    """The tokenised rows of a block.

    Attributes:
        statistics: rows (kept, by part), lines (made of them, by part),
            dropped (by reason), overlaps (dropped rows, by the item that they overlap with), truncated_rows,
            lost_tokens, trained_tokens.
    """

    folder: Path
    statistics: dict[str, Any]

    def lengths(self, name: str) -> NDArray[np.int32]:
        """Tokens of every sequence of `train` or `eval`; a pair has two."""
        return np.fromfile(self.folder / f"{name}.lengths", dtype=np.int32)


def mask_block(job: MaskJob) -> Part:
    """Do pass two for a block, or find it done.

    Raises:
        DataError: a row whose mask cannot be derived, or that is too long, where the recipe says to stop.
    """
    folder = make_entry(entry(job.cache, "tokens", job.key), lambda fresh: _Pass(job, fresh).run())
    return Part(folder, statistics(folder))


@lru_cache(maxsize=1)
def _index(folder: Path) -> Any:
    from data_prep.decontaminate import Index

    return Index.load(folder)


class _Pass:
    """One run over one block."""

    def __init__(self, job: MaskJob, folder: Path) -> None:
        self.job, self.folder, self.recipe = job, folder, job.recipe
        self.tokenizer = shared_tokenizer(job.recipe.model)
        self.dropped: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.truncated = self.lost = self.requests = 0
        self.trained: Counter[str] = Counter()
        self.overlaps: Counter[str] = Counter()

    def run(self) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = part_schema()
        with (
            open_drops(self.folder) as drops,
            pq.ParquetWriter(self.folder / "train.parquet", schema, compression="zstd") as train,
            pq.ParquetWriter(self.folder / "eval.parquet", schema, compression="zstd") as held_out,
            pq.ParquetWriter(self.folder / "requests.parquet", schema, compression="zstd") as requests,
            (self.folder / "train.lengths").open("wb") as train_lengths,
            (self.folder / "eval.lengths").open("wb") as eval_lengths,
        ):
            writers = {"train": (train, train_lengths), "eval": (held_out, eval_lengths)}
            for batch in self._batches(drops):
                for code, group in groupby(sorted(batch, key=lambda item: item[0]), key=lambda item: item[0]):
                    rows = [row for _, row in group]
                    if asked := [request for row in rows for request in self._requests(PARTS[code], row)]:
                        requests.write_table(pa.Table.from_pylist(asked, schema=schema))
                    if made := list(self._lines(PARTS[code], rows, drops)):
                        writer, lengths = writers[PARTS[code]]
                        writer.write_table(pa.Table.from_pylist(made, schema=schema))
                        found = [len(m[k]) for m in made for k in ("input_ids", "rejected_ids") if m[k] is not None]
                        lengths.write(np.array(found, dtype=np.int32).tobytes())
                        self.lines[PARTS[code]] += len(made)
        return {
            "rows": {name: self.rows[name] for name in PARTS.values()},
            "lines": {name: self.lines[name] for name in PARTS.values()},
            "requests": self.requests,
            "dropped": dict(sorted(self.dropped.items())),
            "overlaps": dict(sorted(self.overlaps.items())),
            "truncated_rows": self.truncated,
            "lost_tokens": self.lost,
            "trained_tokens": {name: self.trained[name] for name in PARTS.values()},
        }

    def _batches(self, drops: IO[str]) -> Iterator[list[tuple[int, Row]]]:
        """Rows that were decided to be kept, with the part they belong to; the others are written to `drops`."""
        number = 0
        role = TRAIN if self.job.block.role == "train" else EVAL
        for stored in self.job.block.batches():
            kept = []
            for columns in stored:
                code, detail = int(self.job.decision.codes[number]), self.job.decision.details.get(number, "")
                number += 1
                row = decode(columns)
                if code in PARTS:
                    kept.append((max(code, role), row))
                elif code == BY_ROW_STEP:
                    self._drop(drops, row, Drop(columns["_reason"], columns["_detail"]))
                else:
                    self._drop(drops, row, Drop(reason_of(code), detail))
            yield self._uncontaminated(kept, drops)

    def _uncontaminated(self, kept: list[tuple[int, Row]], drops: IO[str]) -> list[tuple[int, Row]]:
        if self.job.index is None:
            return kept
        rows = [row for code, row in kept if code == TRAIN]
        found = dict(zip(map(id, rows), _index(self.job.index).overlaps([texts_of(row) for row in rows]), strict=True))
        clean = []
        for code, row in kept:
            overlap = found.get(id(row))
            if overlap is None:
                clean.append((code, row))
            else:
                self.overlaps[overlap.source] += 1
                detail = f"{overlap.kind} of {overlap.source}, {overlap.share:.0%}: {overlap.shared}"
                self._drop(drops, row, Drop("contaminated", detail))
        return clean

    def _drop(self, drops: IO[str], row: Row, drop: Drop) -> None:
        write_drop(drops, row.source, drop, row)
        self.dropped[drop.reason] += 1

    def _requests(self, name: str, row: Row) -> Iterator[dict[str, Any]]:
        """What a teacher is asked of a passage; nothing of other rows."""
        if row.text is None or not self.recipe.data.requests:
            return
        self.rows[name] += 1
        for request in requests_of(row, self.recipe.data.requests):
            self.requests += 1
            if name == "eval":
                request = replace(request, extra={**request.extra, HELD_OUT: True})
            yield {**encode(request), "input_ids": [], "loss_mask": [], "cut_tokens": 0}

    def _lines(self, name: str, rows: list[Row], drops: IO[str]) -> Iterator[dict[str, Any]]:
        """The lines of rows, in their order, as columns."""
        rows = [row for row in rows if row.text is None or not self.recipe.data.requests]
        for row, found in zip(rows, lines_of(self.recipe, rows, self.tokenizer, name == "eval"), strict=True):
            if isinstance(found, list):
                yield from self._stored(name, row, found, drops)
            elif self.recipe.data.on_bad_row == "stop":
                raise found
            else:
                self._drop(drops, row, Drop("no_exact_mask", found.message))

    def _stored(self, name: str, row: Row, lines: list[Line], drops: IO[str]) -> Iterator[dict[str, Any]]:
        """What is stored of a row: its lines, nothing where it is dropped, several parts where a long text is split."""
        limit, policy = self.recipe.longest_row, self.recipe.data.too_long
        longest, lost = max(line.longest for line in lines), 0
        if longest > limit:
            if policy == "stop":
                remedy = "raise train.seq_len, or set data.too_long to drop or truncate"
                raise DataError(f"has {longest} tokens, more than {self._limit}", row.source, remedy)
            if policy == "split" and row.text is not None:
                self.rows[name] += 1
                yield from self._windows(name, row, lines[0].masked)
                return
            if policy != "truncate" or self.recipe.prompts_only:  # a prompt without its end is another one
                self._drop(drops, row, Drop("too_long", f"{longest} tokens"))
                return
            whole = sum(len(masked.input_ids) for line in lines for masked in line.sequences)
            lines = [line.cut(limit) for line in lines]
            lost = whole - sum(len(masked.input_ids) for line in lines for masked in line.sequences)
            if not all(any(masked.mask) for line in lines for masked in line.sequences):
                self._drop(drops, row, Drop("no_trained_token_left", f"{lost} tokens cut"))
                return
        self.rows[name] += 1
        if name == "train":
            self.truncated += lost > 0
            self.lost += lost
        self.trained[name] += trained(lines)
        for line in lines:
            yield _columns(line, lost)

    @property
    def _limit(self) -> str:
        limit = self.recipe.train.seq_len
        completion = limit - self.recipe.longest_row
        return f"train.seq_len {limit}" + (f" without method.max_new_tokens {completion}" if completion else "")

    def _windows(self, name: str, row: Row, masked: Masked) -> Iterator[dict[str, Any]]:
        """A long text in windows of seq_len tokens, one behind the other; together they hold every token once."""
        limit = self.recipe.train.seq_len
        self.trained[name] += sum(masked.mask)
        for number, start in enumerate(range(0, len(masked.input_ids), limit)):
            part = Masked(masked.input_ids[start : start + limit], masked.mask[start : start + limit], "")
            yield {**_columns(Line(row, part), 0), "_id": f"{row.id}-{number}", "_group": row.group}


def _columns(line: Line, cut: int) -> dict[str, Any]:
    rejected = line.rejected
    return {
        **encode(line.row),
        "input_ids": line.masked.input_ids,
        "loss_mask": line.masked.mask,
        "rejected_ids": rejected.input_ids if rejected else None,
        "rejected_mask": rejected.mask if rejected else None,
        "cut_tokens": cut,
    }


def texts_of(row: Row) -> list[str]:
    """Prompt and answer of a row, apart: what is compared with evaluation items."""
    return [row.text] if row.text is not None else [text for text in (row.prompt, row.reference) if text.strip()]


def part_schema() -> Any:
    """Arrow schema of prepared rows."""
    import pyarrow as pa

    fields = [row_schema().field(name) for name in STORED]
    ids, masks = pa.list_(pa.int32()), pa.list_(pa.bool_())
    tokens = {"input_ids": ids, "loss_mask": masks, "rejected_ids": ids, "rejected_mask": masks}
    return pa.schema([*fields, *(pa.field(*item) for item in tokens.items()), pa.field("cut_tokens", pa.int32())])
