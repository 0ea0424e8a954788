"""Records -> rows: the shapes people have, recognised from their columns, checked, and brought into one form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_prep.pairs import preference
from data_prep.rows import Message, Row
from recipes.schema_data import Source
from recipes.tables import BadRecord

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
REASONING_NAMES = ("reasoning", "thinking")  # other names of reasoning_content


def to_row(record: dict[str, Any], place: str, source: Source) -> Row:
    """Bring one record into the one form.

    Raises:
        BadRecord: no known shape, a wrong type, an unknown role, no assistant turn.
    """
    if source.columns is not None:
        row = _mapped(record, place, source.columns)
    else:
        row = SHAPES[source.format if source.format != "auto" else _recognise(record, place)](record, place)
    group = _lookup(record, source.group, place) if source.group is not None else record.get("group")
    if group is not None:
        row = replace(row, grouped=str(group))
    try:
        _ = row.id
        row._kept.encode()
    except UnicodeEncodeError:
        raise BadRecord("holds half of a surrogate pair, which is no character", place, "repair its encoding") from None
    return row


def _recognise(record: dict[str, Any], place: str) -> str:
    keys = {k for k, v in record.items() if v is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    answered = "messages" in keys or "conversations" in keys or {"prompt", "completion"} <= keys
    if answered and (isinstance(record.get("label"), bool) or isinstance(record.get("kto_tag"), bool)):
        return "labelled"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if "text" in keys and len(keys & {"question", "answer", "label"}) == 0:
        return "text"
    names = ", ".join(sorted(map(str, record))[:8]) or "none"
    pairs = (("question", "answer"), ("question", "response"), ("instruction", "response"), ("prompt", "response"))
    for question, answer in (*pairs, ("input", "output"), ("text", "label")):
        if {question, answer} <= keys:
            remedy = f"map them: columns: {{prompt: {question}, completion: {answer}}}"
            raise BadRecord(f"the columns ({names}) have no shape that is known for sure", place, remedy)
    if "prompt" in keys:
        return "prompt"
    raise BadRecord(f"the columns ({names}) have no known shape", place, "give the source format: or columns:")


def _messages(record: dict[str, Any], place: str, name: str = "messages") -> Row:
    messages = _message_list(record.get(name), place, name)
    return _chat(messages, place, _rest(record, name, "tools"), _tools(record.get("tools"), place))


def _message_list(raw: Any, place: str, name: str) -> tuple[Message, ...]:
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        raw = _from_json(raw, name, place)  # CSV cells, and tables that hold free-form parts as JSON
    if isinstance(raw, dict):
        raw = [raw]
    if not isinstance(raw, list) or not raw:
        raise BadRecord(f"'{name}' must be a list with at least one message", place)
    if all(isinstance(turn, dict) and "from" in turn for turn in raw):
        return tuple(_turn(turn, i, place) for i, turn in enumerate(raw, 1))
    return tuple(_message(m, f"message {i}", place) for i, m in enumerate(raw, 1))


def _from_json(text: str, name: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord(f"'{name}' is a text that is no JSON", place) from None


def _tools(raw: Any, place: str) -> tuple[dict[str, Any], ...] | None:
    if isinstance(raw, str):
        raw = _from_json(raw, "tools", place) if raw.strip() else None
    if not raw:
        return None
    if not (isinstance(raw, list) and all(isinstance(t, dict) for t in raw)):
        raise BadRecord("'tools' must be a list of objects", place)
    return tuple(raw)


def _message(raw: Any, where: str, place: str) -> Message:
    if not isinstance(raw, dict):
        raise BadRecord(f"{where} is no object with role and content", place)
    role = raw.get("role")
    if role not in ROLES:
        raise BadRecord(f"{where} has the role {role!r}", place, f"roles are {', '.join(ROLES)}")
    message = {k: raw[k] for k in MESSAGE_KEYS if raw.get(k) is not None}
    for name in REASONING_NAMES:
        if raw.get(name) is not None and "reasoning_content" not in message:
            message["reasoning_content"] = raw[name]
    if isinstance(message.get("content"), list):
        message |= _joined(message["content"], where, place)
    content = message.get("content")
    if content is None:
        if not (role == "assistant" and message.get("tool_calls")):
            raise BadRecord(f"{where} ({role}) has no content", place)
        message["content"] = ""
    elif not isinstance(content, str):
        raise BadRecord(f"{where} ({role}) has {type(content).__name__} content", place, "content must be a text")
    if not isinstance(message.get("reasoning_content", ""), str):
        raise BadRecord(f"{where}: reasoning_content must be a text", place)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where, place)
    return message


def _joined(parts: list[Any], where: str, place: str) -> Message:
    """The parts of a content list: texts joined, reasoning and tool calls apart."""
    found: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        value = part.get("text", part.get("value")) if isinstance(part, dict) else None
        kind = part.get("type", "text") if isinstance(part, dict) else None
        kind = "reasoning" if kind == "thinking" else kind
        if not isinstance(value, str) or kind not in found:
            raise BadRecord(f"{where} has a part of kind {kind!r}", place, "only texts can be trained on")
        found[kind].append(_from_json(value, where, place) if kind == "tool_call" else value)
    joined: Message = {"content": "".join(found["text"])}
    if found["reasoning"]:
        joined["reasoning_content"] = "".join(found["reasoning"])
    return {**joined, "tool_calls": found["tool_call"]} if found["tool_call"] else joined


def _calls(raw: Any, where: str, place: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates want them: `{type, function: {name, arguments}}`, arguments as an object."""
    if not isinstance(raw, list) or not all(isinstance(c, dict) for c in raw):
        raise BadRecord(f"{where}: tool_calls must be a list of objects", place)
    calls = []
    for call in raw:
        inner = call.get("function") if isinstance(call.get("function"), dict) else call
        name, arguments = inner.get("name"), inner.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise BadRecord(f"{where}: a tool call has no name", place)
        if isinstance(arguments, str):
            arguments = _from_json(arguments, "arguments", place) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise BadRecord(f"{where}: the arguments of '{name}' are no object", place)
        made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append({**made, "id": call["id"]} if isinstance(call.get("id"), str) else made)
    return calls


