"""Who wrote the rows of a data file, and under which licence, by their columns and by what they say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.errors import DataError
from recipes.signatures import PEOPLE, signatures
from recipes.tables import DOCUMENTS, READERS, BadRecord, kind_of, records

NAMES = r"ChatGPT|GPT-?[345][\w.]*|Claude|Gemini|Bard|Grok|Copilot|Bing(?: Chat)?"
MAKERS = r"OpenAI|Anthropic|Google|xAI|Microsoft"
MADE = r"(?:developed|trained|created|made|built|designed)"
ALONE = r"(?!(?-i: [A-Z][a-z]))\b"  # Claude, but not Claude Monet
SELF = re.compile(
    rf"\b(?:I(?: a|['’])m|(?:ich bin|je suis|(?:yo )?soy|io sono|(?:eu )?sou o?|jag är|ik ben)) (?:{NAMES}){ALONE}"
    rf"|\bmy name is (?:{NAMES}){ALONE}|\bas (?:{NAMES}), I\b"
    rf"|\b(?:I am|I['’]m|as)(?: an?)? (?:AI|artificial intelligence|(?:large )?language model|[\w ,-]{{0,40}}(?:model|"
    rf"assistant|chatbot))\b[\w ,]{{0,20}} {MADE} by (?:{MAKERS})\b"
    rf"|\bI (?:was|am|have been) {MADE} by (?:{MAKERS})\b"
    rf"|(?:我是|私は|저는)\s*(?:一个|一個)?\s*(?:{NAMES}|[^。.\n]{{0,20}}由\s*(?:{MAKERS}))",
    re.IGNORECASE,
)
ASKED = {"user", "human", "system", "tool", "developer", "function", "ipython", "observation"}
ASKING = {"prompt", "instruction", "question", "input", "query", "system", "system_prompt", "context", "user"}


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
    """Read what the rows say. Broken rows are left to preparation, which refuses or drops them; a file of nothing else
    cannot be read."""
    found = Authors()
    for path in files:
        if path.suffix.lower() in DOCUMENTS:
            if _rows_in_disguise(path):
                found.unread[str(path)] = "it holds rows under the ending of a text: name it .jsonl"
            continue
        if kind_of(path) not in READERS:
            continue
        broken, read = None, 0
        try:
            for place, row in records(path):
                if isinstance(row, BadRecord):
                    broken = broken or row
                else:
                    read += 1
                    _note(found, place, row)
        except DataError as error:
            found.unread[str(path)] = error.message[:100]
        if broken is not None and not read:
            found.unread.setdefault(str(path), f"no row of it is whole: {broken.message[:80]}")
    return found


def _rows_in_disguise(path: Path) -> bool:
    """Whether a document is JSON Lines: its rows would be trained on as text, names of their writers and all."""
    if path.suffix.lower() not in {".txt", ".md"}:
        return False
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return re.match(rb'[{\[]\s*(?:\{\s*)?"(?:[^"\\]|\\.){1,200}"\s*:', head) is not None


def _note(found: Authors, place: str, row: dict[str, Any]) -> None:
    signed = False
    for kind, author in signatures(row):
        if kind == "licence":
            found.licences.setdefault(author, place)
            continue
        signed |= kind != "loose"
        if author.casefold() not in PEOPLE:
            found.written.setdefault(author, place)
    if (service := _exported_by(row)) is not None:
        signed = True
        found.written.setdefault(service, place)
    found.signed += signed
    found.unsigned += not signed
    if found.spoken is None:
        said = next((match for text in _answers(row) if (match := SELF.search(text))), None)
        found.spoken = (said[0], place) if said else None


def _exported_by(row: dict[str, Any]) -> str | None:
    """The service whose web export a row is: a conversation with its tree of messages, as people download them."""
    if isinstance(row.get("mapping"), dict) and any(
        isinstance(node, dict) and "message" in node for node in row["mapping"].values()
    ):
        return "chatgpt.com"
    messages = row.get("chat_messages")
    if isinstance(messages, list) and any(isinstance(m, dict) and "sender" in m for m in messages):
        return "claude.ai"
    return "gemini.google.com" if row.get("header") in {"Gemini Apps", "Bard"} else None


def _answers(value: Any) -> Iterator[str]:
    """Every text inside a row but what was asked: a question about an assistant says nothing of who answered it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _answers(part)
    elif isinstance(value, dict):
        speaker = value.get("role", value.get("from", value.get("sender")))
        if isinstance(speaker, str) and speaker.casefold() in ASKED:
            return
        for key, part in value.items():
            if str(key).casefold() not in ASKING:
                yield from _answers(part)
