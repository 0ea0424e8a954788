"""The teacher behind one small protocol. Four engines speak it; this file is what they share and how one is opened.

An engine gets requests and yields completions as they finish, in any order. It keeps nothing: what must outlive a crash
is the journal's (journal.py), which stands between the engine and everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.logit_cache import Sparse
from recipes.schema import Recipe

Message = dict[str, Any]
CUT = "length"  # finish reason of an answer that max_tokens ended
ENDED = {"stop", "tool_calls"}  # those of a whole one


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        key: names it in the journal: hash of teacher, prompt, sampling, seed and sample index. `max_tokens` is not part
            of it.
        messages: the prompt; `tools`: tool definitions offered with it.
        prompt_ids: the prompt as the teacher's chat template and tokenizer render it; None where they are not at hand.
        sampling: temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, as far as they are set;
            temperature 0 is greedy.
        seed: of this request's draws, where the engine can be seeded by request.
        max_tokens: longest answer.
    """

    key: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...] | None
    sampling: dict[str, float]
    seed: int
    max_tokens: int
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        key: of the request.
        text: without special tokens; thinking stands in its tags.
        finish: `stop`, `length`, or the engine's own word (`content_filter`, `tool_calls`).
        token_ids: of the answer, its end token included; None where the engine does not tell.
        prompt_tokens, completion_tokens: counts.
        seconds: from the request to the answer.
        model: what the engine says that it is.
        max_tokens: the limit under which it was written.
        tool_calls: as OpenAI writes them.
        sparse: distributions at the tokens of the answer, where they were asked for and kept while generating. They
            belong to the cache and do not enter the journal.
    """

    key: str
    text: str
    finish: str
    token_ids: tuple[int, ...] | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    model: str
    max_tokens: int
    tool_calls: tuple[dict[str, Any], ...] = ()
    sparse: Sparse | None = field(default=None, compare=False)

    @property
    def truncated(self) -> bool:
        """Cut, by the finish reason or, where that is silent or wrong, by the count.

        An answer of just max_tokens may have come to its end with the last of them. An engine that shows the tokens
        knows; a server that shows none is not believed, for some say `stop` of every answer.
        """
        if self.finish == CUT or self.completion_tokens > self.max_tokens:
            return True
        known = self.finish in ENDED and self.token_ids is not None
        return self.completion_tokens == self.max_tokens and not known


class Teacher(Protocol):
    """What an engine does."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this teacher from another (reference, revision or hash of the weights)."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answers as they finish, in any order, one for each request.

        Raises:
            EngineError: the engine failed for good; what was yielded before stays valid.
        """
        ...

    def score(self, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[Sparse]:
        """Distributions at the marked tokens of sequences (token ids, which of them), in order. The first token of a
        sequence is never scored: nothing predicts it.

        Raises:
            EngineError: this engine cannot score, or failed.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """What tells the recipe's teacher from another, without starting it."""
    assert recipe.teacher is not None
    name = recipe.teacher.engine.name
    if name == "replay":
        from distill.engine_replay import ReplayTeacher

        return ReplayTeacher(recipe).identity
    from data_prep.identity import model_identity

    return model_identity(recipe)


def open_teacher(recipe: Recipe, tokenizer: Any | None, memory: Path | None = None) -> Teacher:
    """The engine that the recipe names, ready to answer.

    Args:
        tokenizer: the teacher's (transformers), where it is at hand.
        memory: a file for what a server says that it serves, which must not change from one session to the next.

    Raises:
        EngineError: it cannot be started or reached. RecipeError: the model cannot be loaded.
    """
    assert recipe.teacher is not None
    name = recipe.teacher.engine.name
    if name == "transformers":
        from distill.engine_transformers import TransformersTeacher

        return TransformersTeacher(recipe, tokenizer)
    if name == "vllm":
        from distill.engine_vllm import VllmTeacher

        return VllmTeacher(recipe, tokenizer)
    if name == "http":
        from distill.engine_http import HttpTeacher

        return HttpTeacher(recipe, tokenizer, memory)
    from distill.engine_replay import ReplayTeacher

    return ReplayTeacher(recipe)
