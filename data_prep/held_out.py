"""Which held-out rows are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from recipes.errors import DataError
from recipes.schema import Recipe


def choose_rows(rows: Sequence[dict[str, Any]], recipe: Recipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The held-out rows to measure base and tuned model on, and those to watch and select by while training.

    Whole groups are taken, in an order that the seed decides, until `eval.samples` is reached; what is left is for
    watching. Where weights are selected (train.best) the two never overlap, or the selection would flatter the result:
    a quarter of the rows is set aside for it when too few are left. Else the measured rows are watched.
    """
    rows = [row for row in rows if row["label"] is not False]  # nothing is measured on an answer known to be bad
    wanted = recipe.eval.samples or len(rows)
    if recipe.train.best is not None:
        wanted = min(wanted, max(1, len(rows) - max(1, len(rows) // 4)))
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["_group"], []).append(i)
    order = sorted(groups, key=lambda g: hashlib.sha256(f"{recipe.seed}:{g}".encode()).digest())
    chosen: list[int] = []
    left: list[int] = []
    for group in order:
        (chosen if len(chosen) + len(groups[group]) <= wanted else left).extend(groups[group])
    if not chosen and order:
        chosen, left = groups[order[0]], [i for group in order[1:] for i in groups[group]]
    measured = [rows[i] for i in sorted(chosen)]
    watched = [rows[i] for i in sorted(left[: recipe.eval.samples])]
    if not watched and recipe.train.best is not None:
        raise DataError("has one group of held-out rows, so none are left to select by", "data.eval", "hold out more")
    return measured, watched or measured
