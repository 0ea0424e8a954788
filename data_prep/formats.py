"""Records -> rows: the shapes people have, recognised from their columns, checked, and brought into one form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data_prep.readers import BadRecord
from recipes.lineage import canonical_json, sha256_json
from recipes.schema import Source

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


@dataclass(frozen=True)
class Row:
    """One training or evaluation row.

    Attributes:
        source: where it was read (`file:line`).
        messages: chat messages in the OpenAI/TRL convention; empty for a text row.
        text: plain text of a text row, else None.
        tools: tool definitions offered to the model, or None.
        extra: the record's other columns (labels, group, teacher, ...), kept as they are.
    """

    source: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Content hash: equal rows have equal ids, whichever file they came from."""
        return sha256_json([self.messages, self.text, self.tools])[:16]

    @property
    def group(self) -> str:
        """Rows of one group never straddle a split, and are resampled together."""
        group = self.extra.get("group")
        return self.id if group is None else str(group)

    @property
    def reference(self) -> str:
        """The answer that a model is measured against: the last assistant turn."""
        return str(self.messages[-1].get("content") or "") if self.messages else ""


def to_row(record: dict[str, Any], place: str, source: Source) -> Row:
    """Bring one record into the one form.

    Raises:
        BadRecord: no known shape, a wrong type, an unknown role, no assistant turn.
    """
    if source.columns is not None:
        row = _mapped(record, place, source.columns)
    else:
        row = SHAPES[source.format if source.format != "auto" else _recognise(record, place)](record, place)
    try:
        _ = row.id
        canonical_json(row.extra).encode()
    except UnicodeEncodeError:
        raise BadRecord("holds half of a surrogate pair, which is no character", place, "repair its encoding") from None
    return row


def _recognise(record: dict[str, Any], place: str) -> str:
    keys = {k for k, v in record.items() if v is not None}
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if "text" in keys and len(keys & {"question", "answer", "label", "chosen", "rejected"}) == 0:
        return "text"
    names = ", ".join(sorted(map(str, record))[:8]) or "none"
    for question, answer in (("question", "answer"), ("question", "response"), ("input", "output"), ("text", "label")):
        if {question, answer} <= keys:
            remedy = f"map them: columns: {{prompt: {question}, completion: {answer}}}"
            raise BadRecord(f"the columns ({names}) have no shape that is known for sure", place, remedy)
    raise BadRecord(f"the columns ({names}) have no known shape", place, "give the source format: or columns:")


def _messages(record: dict[str, Any], place: str) -> Row:
    raw = record.get("messages")
    if not isinstance(raw, list) or not raw:
        raise BadRecord("'messages' must be a list with at least one message", place)
    messages = tuple(_message(m, f"message {i}", place) for i, m in enumerate(raw, 1))
    tools = record.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise BadRecord("'tools' must be a list of objects", place)
    return _chat(messages, place, _rest(record, "messages", "tools"), tuple(tools) if tools else None)


