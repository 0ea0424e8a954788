"""Pass one over a piece: records -> rows -> row steps -> a block in the cache, with the sketches by which rows are
compared later. Memory stays flat: a batch of rows is held, never a piece."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep import near_dup
from data_prep.cache import entry, entry_key, make_entry, statistics
from data_prep.formats import to_row
from data_prep.readers import Piece, read_piece
from data_prep.rows import Row, encode
from data_prep.steps import ROW_STEPS, Drop, row_step
from recipes.lineage import sha256_file
from recipes.schema import Recipe
from recipes.schema_data import Holdout, NearDedup, Step
from recipes.signatures import MODEL_COLUMNS, WRITTEN_BY
from recipes.tables import BadRecord

BATCH, CHARACTERS = 2048, 1 << 20  # rows held in memory; fewer where they are long: up to the first that passes these
NEVER = 32767  # `dropped_at` of a row that no row step drops
COMPARING = ("exact_dedup", "near_dedup", "semantic_dedup")
GENERATOR_COLUMNS = (*WRITTEN_BY, *MODEL_COLUMNS)
PARAGRAPH_WORDS = 20  # a paragraph this long, standing in two prompts, is a passage that both are about
PARAGRAPHS = np.dtype([("row", "<u4"), ("hash", "<u8")])
KEYS = np.dtype([("id", "<u8"), ("prompt", "<u8"), ("group", "<u8"), ("dropped_at", "<i2")])
Role = Literal["train", "eval", "benchmark"]


@dataclass(frozen=True)
class Comparison:
    """A step that compares rows with each other, and what it needs to know of each.

    Attributes:
        position: of the step among the recipe's steps; the split stands behind them all.
        kind: the step's name.
        options: of the step.
    """

    position: int
    kind: str
    options: Any

    @property
    def name(self) -> str:
        return f"{self.position}-{self.kind}"

    @property
    def decides(self) -> dict[str, Any]:
        """The options that decide what is noted of a row; a threshold says which rows are equal, later."""
        noted: dict[str, Any] = self.options.model_dump(exclude={"threshold"})
        if self.kind == "near_dedup":
            noted["band_rows"] = near_dup.band_rows(self.options.threshold)
        return noted

    def text(self, row: Row) -> str:
        if self.options.on == "completion" and row.text is None:
            return row.reference
        return row.prompt if self.options.on == "prompt" else row.whole


@dataclass(frozen=True)
class ReadJob:
    """One piece of a source, and what is asked of its rows."""

    piece: Piece
    role: Role
    recipe: Recipe
    cache: Path

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.recipe.data.steps if self.role != "benchmark" else ()

    @property
    def key(self) -> str:
        data = self.recipe.data
        asked: list[Any] = [self.role, data.on_bad_row, self.recipe.method.kinds, bool(data.requests)]
        asked.append([(n, step.model_dump()) for n, step in enumerate(self.steps) if step.name in ROW_STEPS])
        asked.append(self.role == "train" and isinstance(data.eval, Holdout))
        asked.append([[c.position, c.kind, c.decides] for c in comparisons(self.recipe, self.role)])
        if any(step.name == "length" for step in self.steps):
            from data_prep.tokens import shared_tokenizer

            asked.append(shared_tokenizer(self.recipe.model).fingerprint)
        return entry_key(self.piece.key, asked)


@dataclass(frozen=True)
class Block:
    """The rows of a piece after pass one.

    Attributes:
        statistics: rows_in, rows (stored), dropped (by reason), generators, sha256 (of the stored rows).
    """

    folder: Path
    role: Role
    statistics: dict[str, Any]

    @property
    def rows(self) -> int:
        return int(self.statistics["rows"])

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """The stored rows as columns, in order, in the batches in which they were stored."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.folder / "rows.parquet")
        for group in range(file.num_row_groups):
            yield file.read_row_group(group).to_pylist()

    def keys(self) -> NDArray[Any]:
        """One KEYS entry per stored row."""
        return np.fromfile(self.folder / "keys.bin", dtype=KEYS)

    def paragraphs(self) -> NDArray[Any]:
        """PARAGRAPHS entries: the long paragraphs of the prompts, by the row's number in the block."""
        return np.fromfile(self.folder / "paragraphs.bin", dtype=PARAGRAPHS)

    def exact(self, comparison: Comparison) -> NDArray[np.uint64]:
        """A number per row; rows with an equal one are equal."""
        return np.fromfile(self.folder / f"{comparison.name}.keys", dtype=np.uint64)

    def sketch(self, comparison: Comparison) -> near_dup.Sketch:
        """MinHash sketches, memory-mapped."""
        if not self.rows:
            return near_dup.sketch([], comparison.options.words, comparison.options.threshold)
        signatures = np.memmap(self.folder / f"{comparison.name}.signatures", np.uint32, "r")
        bands = np.memmap(self.folder / f"{comparison.name}.bands", np.uint64, "r")
        return near_dup.Sketch(signatures.reshape(self.rows, -1), bands.reshape(self.rows, -1).T)

    def embeddings(self, comparison: Comparison) -> NDArray[np.float16]:
        """Unit vectors (rows, width), memory-mapped."""
        if not self.rows:
            return np.zeros((0, 0), np.float16)
        return np.memmap(self.folder / f"{comparison.name}.embeddings", np.float16, "r").reshape(self.rows, -1)


