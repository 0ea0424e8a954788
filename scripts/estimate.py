"""What the rows of a recipe come to before they are prepared: rows counted, tokens estimated from the texts of some.

Nothing is cached and no torch is loaded; `retort plan` must answer at once. What preparation drops for its content
(duplicates, overlaps) is not foreseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from data_prep.formats import to_row
from data_prep.read_pass import fits_method
from data_prep.readers import is_saved_dataset, source_files
from data_prep.rows import Message, Row, before_answer
from recipes.errors import DataError, RetortError
from recipes.lineage import canonical_json
from recipes.refs import Ref, parse_ref
from recipes.schema import Recipe
from recipes.schema_data import Holdout, Source
from recipes.tables import COMPRESSED, KINDS, BadRecord, Record, kind_of, parse_object, records

CHARACTERS_PER_TOKEN = 4.0  # of English text, where the tokenizer is not on this machine
TOKENS_PER_TURN = 5  # role header and end of turn, about
SAMPLED = 200  # rows of a source whose texts are read
LINES = (".jsonl", ".ndjson")
BOM = b"\xef\xbb\xbf"

T = TypeVar("T")


@dataclass(frozen=True)
class Count:
    """A source looked over.

    Attributes:
        rows: None where only preparation can tell; then `missing` says why.
        lengths: tokens of some rows, as the method reads them: one length of a chat, two of a pair.
    """

    source: Source
    rows: int | None
    lengths: tuple[tuple[int, ...], ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Estimate:
    """Training rows and their tokens, estimated.

    Attributes:
        rows: without what is held out or too long; None where a source could not be counted.
        mean_tokens: of a row, both sequences of a pair together.
        sampled: rows whose texts were read.
    """

    rows: int | None
    mean_tokens: float | None
    sampled: int


def count_source(recipe: Recipe, source: Source) -> Count:
    """Count the rows of a source, and read the texts of some.

    Raises:
        DataError: a file is missing or cannot be read, or a row among those looked at is one that preparation stops at.
    """
    if source.hub is not None:
        return Count(source, None, missing="on the hub")
    try:
        return _counted(recipe, source)
    except RetortError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"cannot be read ({str(error).splitlines()[0]})", str(source), "repair the file") from None


def estimate(recipe: Recipe, counts: Sequence[Count]) -> Estimate:
    """Put the training sources of a recipe together."""
    sampled = sum(len(count.lengths) for count in counts)
    if any(count.rows is None for count in counts):
        return Estimate(None, None, sampled)
    rows = tokens = 0.0
    for count, wanted in zip(counts, _mixed(counts), strict=True):
        fitting = [_fitted(recipe, row) for row in count.lengths]  # () where the row is dropped
        kept = [row for row in fitting if row]
        if kept:
            share = wanted * len(kept) / len(fitting)
            rows += share
            tokens += share * sum(map(sum, kept)) / len(kept)
    lines = 2 if recipe.method.type == "kto" and any(len(row) > 1 for c in counts for row in c.lengths) else 1
    mean = tokens / rows / lines if rows else None
    if isinstance(recipe.data.eval, Holdout):
        rows -= round(rows * recipe.data.eval.fraction)
    return Estimate(max(1, round(rows * lines)) if rows else 0, mean, sampled)


def _mixed(counts: Sequence[Count]) -> list[float]:
    """Rows taken of each source: all, or by weight as many as the scarcest allows."""
    rows = [float(count.rows or 0) for count in counts]
    weights = [count.source.weight for count in counts]
    if any(weight is None for weight in weights):
        return rows
    scarcest = min(n / weight for n, weight in zip(rows, weights, strict=True) if weight)
    return [scarcest * weight for weight in weights if weight]


def _fitted(recipe: Recipe, row: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of a row after `data.too_long`; empty where it is dropped."""
    limit, policy = recipe.longest_row, recipe.data.too_long
    if max(row, default=0) <= limit or policy == "split":
        return row
    return tuple(min(length, limit) for length in row) if policy == "truncate" and not recipe.prompts_only else ()


