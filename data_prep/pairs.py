"""Preference pairs: the shared prompt and the two answers, whatever the shape they come in."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from data_prep.rows import Message
from recipes.tables import BadRecord

Messages = tuple[Message, ...]
Parse = Callable[[Any, str, str], Messages]

# The transcripts of hh-rlhf: turns that begin with a blank line and the speaker's name.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference(record: dict[str, Any], place: str, parse: Parse) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected answer of a record.

    Accepted: a prompt column (text, messages or ShareGPT turns) beside answers as texts or messages; no prompt column
    and both sides as whole chats or hh-rlhf transcripts, whose common beginning is the prompt.

    Args:
        parse: turns a list of messages of any known shape into messages.

    Raises:
        BadRecord: no shared prompt, a side that does not end with the assistant, two equal answers.
    """
    given = next((name for name in ("prompt", "messages", "conversations") if record.get(name)), None)
    sides = [_side(record.get(name), name, place, parse) for name in ("chosen", "rejected")]
    if given is None:
        prompt, chosen, rejected = _apart(*sides)
    else:
        value = record[given]
        prompt = _open(_transcript(value)) if isinstance(value, str) else parse(value, place, given)
        chosen, rejected = (_without(prompt, side) for side in sides)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1]["role"] != "assistant":
            raise BadRecord(f"'{name}' holds no answer of the assistant", place)
    if not any(m["role"] == "user" for m in prompt):
        raise BadRecord("the two answers share no prompt", place, "give the prompt in a column of its own")
    if chosen == rejected:
        raise BadRecord("'chosen' and 'rejected' are equal", place)
    return prompt, chosen, rejected


def _side(value: Any, name: str, place: str, parse: Parse) -> Messages:
    """One side: an answer, or a whole chat that ends with it."""
    if isinstance(value, str):
        turns = _transcript(value)
        return turns if len(turns) > 1 else ({"role": "assistant", "content": value},)
    return parse(value, place, name)


def _transcript(text: str) -> Messages:
    """The turns of an hh-rlhf transcript; any other text is one turn of the user."""
    parts = _SPEAKER.split(text)
    if len(parts) < 3 or parts[0].strip():
        return ({"role": "user", "content": text},)
    said = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"role": _ROLES[speaker], "content": words.strip("\n")} for speaker, words in said]
    return tuple(turns)


def _open(turns: Messages) -> Messages:
    """A prompt without the assistant's name at its end, behind which the answer is to come."""
    last = turns[-1]
    return turns[:-1] if last["role"] == "assistant" and not last["content"].strip() else turns


def _apart(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The common beginning, and what follows it on each side. The answers begin with a turn of the assistant."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    while same and (same == len(chosen) or same == len(rejected) or chosen[same - 1]["role"] == "assistant"):
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def _without(prompt: Messages, side: Messages) -> Messages:
    """An answer without the prompt that it repeats."""
    return side[len(prompt) :] if len(side) > len(prompt) and side[: len(prompt)] == prompt else side
