"""Language of a text, and the signs by which Rae et al. 2021 tell web rubbish from prose.

Paper: "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", arXiv 2112.11446, appendix A.1.1
(quality filtering, repetition removal and its table A1). The thresholds were set for English web pages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from recipes.errors import RecipeError

# `min_x` fails under the number, `max_x` over it; shares are of 1. `stop_words` is for English alone, hence off.
DEFAULTS: dict[str, float] = {
    "min_words": 50,
    "max_words": 100_000,
    "min_mean_word_length": 3,
    "max_mean_word_length": 10,
    "max_symbol_ratio": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 0,  # the paper asks for 2
    "max_duplicate_lines": 0.3,
    "max_duplicate_line_chars": 0.2,
    "max_duplicate_paragraphs": 0.3,
    "max_duplicate_paragraph_chars": 0.2,
    "max_top_2gram": 0.2,
    "max_top_3gram": 0.18,
    "max_top_4gram": 0.16,
    "max_duplicate_5gram": 0.15,
    "max_duplicate_6gram": 0.14,
    "max_duplicate_7gram": 0.13,
    "max_duplicate_8gram": 0.12,
    "max_duplicate_9gram": 0.11,
    "max_duplicate_10gram": 0.1,
}
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])

# Scripts without spaces between words: every character counts as a word, marks and punctuation go with it.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
_LETTER = re.compile(r"[^\W\d_]")
_ELLIPSIS = re.compile(r"\.{3,}|…+")
_BULLETS = ("•", "‣", "◦", "●", "○", "▪", "■", "·", "–", "- ", "* ", "+ ")

_LETTERS_NEEDED = 20
_READ = 2000  # characters; more of them cost time and seldom change the verdict
_NO_PROSE = re.compile(r"```(?:[^`]++|`(?!``))*+(?:```|\Z)|`[^`\n]++`|(?:https?://|www\.)[!-~]++")
# Codes of ISO 639-3 whose language, or macrolanguage, has one in ISO 639-1.
_MACRO = {
    "ary": "ar", "arz": "ar", "fuv": "ff", "gug": "gn", "kik": "ki", "ltg": "lv", "sdh": "ku", "uzs": "uz", "wuu": "zh",
    "yue": "zh",
}  # fmt: skip
_UNKNOWN = "und"
_NO_LANGUAGE = "zxx"


def language(text: str) -> tuple[str, float]:
    """The language of a text and how probable it is, from its first 2,000 characters outside code and addresses.

    Returns:
        ISO 639-1 code (639-3 for the few languages that have none), and a probability from 0 to 1. A text of fewer than
        20 letters, or of no language, is `("und", 0.0)`.
    """
    prose = _NO_PROSE.sub(" ", text[: 10 * _READ])[:_READ]
    if sum(map(str.isalpha, prose)) < _LETTERS_NEEDED:
        return _UNKNOWN, 0.0
    shares: Counter[str] = Counter()
    for code, share in _identifier().rank(prose):
        shares[_MACRO.get(code, code)] += share
    code, share = shares.most_common(1)[0]
    return (_UNKNOWN, 0.0) if code == _NO_LANGUAGE else (code, min(share, 1.0))


@cache
def _identifier() -> Any:
    """One model per process, about half a second to load. Not the library's own, which other code may narrow down."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def faults(text: str, rules: Mapping[str, float]) -> list[str]:
    """The rules that a text breaks, one line each with the measured number; none for a text that is fine.

    Args:
        rules: limits by name; only the rules named here apply. Names and usual limits are those of DEFAULTS.

    Raises:
        RecipeError: a rule of an unknown name.
    """
    if unknown := sorted(rules.keys() - DEFAULTS.keys()):
        raise RecipeError(f"there is no quality rule '{unknown[0]}'", None, f"use some of {', '.join(DEFAULTS)}")
    measured = _measure(text, rules)
    found = []
    for rule, limit in rules.items():
        value = measured.get(rule[4:])
        if value is not None and (value < limit if rule.startswith("min_") else value > limit):
            found.append(f"{rule}: {round(value, 4)}, the limit is {limit:g}")
    return found