def _counted(recipe: Recipe, source: Source) -> Count:
    path = source.ref.path
    if path is not None and source.path is not None and is_saved_dataset(path):
        return Count(source, None, missing="a saved dataset")
    files = source_files(source)
    odd = next((file for file in files if not file.is_file()), None)
    if odd is not None:  # a pipe would be waited for
        raise DataError("is no regular file", str(odd), "write the rows into a file")
    if any(kind_of(file) not in KINDS for file in files):
        return Count(source, None, missing="documents, cut when they are read")
    rows, taken = 0, list[Record]()
    for file in files:
        number, some = _looked_over(file, source.limit)
        rows += number
        taken += some
    if not rows:
        remedy = "an empty file trains nothing; remove the source or fill it"
        raise DataError("holds no rows", str(source), remedy)
    if source.limit is not None:
        rows = min(rows, source.limit)
    _, taken = _spread(taken, None)  # of a folder of thousands of files not all
    return Count(source, rows, tuple(_lengths(recipe, source, taken)))


def _looked_over(path: Path, limit: int | None) -> tuple[int, list[Record]]:
    """How many records a file holds, and some of them."""
    if kind_of(path) in LINES and path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as stream:  # lines are counted many times faster than they are parsed
            number, lines = _spread(((n, line) for n, line in enumerate(stream, 1) if line.strip()), limit)
        places = ((f"{path}:{n}", line.removeprefix(BOM) if n == 1 else line) for n, line in lines)
        return number, [(place, parse_object(line, place)) for place, line in places]
    if kind_of(path) == ".parquet":
        import pyarrow.parquet as pq

        return pq.ParquetFile(path).metadata.num_rows, list(islice(records(path), min(SAMPLED, limit or SAMPLED)))
    return _spread(records(path), limit)


def _spread(items: Iterable[T], limit: int | None) -> tuple[int, list[T]]:
    """How many there are, and SAMPLED to twice as many of them at even distances (all where they are fewer)."""
    number, step, kept = 0, 1, list[T]()
    for number, item in enumerate(islice(items, limit), 1):
        if (number - 1) % step == 0:
            kept.append(item)
            if len(kept) == 2 * SAMPLED:
                kept, step = kept[::2], 2 * step
    return number, kept


def _lengths(recipe: Recipe, source: Source, found: Sequence[Record]) -> list[tuple[int, ...]]:
    """Tokens of each record's sequences, about; () for one that preparation drops.

    Raises:
        BadRecord: one that preparation stops at.
    """
    rows: list[Row | None] = []
    for place, record in found:
        try:
            if isinstance(record, BadRecord):
                raise record
            row = to_row(record, place, source)
            fits_method(recipe, row)
            rows.append(row)
        except BadRecord:
            if recipe.data.on_bad_row == "stop":
                raise
            rows.append(None)
    read = [row for row in rows if row is not None]
    sequences = [_sequences(recipe, row) for row in read]
    texts = _tokens(recipe, [text for row in sequences for _, text in row])
    known = iter([tuple(TOKENS_PER_TURN * turns + next(texts) for turns, _ in row) for row in sequences])
    return [() if row is None else next(known) for row in rows]


def _sequences(recipe: Recipe, row: Row) -> list[tuple[int, str]]:
    """What is tokenised of a row: the turns and the text of its sequence, or of its two."""
    if row.text is not None:
        return [(0, row.text)]
    asked = before_answer(row.messages) if recipe.prompts_only else row.messages
    answers = [row.chosen, row.rejected] if row.chosen else [()]
    tools = canonical_json(row.tools) if row.tools else ""
    return [(len(asked) + len(answer), tools + "".join(map(_said, (*asked, *answer)))) for answer in answers]


def _said(message: Message) -> str:
    parts = [str(message.get(key) or "") for key in ("reasoning_content", "content")]
    return "".join(parts) + (canonical_json(message["tool_calls"]) if message.get("tool_calls") else "")


def _tokens(recipe: Recipe, texts: Sequence[str]) -> Iterator[int]:
    """Tokens of texts, by the tokenizer where its files are here; no chat template is rendered."""
    ref = parse_ref(recipe.model.tokenizer) if recipe.model.tokenizer else recipe.model.ref
    path = ref.path / "tokenizer.json" if ref.path is not None else _cached_tokenizer(ref)
    if path is None or not path.is_file():
        return (round(len(text) / CHARACTERS_PER_TOKEN) for text in texts)
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(path)).encode_batch_fast(list(texts), add_special_tokens=False)
    return (len(encoding) for encoding in made)


def _cached_tokenizer(ref: Ref) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(ref.name, "tokenizer.json", revision=ref.revision)
    return Path(found) if isinstance(found, str) else None
