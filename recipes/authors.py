"""Who wrote the rows of a data file, and under which licence, by their columns and by what they say of themselves."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITTEN_BY = ("_teacher", "generator", "teacher", "teacher_model", "generated_by", "generator_model", "source_model")
MODEL_COLUMNS = ("model", "model_name", "model_id")  # may be somebody's product as well
LICENCE_COLUMNS = ("license", "licence", "license_line")
LLM = re.compile(r"/|gpt|llama|claude|gemini|mistral|mixtral|qwen|gemma|chat|instruct|\d+b\b", re.IGNORECASE)
ASSISTANTS = "ChatGPT|GPT-?[345][\\w.]*|Claude|Gemini|Bard|Grok|Copilot"
MAKERS = "OpenAI|Anthropic|Google|xAI"
SELF = re.compile(
    rf"\bI(?: a|')m (?:{ASSISTANTS})\b|\b(?:I am|I'm|as)(?: an?)? (?:AI|artificial intelligence)?[\w ,-]{{0,40}}"
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
    """

    written: dict[str, str] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    signed: int = 0
    unsigned: int = 0
    spoken: tuple[str, str] | None = None


def read_authors(files: Iterable[Path]) -> Authors:
    """Read what the rows say; files and rows that cannot be read are left to preparation, which refuses them."""
    found = Authors()
    for path in files:
        for place, row in _records(path):
            author = next((str(row[c]) for c in WRITTEN_BY if isinstance(row.get(c), str) and row[c].strip()), None)
            if author is None:
                named = (str(row[c]) for c in MODEL_COLUMNS if isinstance(row.get(c), str) and row[c].strip())
                author = next((n for n in named if LLM.search(n)), None)
            if author is not None:
                found.written.setdefault(author, place)
                found.signed += 1
            else:
                found.unsigned += 1
            for column in LICENCE_COLUMNS:
                if isinstance(row.get(column), str):
                    found.licences.setdefault(row[column].strip(), place)
            if found.spoken is None and (said := SELF.search(row.get("\0text", ""))):
                found.spoken = (said[0], place)
    return found


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, columns that say who and under what; all text under a null key). Bad rows are left to prepare."""
    names = (*WRITTEN_BY, *MODEL_COLUMNS, *LICENCE_COLUMNS)
    suffixes = [s.casefold() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in {".gz", ".zst"}), "")
    if kind == ".parquet":
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path)
        except (OSError, ValueError):
            return
        for batch in table.iter_batches(columns=[n for n in names if n in table.schema_arrow.names]):
            for number, row in enumerate(batch.to_pylist()):
                yield f"{path}, row {number + 1}", row
    elif kind in {".jsonl", ".ndjson"}:
        opener: Any = gzip.open if suffixes[-1] == ".gz" else open
        try:
            with opener(path, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    yield from _one(line, f"{path}:{number}")
        except OSError:
            return
    elif kind in {".json", ".csv"}:
        yield from _whole(path, kind)


def _one(line: bytes, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        row = json.loads(line)
    except ValueError:
        return
    if isinstance(row, dict):
        yield place, {**row, "\0text": line.decode("utf-8", "replace")}


def _whole(path: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text("utf-8-sig", errors="replace")
        if kind == ".csv":
            rows: Any = list(csv.DictReader(text.splitlines()))
        else:
            value = json.loads(text)
            rows = value if isinstance(value, list) else next((v for v in value.values() if isinstance(v, list)), [])
    except (OSError, ValueError, csv.Error, AttributeError):
        return
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield f"{path}, row {number}", {**row, "\0text": json.dumps(row, ensure_ascii=False)}
