"""Near-duplicates by MinHash: sketches of many texts, and the clusters of rows whose sketches agree.

Texts are sets of word n-grams. rensa makes the signatures (R-MinHash); which pairs are looked at is decided by
locality-sensitive hashing in bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4), and every candidate
pair is verified by its estimated Jaccard similarity, so bands can be many and missed pairs few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import rensa
from numpy.typing import NDArray

from data_prep.ngrams import Hashes, hash_words, mix, ngrams

PERMUTATIONS = 128  # the estimate's standard error is at most 0.044
SEED = 42
ALGORITHM = int(rensa.RMinHash.ALGORITHM_VERSION)
_MISSED = 0.01  # wanted probability that a pair right at the threshold shares no band
_ROUNDS = 32  # heads that the rows of one bucket are compared with


@dataclass(frozen=True)
class Sketch:
    """Sketches of some rows.

    Attributes:
        signatures: uint32 (rows, PERMUTATIONS).
        bands: uint64 (bands, rows); rows that share a number in one band are candidates.
    """

    signatures: NDArray[np.uint32]
    bands: Hashes


def band_rows(threshold: float) -> int:
    """Signature numbers per band: as many as keep the chance to miss a pair at the threshold under 1 %."""
    best = 1
    for rows in range(1, PERMUTATIONS + 1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= _MISSED:
            best = rows
    return best


def sketch(texts: Sequence[str], n: int, threshold: float) -> Sketch:
    """Sketch texts by their runs of `n` words (shorter texts by all their words)."""
    rows = band_rows(threshold)
    count = PERMUTATIONS // rows
    if not texts:
        return Sketch(np.zeros((0, PERMUTATIONS), np.uint32), np.zeros((count, 0), np.uint64))
    grams, offsets = ngrams(*hash_words(texts), n)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets.astype(np.uint64), PERMUTATIONS, SEED)
    signatures = np.array(matrix.to_rows(), dtype=np.uint32)
    return Sketch(signatures, np.stack([_band(signatures[:, i * rows : (i + 1) * rows]) for i in range(count)]))


def _band(part: NDArray[np.uint32]) -> Hashes:
    value = np.zeros(len(part), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in part.T:
            value = mix(value + column.astype(np.uint64) + np.uint64(1))
    return value


def similarity(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Estimated Jaccard similarity of rows of signatures, pair by pair."""
    return (one == other).mean(axis=1, dtype=np.float32)


class Forest:
    """Disjoint sets whose head is always their smallest member (union-find)."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size, dtype=np.int64)

    def join(self, pairs: NDArray[np.int64]) -> None:
        """Put the two rows of each pair (shape (k, 2)) into one set."""
        parent = self.parent
        for one, other in pairs.tolist():
            a, b = self._head(one), self._head(other)
            if a != b:
                parent[max(a, b)] = min(a, b)

    def _head(self, row: int) -> int:
        parent = self.parent
        while (above := int(parent[row])) != row:
            parent[row] = parent[above]
            row = int(parent[row])
        return row

    def heads(self) -> NDArray[np.int64]:
        """The head of every row; also flattens the trees."""
        while True:
            above = self.parent[self.parent]
            if np.array_equal(above, self.parent):
                return above
            self.parent = above


def join_similar(
    forest: Forest, parts: Sequence[Sketch], alive: NDArray[np.bool_], threshold: float, exact: Hashes | None = None
) -> None:
    """Join all rows of `forest` that are alive and at least as similar as `threshold`, directly or in a chain.

    Args:
        parts: sketches of consecutive rows; memory-mapped arrays will do, one band at a time is read whole.
        exact: a number per row; rows with an equal one are joined without a look at their sketches.
    """
    rows = np.flatnonzero(alive)
    if not len(rows):
        return
    signatures = _Signatures(parts)
    if exact is not None:
        _join_bucket(forest, rows, exact[rows], None, threshold)
    for band in range(len(parts[0].bands)):
        keys = np.concatenate([part.bands[band] for part in parts])
        _join_bucket(forest, rows, keys[rows], signatures, threshold)


def _join_bucket(
    forest: Forest, rows: NDArray[np.int64], keys: Hashes, signatures: _Signatures | None, threshold: float
) -> None:
    """Join rows of equal key. In each round the rows of a bucket are compared with its first row; those that are
    unlike it stay for the next round, where the first of them leads."""
    for _ in range(_ROUNDS):
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        first = np.ones(len(rows), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        if first.all():
            return
        leaders = np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
        follower = np.flatnonzero(~first)
        pairs = np.stack([rows[leaders[follower]], rows[follower]], axis=1)
        heads = forest.heads()
        open_ = heads[pairs[:, 0]] != heads[pairs[:, 1]]
        alike = ~open_
        if signatures is None:
            alike[:] = True
        elif open_.any():
            alike[open_] = signatures.similarity(pairs[open_]) >= threshold
        forest.join(pairs[alike & open_])
        rows, keys = rows[follower[~alike]], keys[follower[~alike]]
        if not len(rows):
            return


class _Signatures:
    """Signatures of consecutive parts, looked up by the row's number over all of them."""

    def __init__(self, parts: Sequence[Sketch]) -> None:
        self.parts = [part.signatures for part in parts]
        self.ends = np.cumsum([len(part) for part in self.parts])

    def similarity(self, pairs: NDArray[np.int64], step: int = 65536) -> NDArray[np.float32]:
        """Estimated similarity of pairs of rows, in slices so that memory stays flat."""
        slices = (pairs[i : i + step] for i in range(0, len(pairs), step))
        found = [similarity(self._get(part[:, 0]), self._get(part[:, 1])) for part in slices]
        return np.concatenate(found)

    def _get(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        where = np.searchsorted(self.ends, rows, side="right")
        found = np.empty((len(rows), PERMUTATIONS), dtype=np.uint32)
        for number in np.unique(where):
            mine = where == number
            start = self.ends[number] - len(self.parts[number])
            found[mine] = self.parts[number][rows[mine] - start]
        return found
