"""What a model wrote, as text: without special tokens, its thinking told from its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def end_ids(backend: Any) -> set[int]:
    """Special tokens other than tags of reasoning: where one of them stands last, the completion was not cut."""
    return {i for i, token in backend.added_tokens_decoder.items() if token.special and "think" not in token.content}


def completion_text(ids: Sequence[int], backend: Any, prompt: Sequence[int] = ()) -> str:
    """The text of a completion without special tokens, its reasoning with the tags, be they special tokens or not.

    Args:
        prompt: what it follows. Some chat templates end the prompt with the tag that opens the reasoning; it is put
            back, so that a completion looks the same under every template.
    """
    text = str(backend.decode(list(ids), skip_special_tokens=False))
    for token in backend.all_special_tokens:
        if "think" not in token.casefold():
            text = text.replace(token, "")
    end = backend.decode(list(prompt)[-8:], skip_special_tokens=False).rstrip() if prompt else ""
    opened = next((tag for tag in ("<think>", "[THINK]") if end.endswith(tag)), "")
    return opened + text.strip()


def split_thinking(text: str) -> tuple[str | None, str]:
    """Thinking (None where there is none) and answer. Thinking that never ends leaves no answer."""
    for opened, closed in TAGS:
        before, found, rest = text.rpartition(closed)
        if found and opened not in rest:
            return before.strip().removeprefix(opened).strip(), rest.strip()
        if opened in text:
            return text.partition(opened)[2].strip(), ""
    return None, text.strip()
