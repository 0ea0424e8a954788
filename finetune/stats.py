"""Metrics of base and tuned model on the same rows, with bootstrap intervals and a paired permutation test.

Rows of one group (the questions on one clause, say) are no independent evidence, so groups are drawn and swapped whole.
A single kind of draw serves every metric, because every metric here is a function of sums over rows.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy array


@dataclass(frozen=True)
class Answer:
    """One model's result on one held-out row.

    Attributes:
        id, group: the row, and what it must not be told apart from when drawing.
        nll: sum of -log p over the row's trained tokens, in nats; `tokens`: their number.
        text: the greedy answer, None where none was generated; `reference`: the wanted one.
        rejected_nll, rejected_tokens: as nll and tokens, of a pair's rejected answer; None where there is none.
        reward: of the greedy answer, None where none was asked or applies.
    """

    id: str
    group: str
    nll: float
    tokens: int
    text: str | None
    reference: str
    rejected_nll: float | None = None
    rejected_tokens: int = 0
    reward: float | None = None


def normalise(text: str) -> str:
    """Unicode-normalised (NFKC), with single spaces and no space around."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def is_exact(answer: Answer) -> bool:
    return answer.text is not None and normalise(answer.text) == normalise(answer.reference)


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of word precision and recall after lower-casing and removing punctuation and articles.

    Source: the evaluation of SQuAD (Rajpurkar et al. 2016, section 6.1).
    """
    given, wanted = _words(text), _words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    text = "".join(c for c in normalise(text).lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def prefers(answer: Answer) -> float:
    """Whether the chosen answer is the likelier one per token (a longer answer is not less likely for its length)."""
    if answer.rejected_nll is None:
        return 0.0
    return _above(answer.rejected_nll / max(1, answer.rejected_tokens), answer.nll / max(1, answer.tokens))


def rewards_chosen(answer: Answer, start: Answer) -> float:
    """Whether the chosen answer gained more log-probability over the start than the rejected one (DPO's accuracy)."""
    if answer.rejected_nll is None or start.rejected_nll is None:
        return 0.0
    return _above(start.nll - answer.nll, start.rejected_nll - answer.rejected_nll)


def _above(left: float, right: float) -> float:
    return 0.5 if left == right else float(left > right)


def _per_row(answers: Sequence[Answer], labels: Sequence[str], start: Sequence[Answer]) -> dict[str, Array]:
    """Per metric the rows' summands, an array (rows, summands); `start`: the base's answers to the same rows."""
    found = {"loss": np.array([[a.nll, a.tokens] for a in answers], dtype=float).reshape(-1, 2)}
    found["perplexity"] = found["loss"]
    if any(a.text is not None for a in answers):
        found["exact_match"] = np.array([[is_exact(a), 1.0] for a in answers], dtype=float)
        found["token_f1"] = np.array([[token_f1(a.text or "", a.reference), 1.0] for a in answers])
        if labels:
            counted = np.array([normalise(a.reference) in labels for a in answers], dtype=float)[:, None]
            found["label_accuracy"] = found["exact_match"] * counted
            found["macro_f1"] = _confusion(answers, labels)
    if any(a.rejected_nll is not None for a in answers):
        found["preference_accuracy"] = np.array([[prefers(a), 1.0] for a in answers])
        found["reward_accuracy"] = np.array([[rewards_chosen(*both), 1.0] for both in zip(answers, start, strict=True)])
    if any(a.reward is not None for a in answers):
        found["reward"] = np.array([[a.reward or 0.0, a.reward is not None] for a in answers], dtype=float)
    return found


def _confusion(answers: Sequence[Answer], labels: Sequence[str]) -> Array:
    """Per row and label: true positive, predicted, actual; flattened to (rows, 3 * labels)."""
    table = np.zeros((len(answers), 3, len(labels)))
    for row, answer in enumerate(answers):
        wanted, given = normalise(answer.reference), normalise(answer.text or "")
        if wanted not in labels:
            continue
        table[row, 2, labels.index(wanted)] = 1
        if given in labels:
            table[row, 1, labels.index(given)] = 1
            table[row, 0, labels.index(given)] = float(given == wanted)
    return table.reshape(len(answers), -1)


def _ratio(sums: Array) -> Array:
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def _perplexity(sums: Array) -> Array:
    return np.exp(np.minimum(_ratio(sums), 700.0))


def _macro_f1(sums: Array) -> Array:
    """Mean of the labels' F1 = 2 TP / (predicted + actual), over labels that occur among the references."""
    table = sums.reshape(*sums.shape[:-1], 3, -1)
    hits, given, wanted = table[..., 0, :], table[..., 1, :], table[..., 2, :]
    f1 = np.divide(2 * hits, given + wanted, out=np.zeros_like(hits), where=given + wanted > 0)
    present = wanted > 0
    return (f1 * present).sum(-1) / np.maximum(present.sum(-1), 1)


# Metric -> value from sums of its summands (any leading shape).
VALUES: dict[str, Callable[[Array], Array]] = {
    "loss": _ratio,
    "perplexity": _perplexity,
    "exact_match": _ratio,
    "token_f1": _ratio,
    "label_accuracy": _ratio,
    "macro_f1": _macro_f1,
    "preference_accuracy": _ratio,
    "reward_accuracy": _ratio,  # the base's is one half: against itself nothing gained
    "reward": _ratio,
}


OF_TEXTS = ("exact_match", "token_f1", "label_accuracy", "macro_f1")  # what a text alone decides


def compare(
    base: Sequence[Answer],
    tuned: Sequence[Answer],
    metrics: Sequence[str],
    labels: Sequence[str] = (),
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    teacher: Sequence[Answer] | None = None,
) -> dict[str, Any]:
    """Compare two models on the same rows, and with their teacher where it answered them too.

    Intervals: percentile bootstrap over groups (Efron & Tibshirani 1993, chapter 13). p-value: two-sided paired
    permutation test, base and tuned swapped by group; (hits + 1) / (draws + 1), so it is never 0.

    Returns:
        `{"n": rows, "metrics": {name: {"base": {"value", "low", "high"}, "tuned": {...}, "p_value"}}}`; a metric that
        these rows do not have (no generated answer, no label) is left out. With a teacher the metrics of its texts
        have `teacher` as well, and `teacher_p_value` of the tuned model against it.

    Raises:
        ValueError: the two lists are not the same rows in the same order, or empty.
    """
    if not base or [a.id for a in base] != [a.id for a in tuned]:
        raise ValueError("base and tuned must be measured on the same rows, in the same order")
    generator = np.random.default_rng(seed)
    labels = [normalise(label) for label in labels]
    _, groups = np.unique([a.group for a in base], return_inverse=True)
    count = int(groups.max()) + 1
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    swaps = generator.integers(0, 2, size=(resamples, count)).astype(float)
    rows_b, rows_t = _per_row(base, labels, base), _per_row(tuned, labels, base)
    rows_m = _per_row(teacher, labels, base) if teacher is not None else {}
    result: dict[str, Any] = {}
    for name in metrics:
        if name not in rows_b or not (rows_b[name].any() or rows_t[name].any()):
            continue
        sums_b, sums_t = _by_group(rows_b[name], groups, count), _by_group(rows_t[name], groups, count)
        value = VALUES[name]
        result[name] = {
            "base": _interval(sums_b, drawn, value, confidence),
            "tuned": _interval(sums_t, drawn, value, confidence),
            "p_value": _permutation(sums_b, sums_t, swaps, value),
        }
        if name in OF_TEXTS and name in rows_m:
            sums_m = _by_group(rows_m[name], groups, count)
            result[name]["teacher"] = _interval(sums_m, drawn, value, confidence)
            result[name]["teacher_p_value"] = _permutation(sums_m, sums_t, swaps, value)
    return {"n": len(base), "metrics": result}


def values(
    answers: Sequence[Answer], metrics: Sequence[str], labels: Sequence[str], start: Sequence[Answer]
) -> dict[str, float]:
    """Metrics of one model, without intervals; what these rows do not have is left out."""
    rows = _per_row(answers, [normalise(label) for label in labels], start)
    return {name: float(VALUES[name](rows[name].sum(0))) for name in metrics if name in rows}


def _by_group(rows: Array, groups: Array, count: int) -> Array:
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, groups, rows)
    return sums


def _interval(sums: Array, drawn: Array, value: Callable[[Array], Array], confidence: float) -> dict[str, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(value(drawn @ sums), [tail, 100 - tail])
    return {"value": float(value(sums.sum(0))), "low": float(low), "high": float(high)}


def _permutation(base: Array, tuned: Array, swaps: Array, value: Callable[[Array], Array]) -> float:
    observed = abs(float(value(tuned.sum(0)) - value(base.sum(0))))
    difference = tuned - base
    swapped = swaps @ difference
    differences = value(tuned.sum(0) - swapped) - value(base.sum(0) + swapped)
    # Equal up to rounding counts as a hit: sums come in another order than the observed value.
    hits = int((np.abs(differences) >= observed - 1e-12 - 1e-9 * abs(observed)).sum())
    return (hits + 1) / (len(swaps) + 1)
