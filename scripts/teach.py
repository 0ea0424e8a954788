"""`retort generate`: the teacher's stage, with the reward functions that may verify what it writes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from data_prep.rows import before_answer
from distill.filters import Candidate, Verify
from distill.generate import generate
from finetune import rewards
from finetune.runs import make_room
from recipes.errors import RecipeError
from recipes.schema import Recipe


def generate_rows(recipe: Recipe, shard: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Run the stage; returns its figures.

    Args:
        shard: `i/n` as typed.
        quiet: what happens is told on stderr, so that stdout holds the figures alone.

    Raises:
        RecipeError: the shard is none.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr if quiet else sys.stdout, flush=True)

    part = _shard(shard)
    for note in make_room(recipe):
        say(note)
    return generate(recipe, verifier(recipe), part, say)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return (1, 1)
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"'{text}' is no shard", "--shard", "write 1/8 to 8/8")
    return int(match[1]), int(match[2])


def verifier(recipe: Recipe) -> Verify | None:
    """The sum of the reward functions of teacher.verify; None where there are none."""
    terms = recipe.teacher.verify if recipe.teacher is not None else ()
    if not terms:
        return None
    scores = [rewards.build(term, f"teacher.verify[{i}].{term.name}") for i, term in enumerate(terms)]

    def verify(candidates: Sequence[Candidate]) -> list[float | None]:
        samples = [_sample(candidate) for candidate in candidates]
        columns = [score(samples) for score in scores]
        return [_sum(values) for values in zip(*columns, strict=True)]

    def _sum(values: Sequence[float | None]) -> float | None:
        known = [term.options.weight * v for term, v in zip(terms, values, strict=True) if v is not None]
        return sum(known) if known else None

    return verify


def _sample(candidate: Candidate) -> rewards.Sample:
    messages = before_answer(candidate.row.messages)
    completion = candidate.completion
    return rewards.Sample(
        prompt=next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), ""),
        messages=messages,
        completion=completion.text,
        reference=candidate.reference,
        columns={**candidate.row.extra, "_id": candidate.row.id},
        tokens=completion.completion_tokens,
        finished=not completion.truncated,
    )


def describe(stats: dict[str, Any]) -> str:
    """The figures as lines for a person."""
    rejected = ", ".join(f"{n:,} {reason}" for reason, n in stats["rejected"].items()) or "none"
    return (
        f"teacher: {stats['completions']:,} answers ({stats['calls_made']:,} asked for, {stats['from_journal']:,} from "
        f"the journal), {stats['prompt_tokens']:,} prompt and {stats['completion_tokens']:,} answer tokens, "
        f"{stats['truncated']:,} cut; kept {stats['kept']:,}, rejected: {rejected}"
    )
