"""Word n-grams of texts as 64-bit hashes, many texts at once: the common ground of near-dedup and decontamination."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

# Scripts without spaces between words: every character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_VOCABULARY = 1_000_000  # hashed words remembered per process, so that memory stays flat


class _WordHashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if len(self) >= _VOCABULARY:
            self.clear()
        self[word] = value = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return value


_HASHES = _WordHashes()


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; each character of a script that writes no spaces. A text of
    punctuation alone is one word."""
    if text.isascii():  # the same words, found three times as fast
        return text.translate(_ASCII).split() or [text.strip()]
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold()) or [text.strip()]


def hash_words(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    """Word hashes of all texts in one array; text i holds `hashes[offsets[i]:offsets[i + 1]]`."""
    flat: list[int] = []
    ends = [0]
    for text in texts:
        flat.extend(map(_HASHES.__getitem__, words(text)))
        ends.append(len(flat))
    return np.array(flat, dtype=np.uint64), np.array(ends, dtype=np.int64)


def ngrams(hashes: Hashes, offsets: Offsets, n: int) -> tuple[Hashes, Offsets]:
    """Hashes of every run of `n` words; a text of fewer words is one run.

    Args:
        hashes, offsets: as `hash_words` gives them.

    Returns:
        Hashes and offsets of the runs, in the order of the text; every text has at least one.
    """
    counts = np.diff(offsets)
    grams = np.maximum(counts - n + 1, 1)
    ends = np.concatenate([[0], np.cumsum(grams)])
    # Where each run starts: its text's first word, plus its number within the text.
    starts = np.repeat(offsets[:-1] - ends[:-1], grams) + np.arange(ends[-1])
    width = np.repeat(np.minimum(counts, n), grams)
    padded = np.concatenate([hashes, np.zeros(n, dtype=np.uint64)])
    value = np.zeros(len(starts), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for position in range(n):
            value = value * _PRIME + np.where(position < width, padded[starts + position], np.uint64(0))
    return mix(value), ends


def mix(value: Hashes) -> Hashes:
    """Spread the bits of 64-bit numbers (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
