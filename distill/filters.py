"""Filters: what can be told of the teacher's answers, which of them are dropped for it, and why.

Every answer is tagged with all that is wrong with it. It is dropped for the first of its tags that the recipe names,
and kept aside with the reason; what a recipe does not name is counted all the same. One text is looked at in
filter_texts.py, texts are compared in filter_pairs.py.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from data_prep.completions import split_thinking
from data_prep.progress import progress
from data_prep.rows import Row
from distill.filter_pairs import near_duplicates, overlaps
from distill.filter_texts import final_answer, grounding, leak, loops, marker, misses_format, wrong_language
from distill.teachers import Completion
from recipes.lineage import canonical_json
from recipes.schema import Recipe
from recipes.schema_teacher import (
    AnswerLength,
    Contaminated,
    Empty,
    Filter,
    Grounded,
    NearDuplicate,
    Repetitive,
    TemplateLeak,
    Truncated,
    Verified,
    Vote,
)
from recipes.student import PROMPT

ORDER = tuple(Filter.model_fields)  # of the reasons: the first one counts
LATE = ("near_duplicate", "contaminated")  # looked at only where nothing else speaks against an answer
# Options of filters that are not named; `format` and `language` mean nothing without some.
UNNAMED: dict[str, Any] = {
    "truncated": Truncated(),
    "empty": Empty(),
    "template_leak": TemplateLeak(),
    "repetition": Repetitive(),
    "length": AnswerLength(),
    "grounded": Grounded(),
    "verified": Verified(),
    "vote": Vote(),
    "near_duplicate": NearDuplicate(),
    "contaminated": Contaminated(),
}
BATCH = 256  # answers looked at, or marked, together


@dataclass(eq=False)
class Candidate:
    """One answer of the teacher that may become a row.

    Attributes:
        row: what the student will be asked: the messages without the answer, and the row's other columns in `extra`.
        completion: the answer.
        sample: its number among the answers to the prompt, from 0.
        reference: the right answer, None where the row has none.
        score: sum of the recipe's reward functions, None where none of them could mark it.
        tags: what is wrong with it: filter, and the particulars.
    """

    row: Row
    completion: Completion
    sample: int
    reference: str | None = None
    score: float | None = None
    tags: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _parts(self) -> tuple[str | None, str]:
        return split_thinking(self.completion.text)

    @property
    def thinking(self) -> str | None:
        return self._parts[0]

    @property
    def answer(self) -> str:
        """What was said after the thinking."""
        return self._parts[1]

    @property
    def prompt(self) -> str:
        """The id of the prepared prompt that this came from, or of the row."""
        return str(self.row.extra.get(PROMPT, self.row.id))

    @property
    def calls(self) -> str:
        """The tools called, without the calls' ids; empty where there are none."""
        return (
            canonical_json([_call(call) for call in self.completion.tool_calls]) if self.completion.tool_calls else ""
        )

    def learnt(self, keep_thinking: bool) -> str:
        """All that the student would learn to write."""
        parts = (self.thinking if keep_thinking else None, self.answer, self.calls)
        return "\n".join(part for part in parts if part)


def _call(call: dict[str, Any]) -> list[Any]:
    named = call.get("function") or call
    arguments = named.get("arguments")
    try:
        return [named.get("name"), json.loads(arguments) if isinstance(arguments, str) else arguments]
    except (ValueError, RecursionError):
        return [named.get("name"), arguments]


Verify = Callable[[Sequence[Candidate]], list[float | None]]
Rejected = tuple[Candidate, str, str]  # with the reason and the particulars
Look = Callable[[Candidate], str | None]


@dataclass
class Judged:
    """What became of the candidates, in the order of row, prompt and sample.

    Attributes:
        kept: rows to be.
        rejected: the others, each with its reason (a filter, `not_best`, `not_first`) and the particulars.
        tagged: candidates by tag, 0 for what was looked for and not found. A filter that had nothing to look at (no
            passage, one sample of each prompt, no held-out row) is missing.
        rejected_counts: candidates by reason.
    """

    kept: list[Candidate]
    rejected: list[Rejected]
    tagged: dict[str, int]
    rejected_counts: dict[str, int]


