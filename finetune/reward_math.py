"""Whether an answer is mathematically equal to the wanted one: find the final answer, then compare.

The final answer of a text is what stands in its last `\\boxed{}`, or after its last `####` (GSM8K), `A:`, `Answer:` or
"the answer is", whichever comes last and is followed by a number or a formula. Without any of them it is the last line
that has a number or formula. A number may have a sign, a currency, thousands separators, a magnitude (million), a per
cent sign and a unit in words. Numbers are compared to six decimals as math-verify does; all else that is no plain word
is compared by math-verify, in a process of its own (`limited.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from finetune.limited import Limited

LONGEST = 400  # characters of a final answer; a longer one is no answer
_LOOKED_AT = 20_000  # characters at the end of a completion
_MARKS = 20  # of its marks, from the last one on

_MARK = re.compile(
    r"####|\\boxed\s*\{|^[ \t>*_#]*A(?:ns)?[*_]*:|\banswer\b[^\n.:=]{0,60}?(?:\bis\b(?:[ \t]*:)?|:|=)",
    re.IGNORECASE | re.MULTILINE,
)
_MATHS = re.compile(r"\d|\\[a-zA-Z]")
_MAGNITUDES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCY = r"(?:\\?[$€£¥₹₩₽]|(?:USD|EUR|GBP|Rs\.?)\s)?"
_DIGITS = r"(?:\d{1,3}(?:(?:,|\\,|\{,\}|[\u00a0\u202f ])\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:(?<=\d)e[+-]?\d{1,2}\b)?"
_PERCENT = r"\\?%|per ?cent\b"
_OVER = r"(?:\s*[/⁄]\s*\d+)?"
# A word after a number is a unit, unless it makes the number a part of a formula.
_UNIT = r"(?!(?:pi|sqrt|times|plus|minus|over|divided|multiplied|mod|and|or|to|choose)\b)[^\W\d_]{2,}"
_TAIL = rf"(?:\s*(?P<percent>{_PERCENT})|\s*(?P<magnitude>{'|'.join(_MAGNITUDES)})\b)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+−]?)\s*{_CURRENCY}\s*(?P<sign2>[-−]?)(?:(?P<whole>\d+)\s+(?=\d+\s*[/⁄]))?"
    rf"(?P<above>{_DIGITS})(?P<below>{_OVER}){_TAIL}(?P<unit>\s*(?:{_UNIT}|[€£¥°]))?",
    re.IGNORECASE,
)
_IN_PROSE = re.compile(rf"(?<![\w.,/])[-−]?{_CURRENCY}{_DIGITS}{_OVER}{_TAIL}", re.IGNORECASE)
_SENTENCE = re.compile(r"[.;!?](?=\s|$)")
_PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!(?:sqrt|frac|sin|cos|tan|log|exp)\b)[^\W\d_]{3,}|\b(?:as|at|by|he|in|is|it|of|on|so|to|we)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Stated:
    """A final answer: its text, and its number where it is one."""

    text: str
    number: Fraction | None = None
    percent: bool = False

    def equals(self, other: Stated) -> bool:
        """Of two numbers, to six decimals. 25% is 0.25, and also 25 where only one of the two says per cent."""
        if self.number is None or other.number is None:
            return self.text.casefold() == other.text.casefold()
        if self.percent == other.percent:
            return round(self.number, 6) == round(other.number, 6)
        share, plain = (self.number, other.number) if self.percent else (other.number, self.number)
        return round(plain, 6) in {round(share, 6), round(share / 100, 6)}

    @property
    def latex(self) -> str:
        if self.number is None:
            return re.sub(r"\\?\$", "", self.text)
        value = self.number / 100 if self.percent else self.number
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    @property
    def is_words(self) -> bool:
        return self.number is None and not _MATHS.search(self.text) and bool(_PROSE.search(self.text))


def final_answer(text: str) -> str:
    """The part of a text that states its answer, still as it was written."""
    text = text[-_LOOKED_AT:].strip()
    stated = [_after(text, match) for match in list(_MARK.finditer(text))[-_MARKS:]]
    if stated:
        return next((part for part in reversed(stated) if _MATHS.search(part)), stated[-1])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _MATHS.search(line)), lines[-1] if lines else "")


def _after(text: str, mark: re.Match[str]) -> str:
    """What a mark announces: the content of a box; else a sentence on its line, or on the next one."""
    rest = text[mark.end() :]
    if mark[0].endswith("{"):
        depth = 1
        for place, sign in enumerate(rest[: LONGEST + 1]):
            depth += (sign == "{") - (sign == "}")
            if not depth:
                return rest[:place]
        return ""
    line = next((line for line in rest.split("\n") if line.strip(" \t*_:$")), "")
    sentences = _SENTENCE.split(_bare(line))
    return next((part for part in sentences if _MATHS.search(part)), sentences[0])


def _bare(text: str) -> str:
    """Without emphasis, without the marks of a formula around it, and without the full stop."""
    text = unicodedata.normalize("NFKC", text).strip("*_`: \t\n")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text.rstrip(".,; ")
        if len(inner) > len(opening + closing) and inner.startswith(opening) and inner.endswith(closing):
            text = inner[len(opening) : -len(closing)].strip()
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 ", text).strip("*_` ").rstrip(".,; ")


def read(stated: str) -> Stated:
    """The number that a final answer is, begins with (before a unit), or contains last (in prose); else its text."""
    text = _bare(stated)
    if "=" in text and not re.search(r"[<>!]=|[,;]\s|\b(?:and|or)\b", text):
        text = text.rpartition("=")[2].strip()
    match = _NUMBER.match(text)
    if match and match["above"] and (match.end() == len(text) or match["unit"]):
        return _number(text, match)
    if _PROSE.search(text) and "\\" not in text:
        found = [m for part in _IN_PROSE.finditer(text) if (m := _NUMBER.match(part[0])) and m["above"]]
        if found:
            return _number(text, found[-1])
    return Stated(text)


def _number(text: str, match: re.Match[str]) -> Stated:
    above, below = re.sub(r"[^\d.e+-]", "", match["above"].lower()), re.sub(r"\D", "", match["below"])
    if below and not int(below):
        return Stated(text)
    value = Fraction(above) / int(below or 1) + int(match["whole"] or 0)
    value *= _MAGNITUDES.get((match["magnitude"] or "").lower(), 1)
    negative = (match["sign"] in {"-", "−"}) != bool(match["sign2"])
    return Stated(text, -value if negative else value, bool(match["percent"]))


class Comparer:
    """Compares final answers; starts the process with math-verify when the first formula comes."""

    def __init__(self) -> None:
        self._formulas = Limited("math", remedy="pip install math-verify")

    def equal(self, answers: Sequence[str], golds: Sequence[str | None]) -> list[float | None]:
        """1 where an answer is equal to the wanted one, None where there is no wanted one. Both are whole texts."""
        known: dict[tuple[str, str], bool] = {}
        marks: list[float | None] = []
        for answer, gold in zip(answers, golds, strict=True):
            if gold is None:
                marks.append(None)
                continue
            pair = final_answer(gold), final_answer(answer)
            if pair not in known:
                known[pair] = self._equal(*pair)
            marks.append(float(known[pair]))
        return marks

    def _equal(self, gold: str, given: str) -> bool:
        if not given or max(len(gold), len(given)) > LONGEST:
            return False
        wanted, found = read(gold), read(given)
        if wanted.equals(found):
            return True
        both = wanted.number is not None and found.number is not None
        return not (both or wanted.is_words or found.is_words) and self._formulas.ask(wanted.latex, found.latex)
