"""Chats of a form that was proven before: the spans of another one, checked instead of derived.

Most rows of a data set differ in their words alone. Once chat_spans.py has worked out one chat of a form (roles,
fields, no tools), the rendering of the next is predicted by putting its strings in the places of the first one's. Only
if the template's own renderings of the chat, of every prompt and of every turn as the last one are, character by
character, the predicted ones are the spans taken over; anything else goes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.chat_markers import Field
from data_prep.chat_render import Message, normalise
from data_prep.chat_spans import Spans, Turn

Form = tuple[Any, ...]
Place = tuple[
    int, int
]  # a position in a rendering: strings of the chat before it, characters of the template before it
_STRINGS = {"content": "content", "reasoning_content": "reasoning"}
_PLAIN = {"role", "content", "reasoning_content", "thinking"}


@dataclass(frozen=True)
class _Skeleton:
    """A rendering with holes: `literals[i]` stands before the string of `holes[i]`, the last one at the end."""

    literals: tuple[str, ...]
    holes: tuple[tuple[int, str], ...]
    turns: tuple[tuple[Turn, Place, Place], ...]


class Forms:
    """The forms seen so far under one template."""

    def __init__(self, spans: Spans, special_tokens: Sequence[str]) -> None:
        self.spans = spans
        self._special = [token for token in special_tokens if token.strip()]
        self._known: dict[Form, _Skeleton | None] = {}

    def find(self, messages: Sequence[Message], tools: list[Any] | None, train_on: Any) -> tuple[str, list[Turn]]:
        """As `Spans.find`, which it equals; only quicker.

        Raises:
            DataError: as `Spans.find`.
        """
        form = self._form(messages, train_on) if not tools else None
        skeleton = self._known.get(form) if form is not None else None
        if skeleton is not None and (found := self._checked(skeleton, messages)) is not None:
            return found
        text, turns, fields = self.spans.derive(messages, tools, train_on)
        if form is not None and form not in self._known:
            self._known[form] = _learn(messages, text, turns, fields)
        return text, turns

    def _form(self, messages: Sequence[Message], train_on: Any) -> Form | None:
        """Roles and fields of a plain chat; None for a chat that always goes the long way."""
        if messages[-1].get("role") != "assistant":
            return None
        for message in messages:
            if not message.keys() <= _PLAIN:
                return None
            for key in _STRINGS:
                value = message.get(key)
                if value is None and key not in message:
                    continue
                if not isinstance(value, str) or not value.strip() or "think>" in value:
                    return None
                if any(token in value for token in self._special):
                    return None
        return (train_on, *((str(m["role"]), tuple(sorted(m))) for m in messages))

    def _checked(self, skeleton: _Skeleton, messages: Sequence[Message]) -> tuple[str, list[Turn]] | None:
        """Text and turns as predicted, if the template renders the chat, every prompt and every turn so too."""
        parts = [skeleton.literals[0]]
        sizes = [0]  # characters of the first i strings
        for (message, key), literal in zip(skeleton.holes, skeleton.literals[1:], strict=True):
            string = messages[message][key].strip()
            parts += (string, literal)
            sizes.append(sizes[-1] + len(string))
        text = "".join(parts)
        ready, plain = normalise(messages), self.spans.template.plain
        if plain(ready) != text:
            return None
        turns = []
        for turn, *places in skeleton.turns:
            start, end = (place[1] + sizes[place[0]] for place in places)
            if plain(ready[: turn.message], prompt=True) != text[:start]:
                return None
            if turn.message < len(ready) - 1:  # the turn as the last one must read the same, or it is rewritten later
                alone = plain(ready[: turn.message + 1])
                if alone is None or alone[:end] != text[:end] or alone[end:].strip():
                    return None
            turns.append(replace(turn, start=start, end=end))
        return text, turns


def _learn(messages: Sequence[Message], text: str, turns: list[Turn], fields: list[Field] | None) -> _Skeleton | None:
    """The skeleton of a chat whose spans are proven; None where its strings do not stand once each, in the open."""
    if fields is None or any(turn.strategy == "markers" or turn.rewritten for turn in turns):
        return None
    if len({turn.message for turn in turns}) < len(turns):  # generation tags cut a turn in pieces
        return None
    keys = {kind: key for key, kind in _STRINGS.items()}
    places = sorted((f.spans[0], f.message, keys.get(f.kind, "")) for f in fields if len(f.spans) == 1)
    if len(places) != len(fields) or any(not key for _, _, key in places):
        return None
    literals, at = [], 0
    for (begin, stop), message, key in places:
        if begin < at or text[begin:stop] != str(messages[message].get(key, "")).strip():
            return None
        literals.append(text[at:begin])
        at = stop
    literals.append(text[at:])

    def place(position: int) -> Place | None:
        before = [span for span, _, _ in places if span[1] <= position]
        if any(span[0] < position < span[1] for span, _, _ in places):
            return None
        return len(before), position - sum(span[1] - span[0] for span in before)

    found = [(turn, place(turn.start), place(turn.end)) for turn in turns]
    known = tuple((turn, start, end) for turn, start, end in found if start is not None and end is not None)
    holes = tuple((message, key) for _, message, key in places)
    return _Skeleton(tuple(literals), holes, known) if len(known) == len(turns) else None