def comparisons(recipe: Recipe, role: Role) -> list[Comparison]:
    """The comparing steps of a recipe in order, and last the one that keeps near-equal prompts on one side."""
    if role == "benchmark":
        return []
    found = [
        Comparison(n, step.name, step.options) for n, step in enumerate(recipe.data.steps) if step.name in COMPARING
    ]
    if role == "train" and isinstance(recipe.data.eval, Holdout) and recipe.data.eval.near is not None:
        options = NearDedup(threshold=recipe.data.eval.near, on="prompt")
        found.append(Comparison(len(recipe.data.steps), "near_dedup", options))
    return found


def read_block(job: ReadJob) -> Block:
    """Do pass one for a piece, or find it done.

    Raises:
        BadRecord: a row that cannot be read, where the recipe says to stop.
        DataError: a file that cannot be read.
    """
    folder = make_entry(entry(job.cache, "rows", job.key), lambda fresh: _Pass(job, fresh).run())
    return Block(folder, job.role, statistics(folder))


@dataclass(frozen=True)
class _Passed:
    """A row behind the row steps: as it left them, as each comparing step saw it, and the step that drops it."""

    row: Row
    seen: dict[int, Row]
    dropped_at: int = NEVER
    drop: Drop | None = None


def _batches(rows: Iterator[_Passed]) -> Iterator[list[_Passed]]:
    """Consecutive rows that are held in memory together. What is in a batch depends on the rows alone."""
    batch: list[_Passed] = []
    room = CHARACTERS
    for passed in rows:
        batch.append(passed)
        room -= passed.row.characters
        if len(batch) == BATCH or room <= 0:
            yield batch
            batch, room = [], CHARACTERS
    if batch:
        yield batch


