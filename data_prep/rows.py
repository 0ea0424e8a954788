"""The one form of a row, whatever it was read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from recipes.lineage import canonical_json

Message = dict[str, Any]
Kind = Literal["chat", "text", "preference", "labelled", "prompt"]
STORED = ("_id", "_source", "_group", "messages", "text", "tools", "chosen", "rejected", "label", "extra")


@dataclass(frozen=True)
class Row:
    """One training or evaluation row.

    Attributes:
        source: where it was read (`file:line`).
        messages: chat messages in the OpenAI/TRL convention; of a preference row those before the two answers; empty
            for a text row.
        text: plain text of a text row, else None.
        tools: tool definitions offered to the model, or None.
        chosen, rejected: the two answers of a preference row, each one message or more.
        label: whether a labelled row's answer is a good one (KTO), else None.
        extra: the record's other columns (teacher, label, ...), kept as they are.
        grouped: the value that keeps rows on one side of a split, None where the record names none.
    """

    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    grouped: str | None = None

    @cached_property
    def id(self) -> str:
        """Content hash: equal rows have equal ids, whichever file they came from."""
        parts = [self._written, canonical_json(self.text), canonical_json(self.tools)]
        if self.chosen or self.label is not None:
            parts += map(canonical_json, (self.chosen, self.rejected, self.label))
        return hashlib.sha256(f"[{','.join(parts)}]".encode()).hexdigest()[:16]

    @cached_property
    def _written(self) -> str:
        return canonical_json(self.messages)

    @cached_property
    def _kept(self) -> str:
        return canonical_json(self.extra)

    @property
    def characters(self) -> int:
        """What the row holds, other columns included, counted as it is stored."""
        answers = sum(len(str(message)) for message in (*self.chosen, *self.rejected))
        return len(self._written) + len(self.text or "") + len(self._kept) + answers

    @property
    def kind(self) -> Kind:
        if self.text is not None:
            return "text"
        if self.chosen:
            return "preference"
        if self.label is not None:
            return "labelled"
        return "chat" if any(m["role"] == "assistant" for m in self.messages[-1:]) else "prompt"

    @property
    def group(self) -> str:
        """Rows of one group never straddle a split, and are resampled together."""
        return self.id if self.grouped is None else self.grouped

    @property
    def reference(self) -> str:
        """The answer that a model is measured against: the last assistant turn."""
        last = (self.chosen or self.messages)[-1:]
        return str(last[0].get("content") or "") if last else ""

    @property
    def prompt(self) -> str:
        """What the last answer answers, without system messages (they are the same in every row); a text row whole."""
        if self.text is not None:
            return self.text
        before = self.messages[:-1] if self.kind in {"chat", "labelled"} else self.messages
        return "\n".join(_content(m) for m in before if m["role"] not in {"system", "developer"})

    @property
    def whole(self) -> str:
        """All that is said in the row, without system messages."""
        if self.text is not None:
            return self.text
        said = (*self.messages, *self.chosen, *self.rejected)
        return "\n".join(_content(m) for m in said if m["role"] not in {"system", "developer"})

    def map_texts(self, change: Callable[[str], str], inside_calls: bool = False) -> Row:
        """The row with every text changed, itself where none is; `inside_calls` also the texts within tool calls."""

        def message(old: Message) -> Message:
            new = dict(old)
            for key in ("content", "reasoning_content"):
                if isinstance(new.get(key), str):
                    new[key] = change(new[key])
            if inside_calls and new.get("tool_calls"):
                new["tool_calls"] = _leaves(new["tool_calls"], change)
            return new

        parts = (self.messages, self.chosen, self.rejected)
        messages, chosen, rejected = (tuple(map(message, part)) for part in parts)
        text = None if self.text is None else change(self.text)
        if (messages, chosen, rejected, text) == (*parts, self.text):
            return self  # its hash is known
        return replace(self, messages=messages, text=text, chosen=chosen, rejected=rejected)


def before_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages before the last answer: all of a prompt, and of a chat what its last assistant turns answer."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return tuple(messages[:end])


def _content(message: Message) -> str:
    calls = message.get("tool_calls")
    return str(message.get("content") or "") + (f"\n{canonical_json(calls)}" if calls else "")


def _leaves(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: part if key in {"id", "type", "name"} else _leaves(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_leaves(part, change) for part in value]
    return value


def encode(row: Row) -> dict[str, Any]:
    """Parquet columns of a row. Free-form parts are JSON texts: Arrow has no type for "any value"."""
    return {
        "_id": row.id,
        "_source": row.source,
        "_group": row.group,
        "messages": row._written if row.messages else None,
        "text": row.text,
        "tools": canonical_json(row.tools) if row.tools else None,
        "chosen": canonical_json(row.chosen) if row.chosen else None,
        "rejected": canonical_json(row.rejected) if row.rejected else None,
        "label": row.label,
        "extra": row._kept if row.extra else None,
    }


def decode(stored: Mapping[str, Any]) -> Row:
    """The row of stored columns, with the id it was stored under."""

    def part(name: str) -> Any:
        return json.loads(stored[name]) if stored.get(name) else None

    row = Row(
        stored["_source"],
        tuple(part("messages") or ()),
        stored["text"],
        tuple(part("tools")) if stored["tools"] else None,
        tuple(part("chosen") or ()),
        tuple(part("rejected") or ()),
        stored["label"],
        part("extra") or {},
        None if stored["_group"] == stored["_id"] else stored["_group"],
    )
    # Fills the cached properties: to hash and write again costs more than to read.
    row.__dict__["id"] = stored["_id"]
    if stored["messages"]:
        row.__dict__["_written"] = stored["messages"]
    if stored["extra"]:
        row.__dict__["_kept"] = stored["extra"]
    return row
