"""Who wrote the rows of a data file, and under which licence, by their columns and by what they say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.errors import DataError
from recipes.tables import KINDS, BadRecord, kind_of, records

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
    """Read what the rows say. Broken rows are left to preparation, which refuses or drops them."""
    found = Authors()
    for path in files:
        if kind_of(path) not in KINDS:
            continue
        try:
            for place, row in records(path):
                if not isinstance(row, BadRecord):
                    _note(found, place, row)
        except DataError as error:
            found.unread[str(path)] = error.message[:100]
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
    if found.spoken is None:
        said = next((match for text in _strings(row) if (match := SELF.search(text))), None)
        found.spoken = (said[0], place) if said else None


def _texts(value: Any) -> list[str]:
    """What a cell names: a text, or each part of a list or an object."""
    if value is None or value == "":
        return []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [str(part).strip() for part in parts if part is not None and str(part).strip()]


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
