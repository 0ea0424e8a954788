"""Rows -> what a method trains on: token ids with a loss mask, one sequence or two.

A chat or a text is one sequence. A preference pair is two that share every token of the prompt. Under KTO it is two
labelled answers. Under a reward (GRPO) only the prompt is tokenised, as it is when the model is asked; of a chat row
the last answer is then what the rewards compare with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from data_prep.masks import Masked, mask_chats, mask_prompt, mask_text
from data_prep.rows import Message, Row, before_answer
from data_prep.tokens import Tokenizer
from recipes.errors import DataError
from recipes.schema import Recipe


@dataclass(frozen=True)
class Line:
    """One training example.

    Attributes:
        masked: its sequence; of a pair the one with the chosen answer. A prompt's mask is all False.
        rejected: of a pair the sequence with the rejected answer.
    """

    row: Row
    masked: Masked
    rejected: Masked | None = None

    @property
    def longest(self) -> int:
        return max(len(masked.input_ids) for masked in self.sequences)

    @property
    def sequences(self) -> tuple[Masked, ...]:
        return (self.masked,) if self.rejected is None else (self.masked, self.rejected)

    def cut(self, limit: int) -> Line:
        """The line with its sequences cut to `limit` tokens."""

        def short(masked: Masked) -> Masked:
            return Masked(masked.input_ids[:limit], masked.mask[:limit], masked.text)

        return Line(self.row, short(self.masked), short(self.rejected) if self.rejected else None)


def lines_of(
    recipe: Recipe, rows: Sequence[Row], tokenizer: Tokenizer, held_out: bool = False
) -> list[list[Line] | DataError]:
    """The lines of each row, in order; the error of a row that has none, which names the row.

    Held-out pairs stay pairs under KTO too: what is measured on them is which answer the model prefers.
    """
    made: list[list[Line] | DataError] = []
    for kind, group in groupby(rows, key=lambda row: row.kind):
        same = list(group)
        if kind == "text":
            made += [_one(row, _text(row, tokenizer)) for row in same]
        elif recipe.prompts_only:
            made += [_one(row, _prompt(recipe, row, tokenizer)) for row in same]
        elif kind == "preference" and recipe.method.type == "kto" and not held_out:
            made += _as_labelled(recipe, same, tokenizer)
        elif kind == "preference":
            made += _pairs(recipe, same, tokenizer)
        else:
            train_on = "last" if kind == "labelled" else recipe.data.train_on
            found = _chats(recipe, [(row, row.messages) for row in same], train_on, tokenizer)
            made += [_one(row, masked) for row, masked in zip(same, found, strict=True)]
    return [_named(row, found) for row, found in zip(rows, made, strict=True)]


def _one(row: Row, masked: Masked | DataError) -> list[Line] | DataError:
    return masked if isinstance(masked, DataError) else [Line(row, masked)]


def _named(row: Row, found: list[Line] | DataError) -> list[Line] | DataError:
    if isinstance(found, DataError):
        return DataError(found.message, f"{row.source} (row {row.id})", found.remedy)
    return found


def _text(row: Row, tokenizer: Tokenizer) -> Masked | DataError:
    try:
        return mask_text(str(row.text), tokenizer.backend)
    except DataError as error:
        return error


def _prompt(recipe: Recipe, row: Row, tokenizer: Tokenizer) -> Masked | DataError:
    try:
        return mask_prompt(
            list(before_answer(row.messages)),
            tokenizer.backend,
            tools=list(row.tools) if row.tools else None,
            template_kwargs=recipe.model.template_kwargs,
        )
    except DataError as error:
        return error


def _chats(
    recipe: Recipe, chats: Sequence[tuple[Row, Sequence[Message]]], train_on: Any, tokenizer: Tokenizer
) -> list[Masked | DataError]:
    found = mask_chats(
        [list(messages) for _, messages in chats],
        tokenizer.backend,
        tools=[list(row.tools) if row.tools else None for row, _ in chats],
        train_on=train_on,
        template_kwargs=dict(recipe.model.template_kwargs),
    )
    return [_with_reasoning(messages, masked) for (_, messages), masked in zip(chats, found, strict=True)]


def _with_reasoning(messages: Sequence[Message], masked: Masked | DataError) -> Masked | DataError:
    thought = messages[-1].get("reasoning_content") if messages else None
    if isinstance(masked, Masked) and thought and thought.strip() not in masked.text:
        return DataError("the chat template leaves out the reasoning of the last turn", None, "drop it from the rows")
    return masked


def _pairs(recipe: Recipe, rows: Sequence[Row], tokenizer: Tokenizer) -> list[list[Line] | DataError]:
    chosen = _answers(recipe, [(row, row.chosen) for row in rows], tokenizer)
    rejected = _answers(recipe, [(row, row.rejected) for row in rows], tokenizer)
    return [_pair(*parts) for parts in zip(rows, chosen, rejected, strict=True)]


def _pair(row: Row, chosen: Masked | DataError, rejected: Masked | DataError) -> list[Line] | DataError:
    if isinstance(chosen, DataError):
        return chosen
    if isinstance(rejected, DataError):
        return rejected
    begins = chosen.mask.index(True)
    if begins != rejected.mask.index(True) or chosen.input_ids[:begins] != rejected.input_ids[:begins]:
        return DataError("the chat template renders the prompt in two ways, depending on the answer")
    if chosen.input_ids == rejected.input_ids:
        return DataError("the chat template renders both answers alike")
    return [Line(row, chosen, rejected)]


def _as_labelled(recipe: Recipe, rows: Sequence[Row], tokenizer: Tokenizer) -> list[list[Line] | DataError]:
    made: list[list[Line] | DataError] = []
    for pair in _pairs(recipe, rows, tokenizer):
        if isinstance(pair, list):
            line = pair[0]
            row, sides = line.row, zip((True, False), (line.row.chosen, line.row.rejected), line.sequences, strict=True)
            made.append([Line(_labelled(row, answer, label), masked) for label, answer, masked in sides])
        else:
            made.append(pair)
    return made


def _labelled(row: Row, answer: tuple[Message, ...], label: bool) -> Row:
    """One side of a pair as a row of its own, in the group of the pair."""
    messages = (*row.messages, *answer)
    return replace(row, messages=messages, chosen=(), rejected=(), label=label, grouped=row.group)


def _answers(
    recipe: Recipe, answers: Sequence[tuple[Row, tuple[Message, ...]]], tokenizer: Tokenizer
) -> list[Masked | DataError]:
    """Prompt and answer as one sequence, the answer trained: its assistant turns, not what tools said between them."""
    made: list[Masked | DataError] = []
    for several, group in groupby(answers, key=lambda item: len(item[1]) > 1):
        same = list(group)
        chats = [(row, (*row.messages, *answer)) for row, answer in same]
        found = _chats(recipe, chats, "all" if several else "last", tokenizer)
        if several:
            found = [_behind_the_prompt(row, masked) for (row, _), masked in zip(same, found, strict=True)]
        made += found
    return made


def _behind_the_prompt(row: Row, masked: Masked | DataError) -> Masked | DataError:
    """Only the turns behind the prompt stay trained: its own assistant turns are the first runs of the mask."""
    if isinstance(masked, DataError):
        return masked
    earlier = sum(message["role"] == "assistant" for message in row.messages)
    mask, runs = list(masked.mask), 0
    for i, trained in enumerate(masked.mask):
        runs += trained and (i == 0 or not masked.mask[i - 1])
        mask[i] = trained and runs > earlier
    return Masked(masked.input_ids, mask, masked.text)


def trained(lines: Iterable[Line]) -> int:
    """Tokens in the loss."""
    return sum(sum(masked.mask) for line in lines for masked in line.sequences)
