"""Where in a rendered chat the strings of the messages are: private markers around them, then taken out again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.chat_render import REASONING_FIELDS, ChatTemplate, Message, Rendered, normalise
from recipes.errors import DataError

# Plane 16 is private use: no text carries these code points, and if one does the markers are not used.
_FIRST, _LAST = 0x10_0000, 0x10_FFFD
_MARKER = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_CORE = re.compile(r"^(\s*)(.*?)(\s*)$", re.DOTALL)


@dataclass(frozen=True)
class Field:
    """A string of a message as rendered: `spans` are its places (start, end) in the true text, none if left out."""

    message: int
    kind: str
    spans: list[tuple[int, int]]


class _Marking:
    """Hands out a pair of markers per string and remembers what each stands for."""

    def __init__(self) -> None:
        self.fields: list[tuple[int, str]] = []

    def wrap(self, text: str, message: int, kind: str) -> str:
        """Put the markers inside the white space at the ends, which templates strip, and behind inline reasoning,
        which templates cut off."""
        head, separator, tail = text.rpartition("</think>") if kind == "content" else ("", "", text)
        match = _CORE.match(tail)
        if match is None or not match[2] or _FIRST + 2 * len(self.fields) + 1 > _LAST:
            return text
        opening = _FIRST + 2 * len(self.fields)
        self.fields.append((message, kind))
        return head + separator + match[1] + chr(opening) + match[2] + chr(opening + 1) + match[3]

    def leaves(self, value: Any, message: int, kind: str) -> Any:
        """Wrap every string inside a tool call's arguments; keys and numbers stay."""
        if isinstance(value, str):
            return self.wrap(value, message, kind)
        if isinstance(value, dict):
            return {key: self.leaves(item, message, kind) for key, item in value.items()}
        if isinstance(value, list):
            return [self.leaves(item, message, kind) for item in value]
        return value

    def content(self, value: Any, message: int, kind: str) -> Any:
        if isinstance(value, str):
            return self.wrap(value, message, kind)
        if isinstance(value, list):
            return [
                {**part, "text": self.wrap(part["text"], message, kind)}
                if isinstance(part, dict) and isinstance(part.get("text"), str)
                else part
                for part in value
            ]
        return value

    def tool_calls(self, calls: Any, message: int) -> Any:
        if not isinstance(calls, list):
            return calls
        marked = []
        for call in calls:
            inner = call.get("function") if isinstance(call, dict) else None
            if isinstance(inner, dict) and "arguments" in inner:
                arguments = self.leaves(inner["arguments"], message, "tool call")
                marked.append({**call, "function": {**inner, "arguments": arguments}})
            else:
                marked.append(call)
        return marked

    def message(self, message: Message, index: int) -> Message:
        copy = dict(message)
        copy["content"] = self.content(copy.get("content"), index, "content")
        field = next((name for name in REASONING_FIELDS if isinstance(copy.get(name), str)), None)
        if field:
            marked = self.wrap(copy[field], index, "reasoning")
            copy.update({name: marked for name in REASONING_FIELDS if name in copy})
        if copy.get("tool_calls"):
            copy["tool_calls"] = self.tool_calls(copy["tool_calls"], index)
        return copy


def locate(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, full: Rendered
) -> list[Field] | None:
    """Find every string of the messages in the true rendering.

    Tried with all messages marked, then with the assistant's alone, for templates that look into user text.

    Returns:
        The fields, or None where the template reacts to the markers, so that nothing can be read off them.
    """
    if _MARKER.search(full.text):
        return None
    for roles in (None, "assistant"):
        marking = _Marking()
        marked = normalise(
            [
                marking.message(message, index) if roles in (None, message.get("role")) else message
                for index, message in enumerate(messages)
            ]
        )
        try:
            text = template.render(marked, tools).text
        except DataError:
            continue
        if len(text) >= len(full.text) and _MARKER.sub("", text) == full.text:
            return _positions(text, marking.fields)
    return None


def _positions(text: str, fields: list[tuple[int, str]]) -> list[Field]:
    """Marker positions in the text without markers. A field whose opening or closing marker is missing was cut."""
    opened: dict[int, int] = {}
    spans: list[list[tuple[int, int]]] = [[] for _ in fields]
    for shift, match in enumerate(_MARKER.finditer(text)):
        number, closing = divmod(ord(match[0]) - _FIRST, 2)
        position = match.start() - shift
        if not closing:
            opened[number] = position
        elif number in opened:
            spans[number].append((opened.pop(number), position))
        else:
            spans[number].append((position, position))
    for number, position in opened.items():
        spans[number].append((position, position))
    return [Field(message, kind, found) for (message, kind), found in zip(fields, spans, strict=True)]