class _Pass:
    """One run over one piece."""

    def __init__(self, job: ReadJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.steps = {n: row_step(step, job.recipe.model) for n, step in enumerate(job.steps) if step.name in ROW_STEPS}
        self.comparisons = comparisons(job.recipe, job.role)
        # From the first comparison on, a row that a later row step drops still counts in it.
        self.first_comparison = min((c.position for c in self.comparisons), default=len(job.steps))
        self.splits = job.role == "train" and isinstance(job.recipe.data.eval, Holdout)
        self.rows_in = self.stored = 0
        self.dropped: Counter[str] = Counter()
        self.generators: Counter[str] = Counter()

    def run(self) -> dict[str, Any]:
        import pyarrow.parquet as pq

        with (
            open_drops(self.folder) as drops,
            pq.ParquetWriter(self.folder / "rows.parquet", row_schema(), compression="zstd") as writer,
            _Files(self.folder) as files,
        ):
            files.append("keys.bin", np.zeros(0, KEYS))
            files.append("paragraphs.bin", np.zeros(0, PARAGRAPHS))
            for batch in _batches(self._rows(drops)):
                self._store(batch, writer, files)
        return {
            "source": str(self.job.piece.source),
            "rows_in": self.rows_in,
            "rows": self.stored,
            "dropped": dict(sorted(self.dropped.items())),
            "generators": dict(self.generators),
            "sha256": sha256_file(self.folder / "rows.parquet"),
        }

    def _rows(self, drops: IO[str]) -> Iterator[_Passed]:
        """Rows to store. Rows dropped before the first comparison are written away here."""
        for place, record in read_piece(self.job.piece):
            self.rows_in += 1
            try:
                if isinstance(record, BadRecord):
                    raise record
                row = to_row(record, place, self.job.piece.source)
                if self.job.role != "benchmark":
                    fits_method(self.job.recipe, row)
            except BadRecord as error:
                if self.job.recipe.data.on_bad_row == "stop":
                    raise
                drop = Drop("bad_row", f"{error.message}" + (f"; {error.remedy}" if error.remedy else ""))
                write_drop(drops, place, drop, raw=record if isinstance(record, dict) else None)
                self.dropped[drop.reason] += 1
                continue
            self.generators.update(str(record[c]) for c in GENERATOR_COLUMNS if isinstance(record.get(c), str))
            passed = self._through_steps(row)
            if passed.drop is not None and passed.dropped_at < self.first_comparison:
                write_drop(drops, place, passed.drop, passed.row)
                self.dropped[passed.drop.reason] += 1
            else:
                yield passed

    def _through_steps(self, row: Row) -> _Passed:
        seen: dict[int, Row] = {}
        for position in range(len(self.job.steps)):
            if position not in self.steps:
                seen[position] = row
                continue
            changed = self.steps[position](row)
            if isinstance(changed, Drop):
                return _Passed(row, seen, position, changed)
            row = changed
        return _Passed(row, seen)

    def _store(self, batch: list[_Passed], writer: Any, files: _Files) -> None:
        import pyarrow as pa

        stored = []
        keys = np.zeros(len(batch), dtype=KEYS)
        for number, passed in enumerate(batch):
            row, drop = passed.row, passed.drop
            columns = encode(row)
            columns["_reason"], columns["_detail"] = (drop.reason, drop.detail) if drop else (None, None)
            stored.append(columns)
            grouped = 0 if row.grouped is None else _hash(row.grouped) | 1
            keys[number] = (int(row.id, 16), _hash(row.prompt), grouped, passed.dropped_at)
        writer.write_table(pa.Table.from_pylist(stored, schema=row_schema()))
        files.append("keys.bin", keys)
        if self.splits:
            long = [(self.stored + n, h) for n, passed in enumerate(batch) for h in _paragraphs(passed.row)]
            files.append("paragraphs.bin", np.array(long, dtype=PARAGRAPHS))
        for comparison in self.comparisons:
            # Each comparison sees the rows as they were when its turn came.
            self._sketch(comparison, [p.seen.get(comparison.position, p.row) for p in batch], files)
        self.stored += len(batch)

    def _sketch(self, comparison: Comparison, rows: list[Row], files: _Files) -> None:
        options, name = comparison.options, comparison.name
        if comparison.kind == "exact_dedup":
            numbers = [int(row.id, 16) if options.on == "row" else _hash(comparison.text(row)) for row in rows]
            files.append(f"{name}.keys", np.array(numbers, dtype=np.uint64))
            return
        texts = [comparison.text(row) for row in rows]
        if comparison.kind == "near_dedup":
            sketch = near_dup.sketch(texts, options.words, options.threshold)
            files.append(f"{name}.signatures", sketch.signatures)
            files.append(f"{name}.bands", np.ascontiguousarray(sketch.bands.T))
        else:
            from data_prep.embed import embed

            files.append(f"{name}.embeddings", embed(texts, options.model))


class _Files:
    """Binary files that arrays are appended to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.streams: dict[str, IO[bytes]] = {}

    def append(self, name: str, array: NDArray[Any]) -> None:
        if name not in self.streams:
            self.streams[name] = (self.folder / name).open("wb")
        self.streams[name].write(array.tobytes())

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()


def row_schema() -> Any:
    """Arrow schema of stored rows."""
    import pyarrow as pa

    texts = ("_id", "_source", "_group", "messages", "text", "tools", "chosen", "rejected")
    fields = [pa.field(name, pa.string()) for name in texts]
    fields += [pa.field("label", pa.bool_()), pa.field("extra", pa.string())]
    return pa.schema([*fields, pa.field("_reason", pa.string()), pa.field("_detail", pa.string())])


def open_drops(folder: Path) -> IO[str]:
    """dropped.jsonl of a block. Half of a surrogate pair, a usual reason to drop a row, is written as an escape."""
    return (folder / "dropped.jsonl").open("w", encoding="utf-8", errors="backslashreplace")


def write_drop(stream: IO[str], source: str, drop: Drop, row: Row | None = None, raw: Any = None) -> None:
    """One line of dropped.jsonl: where the row was, why it was dropped, and the row itself."""
    line: dict[str, Any] = {"_id": row.id if row else None, "_source": source}
    line |= {"reason": drop.reason, "detail": drop.detail}
    if row is not None:
        line["row"] = {k: v for k, v in encode(row).items() if v is not None and not k.startswith("_")}
    elif raw is not None:
        line["record"] = raw
    stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(text.split()).encode("utf-8", "surrogatepass"))


def _paragraphs(row: Row) -> list[int]:
    """Hashes of the long paragraphs that a row's prompt holds."""
    lines = (line for line in row.prompt.split("\n") if len(line) >= 3 * PARAGRAPH_WORDS)
    return [_hash(line.casefold()) for line in lines if len(line.split()) >= PARAGRAPH_WORDS]


def fits_method(recipe: Recipe, row: Row) -> None:
    """Raise BadRecord for a row of a kind that the recipe's method does not read."""
    kind, method = row.kind, recipe.method
    if kind in method.kinds or (kind == "text" and recipe.data.requests):
        return
    if method.type != "sft":
        wanted = " or ".join(SHAPES[kind] for kind in method.kinds)
        raise BadRecord(f"is a {kind} row, and method {method.type} reads {wanted}", row.source, "see docs/methods.md")
    if kind == "text":
        remedy = "set method.on: text to train on all of it"
        raise BadRecord("is plain text without an assistant turn", row.source, remedy)
    if method.on == "text":
        remedy = "set method.on: assistant, or columns: {text: ...}"
        raise BadRecord(f"is a {kind} row, and method.on is text", row.source, remedy)
    raise BadRecord(f"is a {kind} row, and method.type is sft", row.source, HINTS[kind])


SHAPES: Mapping[str, str] = {
    "preference": "pairs (prompt, chosen, rejected)",
    "labelled": "labelled answers (prompt, completion, label)",
    "prompt": "prompts (prompt, and other columns)",
    "chat": "chats that end with the wanted answer",
}
HINTS: Mapping[str, str] = {
    "preference": "to train on the chosen answers, map them: columns: {prompt: prompt, completion: chosen}",
    "labelled": "leave the label out to train on every answer: format: prompt_completion or messages",
    "prompt": "its last turn must be the assistant's",
}
