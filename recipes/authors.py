"""Who wrote the rows of a data file, and under which licence, by their columns and by what they say of themselves."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITTEN_BY = (
    *("_teacher", "generator", "teacher", "teacher_model", "teacher_name", "generated_by", "generator_model"),
    *("source_model", "llm"),
)
MODEL_COLUMNS = ("model", "model_name", "model_id")  # may be somebody's product as well
LICENCE_COLUMNS = ("license", "licence", "license_line")
PEOPLE = {"human", "humans", "manual", "expert", "experts", "annotator", "human-written", "crowd"}
LLM = re.compile(
    r"/|gpt|llama|claude|gemini|mi[sx]tral|qwen|gemma|chat|instruct|davinci|grok|command-|kimi|palm|deepseek|hermes|"
    r"vicuna|alpaca|wizard|falcon|\bphi-?\d|\byi-|\bo\d(?:-|\b)|\d+b\b",
    re.IGNORECASE,
)
ASSISTANTS = "ChatGPT|GPT-?[345][\\w.]*|Claude|Gemini|Bard|Grok|Copilot"
MAKERS = "OpenAI|Anthropic|Google|xAI"
SELF = re.compile(
    rf"\bI(?: a|['’])m (?:{ASSISTANTS})\b|\b(?:I am|I['’]m|as)(?: an?)? (?:AI|artificial intelligence)?[\w ,-]{{0,40}}"
    rf"(?:model|assistant)[\w ,]{{0,20}} (?:developed|trained|created|made) by (?:{MAKERS})\b",
    re.IGNORECASE,
)


@dataclass
class Authors:
    """What the rows say.

    Attributes:
        written: generator -> the first row that names it.
        licences: licence of rows as written -> the first row that names it.
        signed, unsigned: rows that name a generator, and rows that name none.
        spoken: (words, row) in which an assistant names itself, first of all.
        unread: files that could not be read to their end, each with the reason.
    """

    written: dict[str, str] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    signed: int = 0
    unsigned: int = 0
    spoken: tuple[str, str] | None = None
    unread: dict[str, str] = field(default_factory=dict)


def read_authors(files: Iterable[Path]) -> Authors:
    """Read what the rows say. Rows that are no objects are left to preparation, which refuses or drops them."""
    found = Authors()
    for path in files:
        try:
            for place, row in _records(path):
                _note(found, place, row)
        except (OSError, ValueError, EOFError, RecursionError, csv.Error, zlib.error) as error:
            found.unread[str(path)] = " ".join(str(error).split())[:100] or type(error).__name__
    return found


def _note(found: Authors, place: str, row: dict[str, Any]) -> None:
    columns = {str(k).casefold(): v for k, v in row.items()}
    nested = columns.get("metadata")
    if isinstance(nested, dict):
        columns = {**{str(k).casefold(): v for k, v in nested.items()}, **columns}
    authors = [text for c in WRITTEN_BY for text in _texts(columns.get(c))]
    authors += [text for c in MODEL_COLUMNS for text in _texts(columns.get(c)) if LLM.search(text)]
    for author in authors:
        if author.casefold() not in PEOPLE:
            found.written.setdefault(author, place)
    found.signed += bool(authors)
    found.unsigned += not authors
    for column in LICENCE_COLUMNS:
        for text in _texts(columns.get(column)):
            found.licences.setdefault(text, place)
    if found.spoken is None and (said := SELF.search(str(row.get("\0text", "")))):
        found.spoken = (said[0], place)


def _texts(value: Any) -> list[str]:
    """What a cell names: a text, or each part of a list or an object."""
    if value is None or value == "":
        return []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [str(part).strip() for part in parts if part is not None and str(part).strip()]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row), the row's text under a null key."""
    suffixes = [s.casefold() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in {".gz", ".zst"}), "")
    if kind not in {".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv"}:
        return
    if kind == ".parquet":
        import pyarrow.parquet as pq

        table = pq.ParquetFile(path)
        for batch in table.iter_batches():
            for number, row in enumerate(batch.to_pylist(), 1):
                yield (
                    f"{path}, row {number}",
                    {**row, "\0text": " ".join(v for v in row.values() if isinstance(v, str))},
                )
        return
    if suffixes[-1] == ".zst":
        raise ValueError("compressed with zstd, which is not read here")
    opener: Any = gzip.open if suffixes[-1] == ".gz" else open
    if kind in {".jsonl", ".ndjson"}:
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                yield from _one(line, f"{path}:{number}")
        return
    with opener(path, "rb") as stream:
        text = stream.read().decode("utf-8-sig", "replace")
    if kind == ".json":
        yield from _json(text, path)
        return
    csv.field_size_limit(1 << 30)
    for number, row in enumerate(csv.DictReader(io.StringIO(text), delimiter="\t" if kind == ".tsv" else ","), 1):
        yield f"{path}, row {number}", {**row, "\0text": " ".join(str(v) for v in row.values())}


def _json(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One list of rows, several under names, or JSON Lines under the wrong ending."""
    try:
        value = json.loads(text)
    except ValueError:
        for number, line in enumerate(text.splitlines(), 1):
            yield from _one(line.encode(), f"{path}:{number}")
        return
    parts = value.values() if isinstance(value, dict) else []
    lists = [value] if isinstance(value, list) else [v for v in parts if isinstance(v, list)]
    rows = [row for rows in lists for row in rows] or ([value] if isinstance(value, dict) else [])
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield f"{path}, row {number}", {**row, "\0text": json.dumps(row, ensure_ascii=False)}


def _one(line: bytes, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict):
        yield place, {**row, "\0text": line.decode("utf-8", "replace")}
