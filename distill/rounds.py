"""Rounds: what the teacher is asked about every row, one question after the other, until it has answered.

A thread is one row on its way. A round asks about every thread and goes on with one thread for each answer (or for each
part of it), so that questions can be made of a passage, made harder, answered, and answered again after another turn of
the user. Wordings are templates of the recipe in which only names are looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.completions import split_thinking
from data_prep.masks import mask_prompt
from data_prep.requests import fill
from data_prep.rows import Message, Row
from distill.teachers import Completion, Request
from recipes.lineage import sha256_json
from recipes.schema import Recipe
from recipes.schema_teacher import Round

_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+")
_FENCE = re.compile(r"^\s*```\w*\n(.*?)\n\s*```\s*$", re.DOTALL)


@dataclass(frozen=True)
class Thread:
    """A row on its way through the rounds.

    Attributes:
        row: the messages so far, without the answer that is to be learnt, and the columns that rounds wrote.
        prompt: id of the prepared prompt that it began as.
        reference: the row's own answer, None where it has none.
    """

    row: Row
    prompt: str
    reference: str | None = None


@dataclass(frozen=True)
class Asked:
    """One question of a round: the request, and the threads that wait for its answer (equal questions are one)."""

    request: Request
    sample: int
    threads: tuple[Thread, ...]


@dataclass(frozen=True)
class Asker:
    """Makes requests of a recipe's teacher.

    Attributes:
        identity: of the teacher, part of every key.
        tokenizer: the teacher's (transformers), None where it is not at hand: then the messages stand for the prompt.
        sampling: how answers are drawn; another one is another request.
    """

    recipe: Recipe
    identity: dict[str, Any]
    tokenizer: Any | None
    sampling: dict[str, float]

    def ask(self, asked: Round, threads: Sequence[Thread], samples: int) -> list[Asked]:
        """The questions of a round, in order, without repeats.

        Raises:
            DataError: a wording reads a column that a row lacks, or the chat template refuses the messages.
        """
        assert self.recipe.teacher is not None
        most = asked.max_tokens or self.recipe.teacher.sampling.max_tokens
        found: dict[str, Asked] = {}
        for thread in threads:
            messages = question(asked, thread)
            prompt = self._rendered(messages, thread.row)
            for sample in range(samples):
                key = self._key(prompt if prompt is not None else messages, thread.row, sample)
                if key in found:
                    found[key] = replace(found[key], threads=(*found[key].threads, thread))
                    continue
                seed = int(key[:8], 16) & 0x7FFFFFFF
                tools = thread.row.tools or ()
                request = Request(key, messages, prompt, self.sampling, seed, most, tools)
                found[key] = Asked(request, sample, (thread,))
        return list(found.values())

    def _rendered(self, messages: Sequence[Message], row: Row) -> tuple[int, ...] | None:
        if self.tokenizer is None:
            return None
        assert self.recipe.teacher is not None
        tools = list(row.tools) if row.tools else None
        return tuple(
            mask_prompt(
                list(messages), self.tokenizer, tools=tools, template_kwargs=self.recipe.teacher.template_kwargs
            ).input_ids
        )

    def _key(self, prompt: Any, row: Row, sample: int) -> str:
        """Names the answer in the journal. A greedy answer has one sample, whatever the seed."""
        greedy = not self.sampling.get("temperature")
        drawn = [] if greedy else [self.recipe.seed, sample]
        assert self.recipe.teacher is not None
        rendering = None  # with a tokenizer it is in the prompt
        if self.tokenizer is None:
            rendering = [row.tools, self.recipe.teacher.template_kwargs]
        return sha256_json([self.identity, prompt, rendering, self.sampling, drawn])[:32]


def question(asked: Round, thread: Thread) -> tuple[Message, ...]:
    """The messages with which a round asks about a thread."""
    row = thread.row
    if asked.ask is None:
        messages = row.messages
        if asked.system is not None:
            messages = tuple(m for m in messages if m["role"] != "system")
    else:
        wording = fill(asked.ask, columns_of(row), row.source, f"the round that writes {asked.write}")
        messages = ({"role": "user", "content": wording},)
    return (({"role": "system", "content": asked.system}, *messages)) if asked.system is not None else messages


def columns_of(row: Row) -> dict[str, Any]:
    """What a wording may name: the row's columns, its {prompt}, and the {conversation} so far."""
    said = "\n\n".join(f"{m['role'].capitalize()}: {m.get('content') or ''}" for m in row.messages)
    return {**row.extra, "prompt": row.prompt, "conversation": said}


def going_on(asked: Round, thread: Thread, completion: Completion) -> Iterator[Thread]:
    """The threads that an answer leads to: none where it was cut or is empty."""
    _, answer = split_thinking(completion.text)
    if completion.truncated or not answer:
        return
    row = replace(thread.row, grouped=thread.row.group)  # however it goes on, it stays on its side of a split
    if asked.write == "answer":
        yield replace(thread, row=replace(row, messages=(*row.messages, {"role": "assistant", "content": answer})))
    elif asked.write == "user":
        yield replace(thread, row=replace(row, messages=(*row.messages, {"role": "user", "content": answer})))
    else:
        for columns in parts(asked, answer):
            yield replace(thread, row=replace(row, extra={**row.extra, **columns}))


def parts(asked: Round, answer: str) -> list[dict[str, Any]]:
    """The columns that an answer fills: of one row, or of one row for each of its lines or list entries."""
    if asked.split == "whole":
        return [{asked.write: answer}]
    if asked.split == "lines":
        lines = [_BULLET.sub("", line).strip() for line in answer.splitlines()]
        return [{asked.write: line} for line in dict.fromkeys(lines) if line]
    fenced = _FENCE.match(answer)
    try:
        entries = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return []
    made = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            made.append({str(k): v for k, v in entry.items()})
        elif isinstance(entry, str | int | float) and str(entry).strip():
            made.append({asked.write: str(entry).strip()})
    return made


def student_row(asked: Round, thread: Thread) -> Row:
    """The prompt that the student will learn to answer."""
    row = thread.row
    if asked.student_sees is None:
        return row
    wording = fill(asked.student_sees, columns_of(row), row.source, "student_sees")
    system = tuple(m for m in row.messages if m["role"] == "system") if asked.ask is None else ()
    return replace(row, messages=(*system, {"role": "user", "content": wording}), grouped=row.group)