def judge(
    candidates: Sequence[Candidate], recipe: Recipe, verify: Verify | None = None, held_out: Sequence[Row] = ()
) -> Judged:
    """Tag all candidates, drop what the recipe names, and keep what `teacher.keep` asks for of every prompt's rest.

    The result does not depend on the order of the candidates. Their tags and scores are written into them. Overlap with
    held-out rows is looked for where no named filter spoke before, near-duplicates among what is kept in the end: an
    answer never makes way for one that is dropped itself.

    Args:
        verify: marks answers by the recipe's reward functions; without it scores stay as they are.
        held_out: rows that the student is measured on.
    """
    teacher = recipe.teacher
    assert teacher is not None
    named = teacher.dropping
    options = {
        name: named[name] if name in named else UNNAMED[name] for name in ORDER if name in named or name in UNNAMED
    }
    found = sorted(candidates, key=lambda c: (c.row.id, c.prompt, c.sample, c.completion.key))
    groups = [list(group) for _, group in groupby(found, key=lambda c: (c.row.id, c.prompt))]
    tagged: Counter[str] = Counter()
    reasons: dict[Candidate, tuple[str, str]] = {}

    def note(name: str, details: Iterable[tuple[Candidate, str | None]]) -> None:
        tagged[name] += 0
        for candidate, detail in details:
            if detail is not None:
                candidate.tags[name] = detail
                tagged[name] += 1

    def reject(*filters: str) -> None:
        for candidate in found:
            first = next((name for name in filters if name in named and name in candidate.tags), None)
            if first is not None:
                reasons.setdefault(candidate, (first, candidate.tags[first]))

    def left() -> list[Candidate]:
        return [candidate for candidate in found if candidate not in reasons]

    for candidate in found:
        candidate.tags = {}
    looks = _looks(options, teacher.keep_thinking, {column for c in found for column in c.row.extra})
    for batch in _batches(found, "looking at answers"):
        for name, look in looks.items():
            note(name, ((c, look(c)) for c in batch))
    if verify is not None:
        for batch in _batches(found, "marking answers"):
            for candidate, score in zip(batch, verify(batch), strict=True):
                candidate.score = score
    if verify is not None or any(c.score is not None for c in found):
        note("verified", ((c, _unverified(c, options["verified"])) for c in found))
    votes = {c: count for group in groups for c, count in _votes(group).items()}
    if len(found) > len(groups):
        note("vote", (item for group in groups for item in _outvoted(group, votes, options["vote"])))
    reject(*(name for name in ORDER if name not in LATE))
    if held_out:
        some, prompts, texts = _texts(left(), teacher.keep_thinking)
        overlapping = overlaps(prompts, texts, held_out, options["contaminated"])
        note("contaminated", ((some[n], detail) for n, detail in overlapping.items()))
        reject("contaminated")
    for group in groups:
        _choose([c for c in group if c not in reasons], teacher.keep, votes, reasons)
    some, prompts, texts = _texts(left(), teacher.keep_thinking)
    copies = near_duplicates(prompts, texts, options["near_duplicate"].threshold)
    note("near_duplicate", ((some[n], f"of {_place(some[first])}") for n, first in copies.items()))
    reject("near_duplicate")
    counts = Counter(reason for reason, _ in reasons.values())
    return Judged(
        kept=left(),
        rejected=[(c, *reasons[c]) for c in found if c in reasons],
        tagged={name: tagged[name] for name in ORDER if name in tagged},
        rejected_counts={name: counts[name] for name in (*ORDER, "not_best", "not_first") if counts[name]},
    )


def _batches(candidates: Sequence[Candidate], what: str) -> Iterator[Sequence[Candidate]]:
    starts = range(0, len(candidates), BATCH)
    for start in progress(starts, what, len(starts)):
        yield candidates[start : start + BATCH]


