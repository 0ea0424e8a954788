"""Row steps: each looks at one row and keeps it, changes it, or drops it with a reason.

A step is a pure function of its row and its options. It does not know where it runs, which row came before, or how many
there are; steps that compare rows with each other are in decide.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.ngrams import words
from data_prep.rows import Row
from recipes.schema import Model
from recipes.schema_data import Clean, Language, Length, Pii, Quality, Step


@dataclass(frozen=True)
class Drop:
    """Why a row is dropped: a word for the table, and the particulars for a person."""

    reason: str
    detail: str = ""


RowStep = Callable[[Row], Row | Drop]
SHORT_ANSWER = 20  # words; shares of fewer say nothing


def row_step(step: Step, model: Model) -> RowStep:
    """The function of a step that looks at single rows.

    Args:
        model: whose tokenizer counts tokens.
    """
    return ROW_STEPS[step.name](step.options, model)


def _clean(options: Clean, _: Model) -> RowStep:
    from data_prep.clean import clean_text

    def run(row: Row) -> Row | Drop:
        cleaned = row.map_texts(lambda text: clean_text(text, options.html))
        return cleaned if cleaned.whole.strip() else Drop("empty", "nothing is left after cleaning")

    return run


def _language(options: Language, _: Model) -> RowStep:
    from data_prep.quality import language

    def run(row: Row) -> Row | Drop:
        found, probability = language(row.whole)
        if found in options.keep and probability >= options.min_probability:
            return row
        return Drop("language", f"{found}, probability {probability:.2f}")

    return run


def _length(options: Length, model: Model) -> RowStep:
    from data_prep.tokens import shared_tokenizer

    tokenizer = shared_tokenizer(model).backend
    low, high = options.min_tokens or 0, options.max_tokens or float("inf")

    def run(row: Row) -> Row | Drop:
        count = len(tokenizer(row.whole, add_special_tokens=False)["input_ids"])
        return row if low <= count <= high else Drop("length", f"{count} tokens")

    return run


def _quality(options: Quality, _: Model) -> RowStep:
    from data_prep.quality import DEFAULTS, faults

    def limits(**defaults: float | None) -> dict[str, float]:
        asked: dict[str, float | None] = {**DEFAULTS, **defaults, **{str(k): v for k, v in options.rules.items()}}
        return {name: limit for name, limit in asked.items() if limit is not None}

    # The paper's least length is that of a web page; an answer may be shorter.
    prose, answers = limits(), limits(min_words=None)

    def run(row: Row) -> Row | Drop:
        text = row.text if row.text is not None else row.whole if options.on == "row" else row.reference
        if row.text is None and len(words(text)) < SHORT_ANSWER:
            return row
        found = faults(text, prose if row.text is not None else answers)
        return Drop("quality", "; ".join(found)) if found else row

    return run


def _pii(options: Pii, _: Model) -> RowStep:
    from data_prep.pii import DEFAULT, Masker, load_ner
    from data_prep.tokens import fetch
    from recipes.refs import parse_ref

    entities = options.entities or DEFAULT
    names = load_ner(fetch(parse_ref(options.names), True, "data.steps")) if options.names else None

    def run(row: Row) -> Row | Drop:
        masker = Masker(entities, options.regions, names)
        masked = row.map_texts(masker.mask, inside_calls=True)
        if options.action == "drop" and masker.counts:
            return Drop("pii", ", ".join(f"{count} {entity}" for entity, count in sorted(masker.counts.items())))
        return masked

    return run


ROW_STEPS: dict[str, Callable[[Any, Model], RowStep]] = {
    "clean": _clean,
    "language": _language,
    "length": _length,
    "quality": _quality,
    "pii": _pii,
}
