"""What becomes of every row once all are known: duplicates, the split, leakage and the mixture.

Only numbers are held here, a few bytes a row; sketches are memory-mapped. The rows themselves stay in their blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_prep.near_dup import Forest, join_similar
from data_prep.ngrams import mix
from data_prep.read_pass import NEVER, Block, Comparison, comparisons
from recipes.errors import DataError
from recipes.lineage import sha256_json
from recipes.schema import Recipe
from recipes.schema_data import Holdout

TRAIN, EVAL, BY_ROW_STEP = 0, 1, 2  # codes of rows; higher ones stand for the reasons below
REASONS = ("exact_duplicate", "near_duplicate", "semantic_duplicate", "in_eval", "mixture")
_CODE = {reason: BY_ROW_STEP + 1 + n for n, reason in enumerate(REASONS)}
_DUPLICATE = {
    "exact_dedup": _CODE["exact_duplicate"],
    "near_dedup": _CODE["near_duplicate"],
    "semantic_dedup": _CODE["semantic_duplicate"],
}
SHOWN_CLUSTERS = 20
SHARED = ("", "nearly the same", "the same group", "the same prompt", "the same")
COMMON_ROWS, COMMON_SHARE = 20, 0.05  # a paragraph or prompt in more rows than these is an instruction


@dataclass(frozen=True)
class Decision:
    """What becomes of the rows of one block.

    Attributes:
        codes: int16 (rows,): TRAIN, EVAL, BY_ROW_STEP, or the reason for which the row is dropped.
        details: for dropped rows, by their number in the block, the particulars.
    """

    codes: NDArray[np.int16]
    details: dict[int, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return sha256_json([self.codes.tolist(), sorted(self.details.items())])


@dataclass
class Decided:
    """All decisions, in the order of the blocks.

    Attributes:
        clusters: the largest clusters of duplicates: (reason, size, the places of their first rows).
        groups: rows and groups of the split, and the share of the largest group; empty without a split.
    """

    decisions: list[Decision]
    clusters: list[dict[str, object]]
    groups: dict[str, float]


def reason_of(code: int) -> str:
    return REASONS[code - BY_ROW_STEP - 1]


class _Side:
    """The rows of the training or of the held-out sources, in order."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        keys = [block.keys() for block in blocks]
        self.keys = np.concatenate(keys) if keys else np.zeros(0, dtype=[("dropped_at", "<i2")])
        self.sizes = [len(part) for part in keys]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.code = np.zeros(len(self.keys), dtype=np.int16)
        self.like = np.full(len(self.keys), -1, dtype=np.int64)  # the row that is kept instead
        self.shared = np.zeros(len(self.keys), dtype=np.int8)  # what a row has in common with held-out ones, of SHARED
        self.clusters: list[tuple[str, NDArray[np.int64]]] = []

    def alive(self, position: int) -> NDArray[np.bool_]:
        """Rows that have come through all steps before `position`."""
        return (self.code == TRAIN) & (self.keys["dropped_at"] >= position)

    def compare(self, comparison: Comparison) -> None:
        """Drop all but the first of the rows that a comparing step calls equal."""
        alive = self.alive(comparison.position)
        heads = _clusters(self.blocks, comparison, alive)
        copies = alive & (heads != np.arange(len(heads)))
        self.code[copies] = _DUPLICATE[comparison.kind]
        self.like[copies] = heads[copies]
        self._note_clusters(comparison.kind, heads[copies])

    def _note_clusters(self, kind: str, heads: NDArray[np.int64]) -> None:
        found, counts = np.unique(heads, return_counts=True)
        largest = np.argsort(-counts, kind="stable")[:SHOWN_CLUSTERS]
        for head in found[largest]:
            members = np.flatnonzero((self.like == head) & (self.code == _DUPLICATE[kind]))
            self.clusters.append((reason_of(_DUPLICATE[kind]), np.concatenate([[head], members])))

    def places(self, rows: NDArray[np.int64]) -> dict[int, str]:
        """Where rows were read, by their number. Reads one column of the blocks that hold them."""
        import pyarrow.parquet as pq

        wanted = np.unique(rows)
        owners = np.searchsorted(self.starts, wanted, side="right") - 1
        found: dict[int, str] = {}
        for owner in np.unique(owners):
            sources = pq.read_table(self.blocks[owner].folder / "rows.parquet", columns=["_source"])["_source"]
            for row in wanted[owners == owner].tolist():
                found[row] = sources[row - int(self.starts[owner])].as_py()
        return found

    def decisions(self) -> list[Decision]:
        at = self.places(self.like[self.like >= 0])
        made = []
        for number, size in enumerate(self.sizes):
            start = int(self.starts[number])
            part = slice(start, start + size)
            like = self.like[part]
            details = {int(i): f"of {at[int(like[i])]}" for i in np.flatnonzero(like >= 0)}
            shared = self.shared[part]
            details |= {int(i): f"{SHARED[shared[i]]} as a held-out row" for i in np.flatnonzero(shared)}
            codes = self.code[part].copy()
            codes[(codes == TRAIN) & (self.keys["dropped_at"][part] != NEVER)] = BY_ROW_STEP
            made.append(Decision(codes, details))
        return made

    def shown_clusters(self) -> list[dict[str, object]]:
        largest = sorted(self.clusters, key=lambda c: -len(c[1]))[:SHOWN_CLUSTERS]
        at = self.places(np.concatenate([rows[:6] for _, rows in largest])) if largest else {}
        return [
            {"reason": reason, "size": len(rows), "places": [at[int(row)] for row in rows[:6]]}
            for reason, rows in largest
        ]


