"""Made-up rows for benchmarks: Zipf-like words, exact and near copies, overlaps with a held-out set, damaged texts.

Each row is a function of its number alone, so a file of any length is written in flat memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

SEED = 17
RUN = 13  # words in a row that make an overlap with a held-out row
# Shares of the made-up rows.
EXACT, NEAR, OVERLAP, DAMAGED = 0.05, 0.20, 0.01, 0.02
VOCABULARY = 20_000
HELD_OUT = 200  # rows
LONG = 40  # words of a row whose question has room for an overlap
ACCENTS = str.maketrans("aeiou", "áéíóü")  # every hundredth word has them


class Made(NamedTuple):
    """A row: question and answer, and the number of the row that it is a copy of, if it is one."""

    texts: tuple[str, str]
    origin: int | None

    @property
    def whole(self) -> str:
        return "\n".join(self.texts)


@lru_cache(maxsize=1)
def vocabulary() -> tuple[list[str], list[float]]:
    """Made-up words, short ones first, and the running sum of their weights: Zipf's law, with Mandelbrot's shift."""
    rng = random.Random(SEED)
    found: set[str] = set()
    while len(found) < VOCABULARY:
        syllables = rng.choice((1, 2, 2, 3, 3, 3, 4))
        found.add("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables)))
    words = sorted(found, key=lambda word: (len(word), word))
    words[99::100] = [word.translate(ACCENTS) for word in words[99::100]]
    return words, list(accumulate(1 / (rank + 2.7) for rank in range(VOCABULARY)))


@lru_cache(maxsize=1)
def held_out() -> list[tuple[str, ...]]:
    """The words of the held-out rows."""
    rng = random.Random(SEED + 1)
    return [tuple(_draw(rng, LONG, 60)) for _ in range(HELD_OUT)]


def _draw(rng: random.Random, low: int, high: int) -> list[str]:
    words, weights = vocabulary()
    return rng.choices(words, cum_weights=weights, k=rng.randint(low, high))


class Rows:
    """Made-up rows. Each is a function of its number alone, so a file of any length is written in flat memory.

    Args:
        low, high: words of a row, question and answer together.
    """

    def __init__(self, low: int = 20, high: int = 60) -> None:
        self.low, self.high = low, high
        self.special = EXACT + NEAR + (OVERLAP if high >= LONG else 0)

    def __getitem__(self, number: int) -> Made:
        words, origin = self._words(number)
        return Made(_texts(words), origin)

    def first(self, count: int) -> Iterator[Made]:
        return map(self.__getitem__, range(count))

    def _is_fresh(self, number: int) -> bool:
        return number == 0 or _rng(number).random() >= self.special

    def _words(self, number: int) -> tuple[list[str], int | None]:
        rng = _rng(number)
        kind = rng.random()
        if kind >= self.special or number == 0:
            return _draw(rng, self.low, self.high), None
        if kind >= EXACT + NEAR:
            return self._overlapping(rng), None
        while not self._is_fresh(origin := rng.randrange(number)):
            pass
        words = self._words(origin)[0]
        if kind >= EXACT:
            for place in rng.sample(range(len(words)), rng.choice((1, 2))):
                words[place] = rng.choice(vocabulary()[0])
        return words, origin

    def _overlapping(self, rng: random.Random) -> list[str]:
        """A row whose question holds a run of words of a held-out question."""
        words, item = _draw(rng, LONG, max(LONG, self.high)), rng.choice(held_out())
        length = rng.randint(RUN + 2, RUN + 5)
        start, place = rng.randint(0, _cut(item) - length), rng.randint(0, _cut(words) - length)
        words[place : place + length] = item[start : start + length]
        return words


def _rng(number: int, stream: int = 0) -> random.Random:
    return random.Random((SEED << 48) + (stream << 40) + number)


def _cut(words: Sequence[str]) -> int:
    """Words of the question."""
    return len(words) * 3 // 5


def _texts(words: Sequence[str]) -> tuple[str, str]:
    cut = _cut(words)
    return " ".join(words[:cut]).capitalize() + "?", " ".join(words[cut:]).capitalize() + "."


def _damaged(texts: tuple[str, str], number: int) -> tuple[str, str]:
    """A few rows need cleaning: a control character, an invisible one, wrong line ends, or mojibake."""
    rng = _rng(number, stream=1)
    if rng.random() >= DAMAGED:
        return texts
    question, answer = texts
    damages = (
        lambda: question.replace(" ", " \x07", 1),
        lambda: question.replace(" ", "\u200b ", 1),
        lambda: question + "  \r\n",
        lambda: question.encode().decode("latin-1"),
    )
    return rng.choice(damages)(), answer


def _chat(texts: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), texts, strict=True)]}


def write_file(path: Path, count: int) -> Path:
    """Write chat rows, one at a time."""
    rows = (_chat(_damaged(made.texts, number)) for number, made in enumerate(Rows().first(count)))
    return _write_lines(path, rows)


def write_held_out(path: Path) -> Path:
    return _write_lines(path, (_chat(_texts(words)) for words in held_out()))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
