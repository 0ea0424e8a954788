"""Does a training row overlap with an evaluation item or a benchmark?

Three looks, the surest first; each compares the runs of a row's text with those of an item's:

- `n-gram`: a run of 13 words in common (Brown et al. 2020, appendix C), or a question that is shorter, as a whole.
- `near-duplicate`: like sets of word pairs, for items told in other words.
- `code`: the same for code whose names, numbers and strings are hidden, for functions with renamed variables.

A run that stands in many items (a prompt's template, `for i in range(len(`) says nothing about one of them: such runs
are left out on both sides. Each of the others leads to a few items at most, so similarities are counted, not estimated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.ngrams import Hashes, Offsets, hash_words, ngrams, words
from recipes.errors import DataError
from recipes.lineage import write_atomic

Numbers = NDArray[np.signedinteger[Any]]
NGRAM, NEAR, CODE = KINDS = ("n-gram", "near-duplicate", "code")
COMMON = 10  # a run that stands in more items is boilerplate
WHOLE = 3  # words of an n-gram that are no numbers: everybody counts from 1 to 13
HEAD = 6  # words that a short question needs to match inside a longer text, not only a whole one
SHINGLES = {NEAR: 2, CODE: 6}  # words or tokens of the runs that similarity is counted in
LEAST = 12  # texts with fewer of these runs are alike by chance
CODE_SIMILARITY = 0.35
HALF = 0.5  # of the runs of an item's text, where other items hold those too
SHOWN = 120  # characters of an overlap that are shown
_ROWS = 2048  # rows looked up together

_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CODE_LINE = re.compile(r"(?m)^[ \t]*(?:class|def|for|function|if|import|return|while)\b.*[\w:;{}()\]]$|[;{}][ \t]*$")
# Documentation and `pass` do nothing. Kept words say what a program does, names only what its author calls things.
_TOKEN = re.compile(
    r"""(?P<silent>\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|/\*[\s\S]{0,9999}?\*/|\#[^\n]*|(?m:^[ \t]*//[^\n]*)|\bpass\b)
    |(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(?P<number>\d[\w.]*)
    |(?P<kept>\b(?:and|append|as|assert|async|await|break|case|catch|class|continue|def|del|dict|do|elif|else|except
      |extends|false|finally|for|from|func|function|if|import|in|int|is|join|lambda|len|let|list|max|min|new|none|not
      |null|or|print|public|raise|range|return|set|sorted|split|static|str|struct|sum|switch|this|throw|true|try|var
      |void|while|with|yield)\b)
    |(?P<name>[^\W\d]\w*)|(?P<sign>[-+*/%<>=!&|^]=|&&|\|\||[^\w\s])""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Item:
    """An evaluation item: where it is from, and its texts, the question first and without system messages."""

    source: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """What a text of a row has in common with one of an item: the item's source, one of KINDS, the share of the item's
    runs that the row holds (n-gram) or how alike the two are, and the words in common, cut to SHOWN characters."""

    source: str
    kind: str
    share: float
    shared: str


class _Runs(NamedTuple):
    """Runs of words or tokens of some texts, in order: hashes, and where each stands (text, first word, words)."""

    values: Hashes
    text: Numbers
    start: Numbers
    width: Numbers


class _View(NamedTuple):
    """The items' runs of one kind, sorted. `texts[starts[r]:starts[r + 1]]` hold run r, none where it is boilerplate.
    `sizes` are the other runs of each text, `owner` its item."""

    values: Hashes
    starts: Offsets
    texts: Numbers
    sizes: Numbers
    owner: Numbers

    @classmethod
    def build(cls, values: Hashes, text: Numbers, owner: Numbers) -> _View:
        known, run = np.unique(values, return_inverse=True)
        run, text = _distinct(run, text, len(owner))
        held = np.bincount(_distinct(run, owner[text], len(owner))[0], minlength=len(known))
        run, text = run[held[run] <= COMMON], text[held[run] <= COMMON]
        starts = _ends(np.bincount(run, minlength=len(known)))
        return cls(known, starts, text.astype(np.int32), np.bincount(text, minlength=len(owner)), owner)

    def find(self, values: Hashes) -> Numbers:
        """The number of each run, -1 where no item has it."""
        at = np.minimum(np.searchsorted(self.values, values), len(self.values) - 1)
        return np.where(self.values[at] == values, at, -1) if len(self.values) else at

    def compare(self, kind: str, runs: _Runs, run: Numbers, least: float) -> tuple[Numbers, Numbers, NDArray[Any]]:
        """Texts of rows, texts of items that overlap with them, and shares: of the item's runs (n-gram), or the Jaccard
        similarity. They are at least `least`, save where a row holds an n-gram that no other item has."""
        text, held = _distinct(runs.text[run >= 0], run[run >= 0], len(self.values))
        which, place = _spread(self.starts[held], self.starts[held + 1])
        pairs = text[which] * len(self.owner) + self.texts[place]
        pairs, at, shared = np.unique(pairs, return_inverse=True, return_counts=True)
        text, other = np.divmod(pairs, max(len(self.owner), 1))
        share = shared / self.sizes[other]
        if kind == NGRAM:
            first, last = self.texts[self.starts[held[which]]], self.texts[self.starts[held[which] + 1] - 1]
            is_own = self.owner[first] == self.owner[last]  # the run is in texts of one item alone
            good = (share >= least) | (np.bincount(at[is_own], minlength=len(pairs)) > 0)
            return text[good], other[good], share[good]
        good = (share >= least) & (self.sizes[other] >= LEAST)  # similarity is never above this share
        text, other, shared = text[good], other[good], shared[good]
        size = np.zeros(len(text), dtype=np.int64)
        for number in np.unique(text):
            mine = slice(*np.searchsorted(runs.text, [number, number + 1]))
            known = np.unique(run[mine][run[mine] >= 0])
            common = (self.starts[known] == self.starts[known + 1]).sum()
            size[slice(*np.searchsorted(text, [number, number + 1]))] = len(np.unique(runs.values[mine])) - common
        share = shared / (size + self.sizes[other] - shared)
        good = (share >= least) & (size >= LEAST)
        return text[good], other[good], share[good]


@dataclass(frozen=True)
class Index:
    """Evaluation items, ready to be looked up: their sources (of items with equal texts the first), a hash over them
    and all that decides what matches, the first HEAD words and the lengths of questions of fewer than n words, and all
    runs by kind."""

    n: int
    similarity: float | None
    sources: tuple[str, ...]
    fingerprint: str
    heads: Hashes
    lengths: Numbers
    views: dict[str, _View]

    @classmethod
    def build(cls, items: Iterable[Item], n: int = 13, similarity: float | None = 0.4) -> Index:
        """Index items; `n` words in a row are an overlap, texts from `similarity` (Jaccard, of word pairs) on alike.
        None: n-grams alone are looked at, neither likeness nor code.
        """
        kept = list({item.texts: item for item in reversed(list(items)) if item.texts}.values())[::-1]
        # A row may hold an item's texts in one, so their sum is a text as well.
        texts, owner = _flat([(*i.texts, "\n".join(i.texts)) if len(i.texts) > 1 else i.texts for i in kept])
        hashes, offsets = hash_words(texts)
        counts = np.diff(offsets)
        # Only questions may be short: an answer of a few words stands in many an innocent row.
        short = (np.diff(owner, prepend=-1) > 0) & (counts < n)
        chosen = {NGRAM: (counts >= n) | short, NEAR: counts >= n, CODE: counts > 0}
        spoken = _ends(np.array([not word.isdigit() for text in texts for word in words(text)], dtype=np.int64))
        views = {}
        for kind, runs in _looks(texts, hashes, offsets, n):
            mine = chosen[kind][runs.text]
            if kind == NGRAM:
                first = offsets[runs.text] + runs.start
                mine &= spoken[first + runs.width] - spoken[first] >= WHOLE
            views[kind] = _View.build(runs.values[mine], runs.text[mine], owner)
        begin, ends = ngrams(hashes, offsets, HEAD)
        headed = short & (counts >= HEAD)
        heads, lengths = np.unique([begin[ends[:-1]][headed], counts[headed].astype(np.uint64)], axis=1)
        decides = [n, similarity, COMMON, WHOLE, HEAD, SHINGLES, LEAST, CODE_SIMILARITY, HALF]
        fingerprint = hashlib.sha256(json.dumps([decides, [[i.source, i.texts] for i in kept]]).encode()).hexdigest()
        sources = tuple(item.source for item in kept)
        return cls(n, similarity, sources, fingerprint, heads, lengths.astype(np.int64), views)

    @property
    def ignored(self) -> dict[str, int]:
        """Runs that stand in more than COMMON items and are left out, by kind."""
        return {kind: int((np.diff(view.starts) == 0).sum()) for kind, view in self.views.items()}

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Sources of items that nothing can match: too short, or boilerplate through and through."""
        held = np.concatenate([view.owner[view.texts] for view in self.views.values()])
        return tuple(self.sources[item] for item in np.setdiff1d(np.arange(len(self.sources)), held))

    def save(self, folder: Path) -> None:
        """Write the index; equal items give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{kind}-{name}": part for kind, view in self.views.items() for name, part in view._asdict().items()}
        for name, array in {"heads": self.heads, "lengths": self.lengths, **arrays}.items():
            np.save(folder / f"{name}.npy", array)
        content = {name: getattr(self, name) for name in ("n", "similarity", "sources", "fingerprint")}
        write_atomic(folder / "index.json", json.dumps(content) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Index:
        """The index of a folder, its arrays memory-mapped.

        Raises:
            DataError: there is none, or it is broken.
        """

        def array(name: str) -> NDArray[Any]:
            return np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)

        try:
            content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            content["sources"] = tuple(content["sources"])
            views = {kind: _View(*(array(f"{kind}-{name}") for name in _View._fields)) for kind in KINDS}
            return cls(**content, heads=array("heads"), lengths=array("lengths"), views=views)
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"holds no index of evaluation items ({error})", str(folder), "prepare it again") from None

    def overlaps(self, rows: Sequence[Sequence[str]]) -> list[Overlap | None]:
        """The overlap of each row (its texts), None where there is none; the surest kind, then the closest item."""
        if len(rows) > _ROWS:
            parts = (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
            return [overlap for part in parts for overlap in self.overlaps(part)]
        found: list[Overlap | None] = [None] * len(rows)
        texts, row_of = _flat(rows)
        hashes, offsets = hash_words(texts)
        least = {NGRAM: HALF}
        if self.similarity is not None:
            least |= {NEAR: self.similarity, CODE: CODE_SIMILARITY}
        short = [(NGRAM, self._short(hashes, offsets))] if len(self.heads) else []
        for kind, runs in chain(short, _looks(texts, hashes, offsets, self.n, tuple(least))):
            view = self.views[kind]
            run = view.find(runs.values)
            text, other, share = view.compare(kind, runs, run, least[kind])
            order = np.lexsort((other, -share, row_of[text]))
            for best in order[np.diff(row_of[text[order]], prepend=-1) > 0]:
                row = int(row_of[text[best]])
                if found[row] is None:
                    mine = np.arange(*np.searchsorted(runs.text, [text[best], text[best] + 1]))
                    mine = mine[run[mine] >= 0]
                    which, place = _spread(view.starts[run[mine]], view.starts[run[mine] + 1])
                    shown = _shown(texts[text[best]], kind, runs, mine[which[view.texts[place] == other[best]]])
                    found[row] = Overlap(self.sources[view.owner[other[best]]], kind, float(share[best]), shown)
        return found

    def _short(self, hashes: Hashes, offsets: Offsets) -> _Runs:
        """The runs that may be a short question: they begin as one does, and have its number of words."""
        begin = _runs(hashes, offsets, HEAD)
        at, short = _spread(*(np.searchsorted(self.heads, begin.values, side) for side in ("left", "right")))
        inside = begin.start[at] + self.lengths[short] <= np.diff(offsets)[begin.text[at]]
        text, start, width = begin.text[at][inside], begin.start[at][inside], self.lengths[short][inside]
        _, place = _spread(offsets[text] + start, offsets[text] + start + width)
        return _Runs(ngrams(hashes[place], _ends(width), self.n)[0], text, start, width)


def _looks(
    texts: Sequence[str], hashes: Hashes, offsets: Offsets, n: int, kinds: Sequence[str] = KINDS
) -> Iterator[tuple[str, _Runs]]:
    """The runs of texts, kind by kind, the surest first."""
    yield NGRAM, _runs(hashes, offsets, n)
    if NEAR in kinds:
        yield NEAR, _runs(hashes, offsets, SHINGLES[NEAR])
    if CODE in kinds:
        yield CODE, _code_runs(texts)


def _runs(hashes: Hashes, offsets: Offsets, n: int) -> _Runs:
    values, ends = ngrams(hashes, offsets, n)
    text = np.repeat(np.arange(len(offsets) - 1), np.diff(ends))
    return _Runs(values, text, np.arange(len(values)) - ends[text], np.minimum(np.diff(offsets), n)[text])


def _code_runs(texts: Sequence[str]) -> _Runs:
    """Runs of tokens of the texts that are code, at least in parts."""
    kinds = [[kind for _, kind in _tokens(text)] for text in texts]
    code = np.flatnonzero([len(found) >= SHINGLES[CODE] for found in kinds])
    coded = (kind.encode("utf-8", "surrogatepass") for number in code for kind in kinds[number])
    hashes = np.array([xxhash.xxh3_64_intdigest(kind) for kind in coded], dtype=np.uint64)
    runs = _runs(hashes, _ends(np.array([len(kinds[number]) for number in code], dtype=np.int64)), SHINGLES[CODE])
    return runs._replace(text=code[runs.text])


def _tokens(text: str) -> list[tuple[str, str]]:
    """Tokens of a text's code, each as written and as its kind; none where nothing looks like code."""
    if "(" not in text:
        return []
    code = "\n".join(_FENCED.findall(text)) or (text if _CODE_LINE.search(text) else "")
    found = ((match[0], str(match.lastgroup)) for match in _TOKEN.finditer(code) if match.lastgroup != "silent")
    return [(token, token.casefold() if group in {"kept", "sign"} else group) for token, group in found]


def _flat(groups: Sequence[Sequence[str]]) -> tuple[list[str], Numbers]:
    """All texts, and the number of the group that each is from."""
    owner = np.repeat(np.arange(len(groups)), np.array([len(texts) for texts in groups], dtype=np.int64))
    return [text for texts in groups for text in texts], owner


def _ends(counts: Numbers) -> Numbers:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _spread(starts: Numbers, ends: Numbers) -> tuple[Numbers, Numbers]:
    """All numbers of the ranges [start, end), after the range that each is from."""
    which = np.repeat(np.arange(len(starts)), ends - starts)
    return which, np.arange(len(which)) + (starts - _ends(ends - starts)[:-1])[which]


def _distinct(one: Numbers, other: Numbers, others: int) -> tuple[Numbers, Numbers]:
    """Distinct pairs, sorted; `other` is smaller than `others`."""
    pairs = np.sort(one * others + other)
    return np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], max(others, 1))


def _shown(text: str, kind: str, runs: _Runs, which: Numbers) -> str:
    """The words of some runs of a text, stretch by stretch."""
    pieces = [token for token, _ in _tokens(text)] if kind == CODE else words(text)
    held = np.zeros(len(pieces) + 1, dtype=np.int8)
    for start, width in zip(runs.start[which], runs.width[which], strict=True):
        held[start : start + width] = 1
    edges = np.flatnonzero(np.diff(held, prepend=0)).reshape(-1, 2).tolist()
    shown = " … ".join(" ".join(pieces[start:end]) for start, end in edges)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"