def _measure(text: str, rules: Mapping[str, float]) -> dict[str, float]:
    """Numbers by rule name without its `min_` or `max_`; what the text has too little for is left out."""
    words = _words(text)
    values = {"words": len(words), **_measure_lines(text)}
    if not words:
        return values
    symbols = max(text.count("#"), len(_ELLIPSIS.findall(text)))
    values["symbol_ratio"] = symbols / len(words)
    values["alphabetic_words"] = sum(1 for w in words if w.isalpha() or _LETTER.search(w)) / len(words)
    spaced = words if not _HAS_UNSPACED.search(text) else [w for w in words if not _HAS_UNSPACED.match(w)]
    if 2 * len(spaced) >= len(words):  # the length of a word says nothing where a word is a character
        values["mean_word_length"] = sum(map(len, spaced)) / len(spaced)
    if rules.get("min_stop_words"):
        values["stop_words"] = len(STOP_WORDS & {w.strip(".,;:!?()[]\"'“”‘’*_").lower() for w in words})
    if any(rule.endswith("gram") for rule in rules):
        values |= _measure_ngrams(words)
    return values


def _words(text: str) -> list[str]:
    return _WORD.findall(text) if _HAS_UNSPACED.search(text) else text.split()


def _measure_lines(text: str) -> dict[str, float]:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        return {}
    paragraphs = [part for part in map(str.strip, re.split(r"\n\s*\n", text)) if part]
    return {
        "bullet_lines": sum(line.startswith(_BULLETS) for line in lines) / len(lines),
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / len(lines),
        "duplicate_lines": 1 - len(set(lines)) / len(lines),
        "duplicate_line_chars": 1 - sum(map(len, set(lines))) / sum(map(len, lines)),
        "duplicate_paragraphs": 1 - len(set(paragraphs)) / len(paragraphs),
        "duplicate_paragraph_chars": 1 - sum(map(len, set(paragraphs))) / sum(map(len, paragraphs)),
    }


def _measure_ngrams(words: Sequence[str]) -> dict[str, float]:
    """Shares of the words' characters: in the most frequent n-gram (n = 2..4), and in n-grams that stood in the text
    before (n = 5..10). A character counts once, and an n-gram that does not come back counts nothing."""
    values = {f"top_{n}gram": 0.0 for n in range(2, 5)} | {f"duplicate_{n}gram": 0.0 for n in range(5, 11)}
    ends = [0, *accumulate(map(len, words))]
    for n, starts, grams in _repeated_ngrams(words, 10):
        if n < 5:
            counts = Counter(grams)
            most = max(counts.values())
            shares = [
                _covered([i for i, gram in zip(starts, grams, strict=True) if gram == top], n, ends)
                for top in [gram for gram, count in counts.items() if count == most][:16]
            ]
            values[f"top_{n}gram"] = max(shares)
        else:
            first = dict(zip(reversed(grams), reversed(starts), strict=True))
            again = [i for i, gram in zip(starts, grams, strict=True) if i != first[gram]]
            values[f"duplicate_{n}gram"] = _covered(again, n, ends)
    return values


def _repeated_ngrams(words: Sequence[str], longest: int) -> Iterator[tuple[int, list[int], list[Any]]]:
    """Yield `(n, starts, grams)` of the n-grams that stand at least twice in the text, for n from 2 on.

    Both parts of such an n-gram without its last and without its first word stand there twice as well, so each length
    looks only at what the one before it left.
    """
    starts: list[int] = list(range(len(words)))
    grams: list[Any] = list(words)
    for n in range(1, longest + 1):
        if n > 1:
            pairs = [(gram, words[i + n - 1]) for i, gram in zip(starts, grams, strict=True) if i + n <= len(words)]
            numbers: dict[Any, int] = {}
            grams = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
        counts = Counter(grams)
        kept = [(i, gram) for i, gram in zip(starts, grams, strict=False) if counts[gram] > 1]
        if not kept:
            return
        starts, grams = [i for i, _ in kept], [gram for _, gram in kept]
        if n > 1:
            yield n, starts, grams


def _covered(starts: Sequence[int], n: int, ends: Sequence[int]) -> float:
    """Share of the characters within the runs of `n` words at these sorted places."""
    total, done = 0, 0
    for start in starts:
        total += ends[start + n] - ends[max(start, done)]
        done = start + n
    return total / ends[-1]
