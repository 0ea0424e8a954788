"""What a server's replies say: answers and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.completions import TAGS
from distill.http_errors import OPTIONS, Again
from distill.teachers import CUT
from recipes.errors import EngineError

UNKNOWN = "unknown"  # finish reason of a server that gives none
_BROKEN = {"abort", "error"}  # finish reasons of an answer that the server gave up, as when it is shut down


@dataclass(frozen=True)
class Reply:
    """An answer as the server gave it.

    Attributes:
        content: None or empty where there are only thinking or tool calls.
        thinking: where the server tells it from the answer.
        prompt_tokens, completion_tokens: None where it does not count.
    """

    content: str
    thinking: str
    finish: str
    token_ids: tuple[int, ...] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tool_calls: tuple[dict[str, Any], ...]
    model: str | None
    seconds: float

    @property
    def text(self) -> str:
        """Thinking in tags, then the answer: as a model writes it that is not read by a server's parser."""
        content = self.content.strip()
        if not self.thinking or any(closed in content for _, closed in TAGS):
            return content
        opened, closed = TAGS[0]
        if self.finish == CUT and not content and not self.tool_calls:
            return f"{opened}\n{self.thinking}"  # cut while thinking
        return f"{opened}\n{self.thinking}\n{closed}\n\n{content}".strip()


def read_answer(reply: dict[str, Any], seconds: float) -> Reply:
    """The answer in a reply of `/chat/completions` or `/completions`.

    Raises:
        Again: there is none.
    """
    choice = _choice(reply)
    message = choice.get("message")
    if message is None and "text" in choice:
        message = {"content": choice["text"]}
    if not isinstance(message, dict):
        raise Again("its reply has no message", endpoint_ill=True)
    finish = choice.get("finish_reason")
    if finish in _BROKEN:
        raise Again(f"it broke the answer off ({finish})", endpoint_ill=True)
    content, thinking = _parts(message.get("content"))
    thinking = next((t for n in ("reasoning_content", "reasoning") if (t := _text(message.get(n)))), thinking)
    ids = choice.get("token_ids")
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    model = reply.get("model")
    calls = message.get("tool_calls")
    return Reply(
        content=content,
        thinking=thinking.strip(),
        finish=finish if isinstance(finish, str) and finish else UNKNOWN,
        token_ids=tuple(ids) if isinstance(ids, list) and all(type(i) is int for i in ids) else None,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        tool_calls=tuple(c for c in calls if isinstance(c, dict)) if isinstance(calls, list) else (),
        model=model if isinstance(model, str) else None,
        seconds=seconds,
    )


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Again("its reply has no choices", endpoint_ill=True)
    found: dict[str, Any] = choices[0]
    return found


def _parts(content: Any) -> tuple[str, str]:
    """Answer and thinking of a message's content: a text, or a list of parts (Mistral writes thinking as such)."""
    if not isinstance(content, list):
        return _text(content), ""
    parts = [p for p in content if isinstance(p, dict)]
    answer = "".join(_text(p.get("text")) for p in parts if p.get("type", "text") == "text")
    thinking = "".join(_parts(p.get("thinking"))[0] for p in parts if p.get("type") == "thinking")
    return answer, thinking


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def read_scores(
    reply: dict[str, Any], seconds: float, ids: Sequence[int], at: Sequence[int], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Likeliest tokens of a reply with vLLM's `prompt_logprobs`: for each position of the prompt (none for the first) a
    map of token ids to {logprob, rank, decoded_token}, the k likeliest and the token that stands there.

    Args:
        ids: the prompt; `at`: the n positions that are wanted.

    Returns:
        Token ids (n, k), -1 where there are fewer; their log-probabilities (n, k); those of the tokens that stand
        there (n,).

    Raises:
        Again: an entry is missing. EngineError: the server has no log-probabilities of prompts.
    """
    choice = _choice(reply)
    entries = choice.get("prompt_logprobs", reply.get("prompt_logprobs"))
    if entries is None:
        raise EngineError(
            "the server gives no log-probabilities of a prompt", OPTIONS, "vLLM does; or use the engine transformers"
        )
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise Again("its reply has not one entry of prompt_logprobs for each token", endpoint_ill=True)
    likeliest = np.full((len(at), k), -1, np.int64)
    log_probs = np.full((len(at), k), -np.inf)
    actual = np.zeros(len(at))
    try:
        for row, t in enumerate(at):
            found = {int(token): float(entry["logprob"]) for token, entry in entries[t].items()}
            best = sorted(found.items(), key=lambda pair: -pair[1])[:k]
            likeliest[row, : len(best)] = [token for token, _ in best]
            log_probs[row, : len(best)] = [value for _, value in best]
            actual[row] = found[ids[t]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Again("an entry of prompt_logprobs is none", endpoint_ill=True) from None
    return likeliest, log_probs, actual
