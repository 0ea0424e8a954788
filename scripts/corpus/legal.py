"""Contract text for pretraining: clauses of the train wordings without their questions, as a contract file shows them.

Short contracts with headings, and clauses with an editor's notes below: the heading that the clause is filed under, and
its names, dates, sums and periods as a sheet of key terms. Notes are dense on purpose: a heading is two tokens of
a hundred, and with one in three clauses noted the model had learned none of the headings after 2 million tokens.
"""

from __future__ import annotations

import random
from functools import cache

from scripts.build_legal_data import Clause, clauses

POOL = 24_000  # clauses to draw from; a clause may come back in another setting
FILED = ("Marginal note", "Side note", "Index entry", "Filed under", "Heading", "Subject", "Type", "Kind of clause")
STYLES = ("{n}: {v}", "{n}: {v}", "{n} - {v}", "{v} ({n})")
ASKED = ("{n}?", "Note the {n}.", "Next: {n}", "And the {n}?", "The {n}, please.", "Fill in: {n}")
ALL_NOTES = ("Write the notes.", "Which notes belong to this?", "Add notes to the text.", "Notes, please.")


@cache
def _pool(seed: int) -> tuple[Clause, ...]:
    return tuple(clauses(seed, POOL, "train"))


def document(rng: random.Random) -> str:
    """A short contract with headings, or one to three clauses with the notes of an editor."""
    chosen = rng.sample(_pool(1009), rng.choice((1, 2, 2, 3)))
    if rng.random() < 0.12:
        title = rng.choice(("AGREEMENT", "CONTRACT", "TERMS", "DEED"))
        parts = [f"{number}. {clause.clause_type.upper()}\n{clause.text}" for number, clause in enumerate(chosen, 1)]
        return "\n\n".join([title, *parts])
    style = rng.choice(STYLES)
    return "\n\n".join(f"{clause.text}\n{_lines(style, _notes(rng, clause))}" for clause in chosen)


def chat(rng: random.Random) -> list[dict[str, str]]:
    """An editor asks for the notes of a clause, all at once or one after the other; each is given with its name."""
    clause = rng.choice(_pool(1009))
    notes = _notes(rng, clause)
    style = rng.choice(STYLES)
    if len(notes) == 1 or rng.random() < 0.8:
        asked = [(rng.choice(ASKED).format(n=_lower(name)), style.format(n=name, v=value)) for name, value in notes[:3]]
    else:
        asked = [(rng.choice(ALL_NOTES), _lines(style, notes))]
    messages: list[dict[str, str]] = []
    for question, note in asked:
        content = question if messages else f"{clause.text}\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": note}]
    return messages


def _notes(rng: random.Random, clause: Clause) -> list[tuple[str, str]]:
    """(name, value) of the heading and most of the key terms of a clause, in random order."""
    notes = [(_upper(phrase), value) for phrase, value in clause.terms.items() if rng.random() < 0.8]
    if not notes or rng.random() < 0.85:
        notes.append((rng.choice(FILED), clause.clause_type))
    rng.shuffle(notes)
    return notes


def _lines(style: str, notes: list[tuple[str, str]]) -> str:
    return "\n".join(style.format(n=name, v=value) for name, value in notes)


def _upper(phrase: str) -> str:
    phrase = phrase.removeprefix("the ")
    return phrase[0].upper() + phrase[1:]


def _lower(name: str) -> str:
    return name[0].lower() + name[1:]