def _looks(options: dict[str, Any], keep_thinking: bool, columns: set[str]) -> dict[str, Look]:
    """The filters that look at one answer alone, each a function that says what is wrong, in the order of the schema.

    Text is looked at where there is some: tools may be called without a word.
    """
    looks: dict[str, Look] = {
        "truncated": lambda c: f"cut after {c.completion.completion_tokens} tokens" if c.completion.truncated else None,
        "empty": lambda c: "no answer" if not c.answer and not c.completion.tool_calls else None,
    }
    if (form := options.get("format")) is not None:
        pattern = re.compile(form.pattern, re.DOTALL) if form.pattern is not None else None
        looks["format"] = lambda c: None if c.calls else misses_format(c.completion.text, c.answer, form, pattern)
    looks["template_leak"] = lambda c: leak(c.answer) or (marker(c.thinking or "") if keep_thinking else None)
    repeats = options["repetition"]
    looks["repetition"] = lambda c: _loops(c, repeats)
    length = options["length"]
    looks["length"] = lambda c: _wrong_length(c.completion.completion_tokens, length)
    if (wanted := options.get("language")) is not None:
        looks["language"] = lambda c: wrong_language(c.answer, wanted.keep)
    grounds = options["grounded"]
    if grounds.column in columns:
        looks["grounded"] = lambda c: _ungrounded(c, grounds)
    return looks


def _loops(candidate: Candidate, options: Repetitive) -> str | None:
    if (detail := loops(candidate.answer, options.words, options.most)) is not None:
        return detail
    if candidate.thinking and (detail := loops(candidate.thinking, options.words, options.most)) is not None:
        return f"in the thinking, {detail}"
    return None


def _wrong_length(tokens: int, options: AnswerLength) -> str | None:
    if tokens < options.min_tokens:
        return f"{tokens} tokens, at least {options.min_tokens} are wanted"
    if options.max_tokens is not None and tokens > options.max_tokens:
        return f"{tokens} tokens, at most {options.max_tokens} are wanted"
    return None


def _ungrounded(candidate: Candidate, options: Grounded) -> str | None:
    passage = candidate.row.extra.get(options.column)
    if not isinstance(passage, str) or not candidate.answer:
        return None
    share = grounding(candidate.answer, passage)
    return f"{share:.2f} of it stands in {options.column}" if share < options.share else None


def _unverified(candidate: Candidate, options: Verified) -> str | None:
    """An answer that no function could mark is not a verified one."""
    if candidate.score is None:
        return "no reward function could mark it"
    return None if candidate.score >= options.at_least else f"marked {candidate.score:g}"


def _votes(group: Sequence[Candidate]) -> dict[Candidate, int]:
    """How many of a prompt's samples come to each one's answer; 0 for a sample that was cut or is empty."""
    if len(group) < 2:
        return dict.fromkeys(group, 1)
    finals = {c: "" if c.completion.truncated else c.calls or final_answer(c.answer) for c in group}
    counts = Counter(final for final in finals.values() if final)
    return {c: counts[final] for c, final in finals.items()}


def _outvoted(
    group: Sequence[Candidate], votes: dict[Candidate, int], options: Vote
) -> Iterator[tuple[Candidate, str | None]]:
    """Samples that do not come to the answer of most. Several answers with equally many votes are no majority."""
    if len(group) < 2:
        return
    most = max(votes[c] for c in group)
    first = [c for c in group if votes[c] == most]
    wins = most > 0 and len(first) == most and most >= options.share * len(group)
    for candidate in group:
        if not wins:
            yield candidate, f"no majority among {len(group)} samples"
        elif votes[candidate] != most:
            yield candidate, f"{votes[candidate]} of {len(group)} samples say so, {most} agree on another answer"


def _choose(
    passed: Sequence[Candidate],
    keep: Literal["all", "best", "first"],
    votes: dict[Candidate, int],
    reasons: dict[Candidate, tuple[str, str]],
) -> None:
    """Leave one of a prompt's answers that passed, unless all are kept."""
    if keep == "all" or len(passed) < 2:
        return
    chosen = passed[0]
    if keep == "best":
        chosen = max(passed, key=lambda c: (-math.inf if c.score is None else c.score, votes[c]))  # of equals the first
    for candidate in passed:
        if candidate is not chosen:
            reasons[candidate] = (f"not_{keep}", f"sample {chosen.sample} is kept")


def _texts(some: list[Candidate], keep_thinking: bool) -> tuple[list[Candidate], list[str], list[str]]:
    """The candidates, their prompts, and what the student would learn to answer."""
    return some, [c.row.prompt for c in some], [c.learnt(keep_thinking) for c in some]


def _place(candidate: Candidate) -> str:
    return f"sample {candidate.sample} of {candidate.row.source}"