def _sharegpt(record: dict[str, Any], place: str) -> Row:
    raw = record.get("conversations")
    if not isinstance(raw, list) or not raw or not all(isinstance(t, dict) for t in raw):
        raise BadRecord("'conversations' must be a list of {from, value} objects", place)
    messages = [_turn(turn, i, place) for i, turn in enumerate(raw, 1)]
    if isinstance(record.get("system"), str) and record["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": record["system"]})
    tools = _tools(record.get("tools"), place)
    return _chat(tuple(messages), place, _rest(record, "conversations", "system", "tools"), tools)


def _turn(turn: dict[str, Any], number: int, place: str) -> Message:
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker not in SHAREGPT_ROLES:
        raise BadRecord(f"turn {number} is from {speaker!r}", place, f"known are {', '.join(SHAREGPT_ROLES)}")
    message = {"role": SHAREGPT_ROLES[speaker], "content": value}
    if speaker == "function_call":
        calls = _from_json(value, f"turn {number}", place) if isinstance(value, str) else value
        message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return _message(message, f"turn {number}", place)


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


def _prompt(record: dict[str, Any], place: str) -> Row:
    """A prompt whose answer is to be written: by a teacher, or by the model under a reward."""
    if isinstance(record.get("prompt"), str):
        messages: tuple[Message, ...] = ({"role": "user", "content": _text(record, "prompt", place)},)
    else:
        messages = _message_list(record.get("prompt"), place, "prompt")
    if messages[-1]["role"] not in {"user", "tool"}:
        raise BadRecord(f"the prompt ends with a {messages[-1]['role']} turn", place, "it must end with the user's")
    return Row(place, messages, tools=_tools(record.get("tools"), place), extra=_rest(record, "prompt", "tools"))


def _labelled(record: dict[str, Any], place: str) -> Row:
    """A chat whose last answer is labelled good or bad (KTO)."""
    name = "label" if "label" in record else "kto_tag"
    label = record.get(name)
    if not isinstance(label, bool):
        raise BadRecord(f"'{name}' must be true or false, not {label!r}", place)
    rest = {k: v for k, v in record.items() if k != name}
    shape = "messages" if "messages" in rest else "sharegpt" if "conversations" in rest else "prompt_completion"
    return replace(SHAPES[shape](rest, place), label=label)


def _preference(record: dict[str, Any], place: str) -> Row:
    prompt, chosen, rejected = preference(record, place, _message_list)
    used = ("prompt", "messages", "conversations", "chosen", "rejected", "system", "tools")
    if isinstance(record.get("system"), str) and record["system"] and prompt[0]["role"] != "system":
        prompt = ({"role": "system", "content": record["system"]}, *prompt)
    return Row(
        place,
        prompt,
        tools=_tools(record.get("tools"), place),
        chosen=chosen,
        rejected=rejected,
        extra=_rest(record, *used),
    )


def _plain_text(record: dict[str, Any], place: str) -> Row:
    return Row(place, text=_text(record, "text", place), extra=_rest(record, "text"))


SHAPES = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "labelled": _labelled,
    "prompt": _prompt,
    "text": _plain_text,
}


def _mapped(record: dict[str, Any], place: str, columns: Mapping[Any, str]) -> Row:
    if "text" in columns:
        return Row(place, text=_filled(record, columns["text"], place), extra=record)
    named = {name: _lookup(record, columns[name], place) for name in ("messages", "tools", "label") if name in columns}
    if "chosen" in columns or "rejected" in columns:
        if missing := {"chosen", "rejected"} - columns.keys():
            raise BadRecord(f"the recipe's columns lack {missing.pop()}", place)
        named |= {name: _lookup(record, columns[name], place) for name in ("chosen", "rejected")}
        if "prompt" in columns:
            named["prompt"] = _filled(record, columns["prompt"], place)
        return replace(_preference({**record, **named}, place), extra=record)
    if "messages" in columns:
        row = _messages({**record, **named}, place)
    else:
        row = _mapped_turns(record, place, columns, _tools(named.get("tools"), place))
    if "label" in columns:
        if not isinstance(named["label"], bool):
            raise BadRecord(f"'{columns['label']}' must be true or false, not {named['label']!r}", place)
        row = replace(row, label=named["label"])
    return row


def _mapped_turns(record: dict[str, Any], place: str, columns: Mapping[Any, str], tools: Any) -> Row:
    missing = {"prompt", "completion"} - columns.keys()
    if missing:
        raise BadRecord(f"the recipe's columns lack {' and '.join(sorted(missing))}", place)
    prompt, completion = (_filled(record, columns[k], place) for k in ("prompt", "completion"))
    messages = list(_turns(prompt, completion, place, record).messages)
    if "reasoning" in columns:
        messages[-1] = {**messages[-1], "reasoning_content": _filled(record, columns["reasoning"], place)}
    if "system" in columns:
        messages.insert(0, {"role": "system", "content": _filled(record, columns["system"], place)})
    return Row(place, tuple(messages), tools=tools, extra=record)


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