def _message(raw: Any, where: str, place: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadRecord(f"{where} is no object with role and content", place)
    role = raw.get("role")
    if role not in ROLES:
        raise BadRecord(f"{where} has the role {role!r}", place, f"roles are {', '.join(ROLES)}")
    message = {k: raw[k] for k in MESSAGE_KEYS if raw.get(k) is not None}
    content = message.get("content")
    if content is None:
        if not (role == "assistant" and message.get("tool_calls")):
            raise BadRecord(f"{where} ({role}) has no content", place)
        message["content"] = ""
    elif isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        message["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise BadRecord(f"{where} ({role}) has {type(content).__name__} content", place, "content must be a text")
    if not isinstance(message.get("reasoning_content", ""), str):
        raise BadRecord(f"{where}: reasoning_content must be a text", place)
    return message


def _sharegpt(record: dict[str, Any], place: str) -> Row:
    raw = record.get("conversations")
    if not isinstance(raw, list) or not raw or not all(isinstance(t, dict) for t in raw):
        raise BadRecord("'conversations' must be a list of {from, value} objects", place)
    messages = []
    for i, turn in enumerate(raw, 1):
        speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker not in SHAREGPT_ROLES:
            raise BadRecord(f"turn {i} is from {speaker!r}", place, f"known are {', '.join(SHAREGPT_ROLES)}")
        messages.append(_message({"role": SHAREGPT_ROLES[speaker], "content": value}, f"turn {i}", place))
    if isinstance(record.get("system"), str) and record["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": record["system"]})
    return _chat(tuple(messages), place, _rest(record, "conversations", "system"))


def _alpaca(record: dict[str, Any], place: str) -> Row:
    instruction, extra = _text(record, "instruction", place), str(record.get("input") or "")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return _turns(prompt, _text(record, "output", place), place, _rest(record, "instruction", "input", "output"))


def _prompt_completion(record: dict[str, Any], place: str) -> Row:
    prompt, completion = record.get("prompt"), record.get("completion")
    rest = _rest(record, "prompt", "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages({"messages": [*prompt, *completion], **rest}, place)
    return _turns(_text(record, "prompt", place), _text(record, "completion", place), place, rest)


def _plain_text(record: dict[str, Any], place: str) -> Row:
    return Row(place, text=_text(record, "text", place), extra=_rest(record, "text"))


SHAPES = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
}


def _mapped(record: dict[str, Any], place: str, columns: Mapping[Any, str]) -> Row:
    if "text" in columns:
        return Row(place, text=_filled(record, columns["text"], place), extra=record)
    if "messages" in columns:
        return _messages({**record, "messages": _lookup(record, columns["messages"], place)}, place)
    missing = {"prompt", "completion"} - columns.keys()
    if missing:
        raise BadRecord(f"the recipe's columns lack {' and '.join(sorted(missing))}", place)
    prompt, completion = (_filled(record, columns[k], place) for k in ("prompt", "completion"))
    row = _turns(prompt, completion, place, record)
    messages = list(row.messages)
    if "reasoning" in columns:
        messages[-1] = {**messages[-1], "reasoning_content": _filled(record, columns["reasoning"], place)}
    if "system" in columns:
        messages.insert(0, {"role": "system", "content": _filled(record, columns["system"], place)})
    return Row(place, tuple(messages), extra=row.extra)


def _filled(record: dict[str, Any], pattern: str, place: str) -> str:
    """A column, or a text with {column} places. Only names are looked up; nothing is evaluated."""
    if "{" not in pattern:
        value = _lookup(record, pattern, place)
    else:
        value = re.sub(r"\{([\w.-]+)\}", lambda m: str(_lookup(record, m[1], place)), pattern)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord(f"'{pattern}' holds {type(value).__name__}, not text", place)
    if not str(value).strip():
        raise BadRecord(f"'{pattern}' is empty", place)
    return str(value)


def _lookup(record: Any, dotted: str, place: str) -> Any:
    if isinstance(record, dict) and dotted in record:
        return record[dotted]
    value = record
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            names = ", ".join(sorted(map(str, record))[:8])
            raise BadRecord(f"has no column '{dotted}'", place, f"it has {names}")
        value = value[part]
    return value


def _text(record: dict[str, Any], key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise BadRecord(f"'{key}' must be a text, not {type(value).__name__}", place)
    if not value.strip():
        raise BadRecord(f"'{key}' is empty", place)
    return value


def _turns(prompt: str, completion: str, place: str, extra: dict[str, Any]) -> Row:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return _chat(messages, place, extra)


def _chat(messages: tuple[dict[str, Any], ...], place: str, extra: dict[str, Any], tools: Any = None) -> Row:
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRecord("has no assistant turn, so nothing to train on", place)
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"ends with a {messages[-1]['role']} turn", place, "the last turn must be the assistant's")
    return Row(place, messages, tools=tools, extra=extra)


def _rest(record: dict[str, Any], *used: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in used and v is not None}


def encode(row: Row) -> dict[str, Any]:
    """Parquet columns of a row. Free-form parts are JSON texts: Arrow has no type for "any value"."""
    return {
        "_id": row.id,
        "_source": row.source,
        "_group": row.group,
        "messages": canonical_json(row.messages) if row.messages else None,
        "text": row.text,
        "tools": canonical_json(row.tools) if row.tools else None,
        "extra": canonical_json(row.extra) if row.extra else None,
    }