def decide(recipe: Recipe, train: Sequence[Block], held_out: Sequence[Block], sources: Sequence[int]) -> Decided:
    """Decide on every row.

    Args:
        train, held_out: blocks of the training and of the held-out sources.
        sources: for each training block the number of its source.

    Raises:
        DataError: too few rows to hold any out.
    """
    sides = _Side(train), _Side(held_out)
    last = len(recipe.data.steps)
    for side, role in zip(sides, ("train", "eval"), strict=True):
        for comparison in comparisons(recipe, role):  # type: ignore[arg-type]
            if comparison.position < last:
                side.compare(comparison)
    learned, held = sides
    groups: dict[str, float] = {}
    if isinstance(recipe.data.eval, Holdout):
        groups = _hold_out(recipe, learned)
    elif len(held.keys):
        _keep_apart(recipe, learned, held)
    _mixture(recipe, learned, sources)
    decisions = [*learned.decisions(), *held.decisions()]
    clusters = [*learned.shown_clusters(), *held.shown_clusters()]
    return Decided(decisions, clusters[:SHOWN_CLUSTERS], groups)


def _clusters(blocks: Sequence[Block], comparison: Comparison, alive: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For every row the first row of its cluster; rows that are not alive stand alone."""
    forest = Forest(len(alive))
    if comparison.kind == "exact_dedup":
        keys = np.concatenate([block.exact(comparison) for block in blocks if block.rows] or [np.zeros(0, np.uint64)])
        _join_equal(forest, keys, alive)
    elif comparison.kind == "near_dedup":
        join_similar(forest, [b.sketch(comparison) for b in blocks if b.rows], alive, comparison.options.threshold)
    else:
        from data_prep.embed import join_close

        vectors = [block.embeddings(comparison) for block in blocks if block.rows]
        join_close(forest, vectors, alive, comparison.options.threshold)
    return forest.heads()


def _join_equal(forest: Forest, keys: NDArray[np.uint64], alive: NDArray[np.bool_]) -> None:
    rows = np.flatnonzero(alive)
    if len(rows):
        _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
        pairs = np.stack([rows[first[inverse]], rows], axis=1)
        forest.join(pairs[pairs[:, 0] != pairs[:, 1]])


def _join_by_paragraph(forest: Forest, side: _Side, alive: NDArray[np.bool_]) -> None:
    """Join rows whose prompts share a long paragraph: they are about the same passage. One that stands in many rows is
    an instruction, and joins nothing."""
    found = [block.paragraphs() for block in side.blocks]
    rows = np.concatenate([part["row"] + start for part, start in zip(found, side.starts.tolist(), strict=False)])
    hashes = np.concatenate([part["hash"] for part in found])
    mine = alive[rows]
    pairs = np.unique(np.stack([hashes[mine], rows[mine].astype(np.uint64)], axis=1), axis=0)
    if not len(pairs):
        return
    _, first, inverse, counts = np.unique(pairs[:, 0], return_index=True, return_inverse=True, return_counts=True)
    members = pairs[:, 1].astype(np.int64)
    joins = np.stack([members[first[inverse]], members], axis=1)
    usual = counts[inverse] > max(COMMON_ROWS, COMMON_SHARE * alive.sum())
    forest.join(joins[~usual & (joins[:, 0] != joins[:, 1])])


def _hold_out(recipe: Recipe, side: _Side) -> dict[str, float]:
    """Put whole groups aside for evaluation, in an order that depends on the seed and the groups alone, until the
    fraction is reached. A group that would overshoot is passed over."""
    assert isinstance(recipe.data.eval, Holdout)
    alive = side.alive(NEVER)
    forest = Forest(len(alive))
    for name in ("id", "prompt"):
        _join_equal(forest, side.keys[name], alive)
    _join_equal(forest, side.keys["group"], alive & (side.keys["group"] != 0))
    _join_by_paragraph(forest, side, alive)
    if recipe.data.eval.near is not None:
        split = comparisons(recipe, "train")[-1]
        sketches = [block.sketch(split) for block in side.blocks if block.rows]
        join_similar(forest, sketches, alive, recipe.data.eval.near)
    rows = np.flatnonzero(alive)
    heads, group, sizes = np.unique(forest.heads()[rows], return_inverse=True, return_counts=True)
    names = np.full(len(heads), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(names, group, side.keys["id"][rows])
    order = np.argsort(mix(names ^ mix(np.array([recipe.seed], np.uint64))), kind="stable")
    room = max(1.0, recipe.data.eval.fraction * len(rows))
    chosen = np.zeros(len(heads), dtype=bool)
    for number in order.tolist():
        if sizes[number] <= room:
            chosen[number] = True
            room -= sizes[number]
    if not chosen.any() and len(heads) > 1:
        chosen[order[np.argmin(sizes[order])]] = True
    if not chosen.any() or chosen.all():
        largest = f"{sizes.max() if len(sizes) else 0} of {len(rows)} rows are one group"
        remedy = "give more rows, set data.eval.near: null, or data.eval: null"
        raise DataError(f"too few rows or groups to hold any out ({largest})", "data.eval", remedy)
    side.code[rows[chosen[group]]] = EVAL
    return {"rows": len(rows), "groups": len(heads), "largest_share": round(float(sizes.max()) / len(rows), 4)}


def _keep_apart(recipe: Recipe, learned: _Side, held: _Side) -> None:
    """Drop training rows that have their content, prompt or group in common with a row of a held-out source, or that
    near_dedup calls equal to one. A prompt that stands in many training rows is an instruction, and tells nothing."""
    alive, kept = learned.alive(NEVER), held.alive(NEVER)
    found = np.zeros(len(alive), dtype=np.int8)
    for step in comparisons(recipe, "train"):
        if step.kind == "near_dedup" and alive.any() and kept.any():
            forest = Forest(len(alive) + len(kept))
            sketches = [block.sketch(step) for block in (*learned.blocks, *held.blocks) if block.rows]
            join_similar(forest, sketches, np.concatenate([alive, kept]), step.options.threshold)
            heads = forest.heads()
            found[np.isin(heads[: len(alive)], heads[len(alive) :][kept])] = SHARED.index("nearly the same")
    for name, said in (("group", "the same group"), ("prompt", "the same prompt"), ("id", "the same")):
        theirs = np.unique(held.keys[name][kept])
        if name == "group":
            theirs = theirs[theirs != 0]
        if name == "prompt":
            values, counts = np.unique(learned.keys[name][alive], return_counts=True)
            theirs = np.setdiff1d(theirs, values[counts > max(COMMON_ROWS, COMMON_SHARE * alive.sum())])
        found[np.isin(learned.keys[name], theirs)] = SHARED.index(said)  # the surest is said last
    learned.shared[alive] = found[alive]
    learned.code[learned.shared > 0] = _CODE["in_eval"]


def _mixture(recipe: Recipe, side: _Side, sources: Sequence[int]) -> None:
    """Thin sources out until their rows stand in the proportion of the weights. Which rows go depends on content."""
    weights = [source.weight for source in recipe.data.train]
    if weights[0] is None:
        return
    source = np.repeat(np.array(sources, dtype=np.int64), side.sizes[: len(sources)])
    alive = side.alive(NEVER)
    counts = Counter(source[alive].tolist())
    scale = min(counts[n] / w for n, w in enumerate(weights) if w is not None)
    for number, weight in enumerate(weights):
        assert weight is not None
        rows = np.flatnonzero(alive & (source == number))
        keep = min(len(rows), math.floor(scale * weight + 0.5))
        seed = mix(np.array([recipe.seed], np.uint64) + np.uint64(1))
        order = np.argsort(mix(side.keys["id"][rows] ^ seed), kind="stable")
        side.code[rows[order[keep:]]] = _CODE["mixture"]
