"""What is told of answers by comparing them: with those kept before, and with held-out rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_prep.near_dup import Forest, join_similar, similarity, sketch
from data_prep.ngrams import words
from data_prep.progress import progress
from data_prep.rows import Row
from recipes.schema_teacher import Contaminated

RUN = 3  # words of the runs that similarity is counted in
COMMON = 20  # a line in more prompts is an instruction or a passage, by which rows are not told to be alike
_ROWS = 2048  # sketched together

Runs = frozenset[tuple[str, ...]]


def near_duplicates(prompts: Sequence[str], answers: Sequence[str], threshold: float) -> dict[int, int]:
    """The rows that are nearly the same as an earlier one which is none itself, and which that is.

    Two rows are nearly the same where prompt and answer together, the answers, and those lines of the prompts that the
    two do not share are each at least as similar as the threshold (Jaccard, of word 3-grams): two questions about one
    long passage are two rows, and so are two different answers to one long prompt. Prompt and answer together are
    compared by MinHash (data_prep/near_dup.py), without lines that stand in many prompts; pairs close to the threshold
    may come out either way (standard error at most 0.044), the same at every run.

    Args:
        prompts, answers: of each row, the earlier rows first.
    """
    lines = [_lines(prompt) for prompt in prompts]
    texts = ["\n".join((*own, answer)) for own, answer in zip(_own(prompts, lines), answers, strict=True)]
    starts = range(0, len(texts), _ROWS)
    parts = [sketch(texts[i : i + _ROWS], RUN, threshold) for i in progress(starts, "comparing answers", len(starts))]
    if not parts:
        return {}
    forest = Forest(len(texts))
    join_similar(forest, parts, np.ones(len(texts), dtype=np.bool_), threshold)
    heads = forest.heads()
    signatures = np.concatenate([part.signatures for part in parts])
    found: dict[int, int] = {}
    order = np.argsort(heads, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(heads[order])) + 1):
        if len(members) == 1:
            continue
        runs = {row: _runs(answers[row]) for row in members.tolist()}
        kept: dict[tuple[str, ...], list[int]] = {}  # rows by the first runs of their answers
        for row in members.tolist():
            heading = _first_runs(runs[row], threshold)
            met = np.array(sorted({other for run in heading for other in kept.get(run, ())}), dtype=np.int64)
            near = met[similarity(signatures[met], signatures[[row]]) >= threshold].tolist()
            alike = (o for o in near if _jaccard(runs[o], runs[row]) >= threshold)
            first = next((o for o in alike if _ask_alike(lines[o], lines[row], threshold)), None)
            if first is not None:
                found[row] = first
                continue
            for run in heading:
                kept.setdefault(run, []).append(row)
    return found


def _ask_alike(one: tuple[str, ...], other: tuple[str, ...], threshold: float) -> bool:
    """Whether the lines that two prompts do not share are similar."""
    if one == other:
        return True
    shared = set(one) & set(other)
    mine, theirs = (_runs("\n".join(line for line in lines if line not in shared)) for lines in (one, other))
    return _jaccard(mine, theirs) >= threshold


def _first_runs(runs: Runs, threshold: float) -> list[tuple[str, ...]]:
    """The first runs in alphabetical order, so many that two answers as similar as the threshold have one in common
    (prefix filtering, Chaudhuri, Ganti and Kaushik 2006)."""
    return sorted(runs)[: len(runs) - math.ceil(threshold * len(runs) - 1e-9) + 1] or [()]


def _lines(prompt: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line for line in map(str.strip, prompt.split("\n")) if line))


def _own(prompts: Sequence[str], lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The lines of each prompt that stand in few others; all of them where none does."""
    distinct = dict(zip(prompts, lines, strict=True))
    held = Counter(line for own in distinct.values() for line in own)
    return [tuple(line for line in own if held[line] <= COMMON) or own for own in lines]


def _runs(text: str) -> Runs:
    found = words(text) if text else []
    if 0 < len(found) < RUN:
        return frozenset([tuple(found)])
    return frozenset(zip(*(found[i:] for i in range(RUN)), strict=False))


def _jaccard(one: Runs, other: Runs) -> float:
    either = len(one | other)
    return len(one & other) / either if either else 1.0


def overlaps(
    prompts: Sequence[str], answers: Sequence[str], held_out: Sequence[Row], options: Contaminated
) -> dict[int, str]:
    """The rows whose prompt or answer overlaps with a held-out row, and with which (data_prep/decontaminate.py)."""
    from data_prep.decontaminate import Index, Item, Overlap
    from data_prep.mask_pass import texts_of

    items = [Item(row.source, tuple(texts_of(row))) for row in held_out]
    index = Index.build(items, options.words, options.similarity)
    distinct = [text for text in dict.fromkeys((*prompts, *answers)) if text.strip()]  # a prompt has many answers
    seen: dict[str, Overlap] = {}
    starts = range(0, len(distinct), _ROWS)
    for start in progress(starts, "comparing with held-out rows", len(starts)):
        part = distinct[start : start + _ROWS]
        both = zip(part, index.overlaps([[text] for text in part]), strict=True)
        seen |= {text: overlap for text, overlap in both if overlap is not None}
    found = {}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if overlap := seen.get(prompt) or seen.get(answer):
            found[row] = f"{overlap.source}: {overlap.kind}, share {overlap.share:.2f}: {overlap.shared}"
    return found
