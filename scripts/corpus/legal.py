"""Contract text for pretraining: clauses of the train wordings without their questions, as a contract file shows them.

Headings, short contracts, marginal notes, and sheets of key terms that repeat the names, dates and sums of the clause
they stand by.
"""

from __future__ import annotations

import random
from functools import cache

from scripts.build_legal_data import FIELDS, Clause, clauses

POOL = 12_000  # clauses to draw from; a clause may come back in another setting
TERMS = {"date": "Date", "later": "Later date", "amount": "Amount", "fee": "Fee", "notice": "Period", "P": "Contact"}
NOTES = ("Marginal note", "Side note", "Index entry", "Filed under")


@cache
def _pool(seed: int) -> tuple[Clause, ...]:
    return tuple(clauses(seed, POOL, "train"))


def document(rng: random.Random) -> str:
    """A clause alone, under a heading, in a short contract, above a marginal note, or beside its key terms."""
    pool = _pool(1009)
    clause = rng.choice(pool)
    kind = rng.choice(("plain", "heading", "contract", "note", "note", "note", "terms", "terms", "terms"))
    if kind == "plain":
        return clause.text
    if kind == "heading":
        return f"{_heading(rng, clause)}\n{clause.text}"
    if kind == "contract":
        return _contract(rng, [clause, *rng.sample(pool, rng.randint(1, 2))])
    if kind == "note":
        return f"{clause.text}\n\n{rng.choice(NOTES)}: {clause.clause_type}"
    sheet = _key_terms(rng, clause)
    parts = [sheet, clause.text] if rng.random() < 0.3 else [clause.text, sheet]
    return "\n\n".join(part for part in parts if part)


def _heading(rng: random.Random, clause: Clause) -> str:
    title = rng.choice((clause.clause_type.upper(), clause.clause_type.title()))
    return rng.choice((title, f"{rng.randint(1, 30)}. {title}", f"Clause {rng.randint(1, 30)}: {title}"))


def _contract(rng: random.Random, chosen: list[Clause]) -> str:
    title = rng.choice(("AGREEMENT", "CONTRACT", "TERMS", "DEED"))
    parts = [f"{number}. {clause.clause_type.upper()}\n{clause.text}" for number, clause in enumerate(chosen, 1)]
    return "\n\n".join([title, *parts])


def _key_terms(rng: random.Random, clause: Clause) -> str:
    """The values of the clause's own slots, one a line; empty when it has none."""
    lines = []
    for slot, value in clause.values.items():
        name = slot.rpartition(".")[2]
        if name not in FIELDS or value not in clause.text:
            continue
        if name in ("A", "B"):
            role = clause.values["X" if name == "A" else "Y"]
            lines.append(f"{role if role in clause.text else 'Party'}: {value}")
        else:
            lines.append(f"{TERMS.get(name, 'Third party')}: {value}")
    rng.shuffle(lines)
    title = rng.choice(("KEY TERMS", "Key terms", "SUMMARY", "SCHEDULE", "Particulars"))
    return "\n".join([title, *lines]) if lines else ""
