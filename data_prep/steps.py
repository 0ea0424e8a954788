"""Preparation steps. A step looks at rows and keeps each one or drops it with a reason; it never changes the order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from data_prep.formats import Row

Verdicts = list[str | None]  # one per row: None keeps it, a text drops it for that reason


def exact_dedup(rows: Sequence[Row]) -> Verdicts:
    """Keep the first of equal rows."""
    seen: set[str] = set()
    verdicts: Verdicts = []
    for row in rows:
        verdicts.append("exact_duplicate" if row.id in seen else None)
        seen.add(row.id)
    return verdicts


def not_in(rows: Sequence[Row], held_out: Sequence[Row]) -> Verdicts:
    """Drop training rows that stand word for word among the held-out ones."""
    forbidden = {row.id for row in held_out}
    return ["in_eval" if row.id in forbidden else None for row in rows]


STEPS = {"exact_dedup": exact_dedup}


def holdout(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, eval) by whole groups; a group's side depends on the seed and the group alone.

    Groups are ordered by a hash, and taken for evaluation until `fraction` of the rows is reached (at least one group,
    and at least one is left for training).
    """
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0) + 1
    order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
    chosen: set[str] = set()
    taken = 0
    for group in order[:-1]:
        if chosen and taken + sizes[group] > fraction * len(rows):
            break
        chosen.add(group)
        taken += sizes[group]
    return [r for r in rows if r.group not in chosen], [r for r in rows if r.group in chosen]
