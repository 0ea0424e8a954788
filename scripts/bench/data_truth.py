"""How true preparation's judgements are, on public data that people labelled, beside datasketch.

    python -m scripts.bench.data_truth [FOLDER]

- MRPC: pairs of sentences that people called the same or not. A pair is flagged where both are in one cluster.
- GPTeacher: the rows that its authors kept at two thresholds of their own; how many of our verdicts are theirs.
- presidio-research: synthetic texts with every kind of personal data marked, also the kinds that no rule looks for.

FOLDER holds the files (default: RETORT_REALDATA). datasketch comes with the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.schema_data import NearDedup
from scripts.bench.data_prep import runs, show

Heads = NDArray[np.int64]
Side = Callable[[Sequence[str]], Heads]
DEFAULT = NearDedup()
PII_NAMES = {"EMAIL_ADDRESS": "EMAIL", "PHONE_NUMBER": "PHONE", "IBAN_CODE": "IBAN", "DOMAIN_NAME": "URL"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def retort(words: int, threshold: float) -> Side:
    """The first row of each row's cluster, by Retort."""

    def heads(texts: Sequence[str]) -> Heads:
        from data_prep.near_dup import Forest, join_similar, sketch

        forest = Forest(len(texts))
        join_similar(forest, [sketch(texts, words, threshold)], np.ones(len(texts), bool), threshold)
        return forest.heads()

    return heads


def datasketch(words: int, threshold: float, permutations: int, verified: bool) -> Side:
    """As `retort`, by datasketch with its own hash (SHA-1); `verified`: candidates are compared, not believed."""

    def heads(texts: Sequence[str]) -> Heads:
        from datasketch import MinHash, MinHashLSH

        from data_prep.near_dup import Forest

        grams = ([gram.encode() for gram in runs(text, words)] for text in texts)
        sketches = MinHash.bulk(grams, num_perm=permutations)
        lsh, forest = MinHashLSH(threshold=threshold, num_perm=permutations), Forest(len(texts))
        for number, made in enumerate(sketches):
            like = [o for o in lsh.query(made) if not verified or sketches[o].jaccard(made) >= threshold]
            forest.join(np.array([(other, number) for other in like], dtype=np.int64).reshape(-1, 2))
            lsh.insert(number, made)
        return forest.heads()

    return heads


SIDES: dict[str, Side] = {
    f"Retort, {DEFAULT.words} words, {DEFAULT.threshold} (its default)": retort(DEFAULT.words, DEFAULT.threshold),
    "Retort, 3 words, 0.7": retort(3, 0.7),
    "Retort, 3 words, 0.5": retort(3, 0.5),
    "Retort, 2 words, 0.7": retort(2, 0.7),
    "Retort, 1 word, 0.7": retort(1, 0.7),
    "datasketch, 3 words, 0.9 (its default), 128": datasketch(3, 0.9, 128, False),
    "datasketch, 3 words, 0.7, 128": datasketch(3, 0.7, 128, False),
    "datasketch, 3 words, 0.7, 128, candidates verified": datasketch(3, 0.7, 128, True),
    "datasketch, 3 words, 0.5, 128, candidates verified": datasketch(3, 0.5, 128, True),
    "text-dedup's defaults in datasketch: 5 words, 0.7, 256": datasketch(5, 0.7, 256, False),
}


def pairs(folder: Path) -> None:
    """MRPC."""
    rows = read(folder / "mrpc_train.jsonl")
    same = np.array([row["label"] == 1 for row in rows])
    texts = [row["s1"] for row in rows] + [row["s2"] for row in rows]
    lines = []
    for name, side in SIDES.items():
        heads = side(texts)
        flagged = heads[: len(rows)] == heads[len(rows) :]
        precision = f"{flagged[same].sum() / flagged.sum():.3f}" if flagged.any() else "-"
        lines.append([name, int(flagged.sum()), precision, f"{flagged[same].mean():.3f}"])
    title = f"MRPC: {len(rows):,} pairs, {same.mean():.0%} of them the same by people's judgement"
    show(title, ["side", "flagged", "precision", "recall"], lines)


def kept(folder: Path) -> None:
    """GPTeacher."""

    def rows(name: str) -> list[tuple[str, str, str]]:
        return [
            (r["instruction"], r["input"], r["response"]) for r in read(folder / f"gpteacher_toolformer_{name}.jsonl")
        ]

    everything = rows("all")
    theirs = {
        name: np.array([row not in keeps for row in everything])
        for name, keeps in (("0.9", set(rows("0.9"))), ("0.7", set(rows("0.7"))))
    }
    lines = []
    for on, texts in (("answers", [row[2] for row in everything]), ("rows", ["\n".join(row) for row in everything])):
        for name, side in SIDES.items():
            heads = side(texts)
            ours = heads != np.arange(len(heads))
            lines.append(
                [f"{name}; {on}", int(ours.sum()), *(f"{(ours == found).mean():.3f}" for found in theirs.values())]
            )
    dropped = ", ".join(f"{int(found.sum()):,} at {name}" for name, found in theirs.items())
    title = f"GPTeacher: {len(everything):,} rows, of which its authors dropped {dropped}"
    show(title, ["side", "dropped", "agree at 0.9", "agree at 0.7"], lines)


def personal(path: Path) -> None:
    """Personal data, every kind that is marked. A marked span is found when one of its kind covers half of it; a
    finding is right when it touches a marked span of its kind."""
    from data_prep.pii import DEFAULT as USUAL
    from data_prep.pii import ON_REQUEST, Span, find

    rules = (*USUAL, *ON_REQUEST)
    count: Counter[tuple[str, str]] = Counter()
    rows = read(path)
    for row in rows:
        marked = [
            Span(s["start_position"], s["end_position"], PII_NAMES.get(s["entity_type"], s["entity_type"]))
            for s in row["spans"]
        ]
        found = find(row["full_text"], rules)
        for gold in marked:
            shared = [min(gold.end, p.end) - max(gold.start, p.start) for p in found if p.entity == gold.entity]
            count[gold.entity, "marked"] += 1
            count[gold.entity, "found"] += max(shared, default=0) >= (gold.end - gold.start) / 2
        for p in found:
            right = any(g.entity == p.entity and g.start < p.end and p.start < g.end for g in marked)
            count[p.entity, "right" if right else "wrong"] += 1
    lines = []
    kinds = {kind for kind, _ in count}
    for kind in sorted(kinds, key=lambda kind: (kind not in rules, kind not in USUAL, -count[kind, "marked"])):
        state = "" if kind in USUAL else "on request" if kind in rules else "no rule"
        said, marks = count[kind, "right"] + count[kind, "wrong"], count[kind, "marked"]
        precision = f"{count[kind, 'right'] / said:.3f}" if said else "-"
        lines.append([kind, state, precision, f"{count[kind, 'found'] / marks:.3f}" if marks else "-", said, marks])
    title = f"presidio-research: {len(rows):,} synthetic texts"
    show(title, ["entity", "", "precision", "recall", "findings", "marked"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure preparation's judgements on public data.")
    parser.add_argument("folder", nargs="?", type=Path, help="where the public data is (default: RETORT_REALDATA)")
    folder = parser.parse_args().folder or Path(os.environ.get("RETORT_REALDATA", "realdata"))
    if not (folder / "prep").is_dir():
        raise SystemExit(f"public test data is not here ({folder}); set RETORT_REALDATA")
    pairs(folder / "prep" / "dedup")
    kept(folder / "prep" / "dedup")
    personal(folder / "prep" / "pii" / "presidio_synth_v2.jsonl")


if __name__ == "__main__":
    main()
