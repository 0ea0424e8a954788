"""Near-duplicates: sketches estimate Jaccard similarity, clusters hold what is alike, and how that meets real pairs."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.near_dup import PERMUTATIONS, Forest, band_rows, join_similar, similarity, sketch
from data_prep.ngrams import hash_words, ngrams, words


def clusters(texts: list[str], n: int, threshold: float) -> np.ndarray:
    forest = Forest(len(texts))
    join_similar(forest, [sketch(texts, n, threshold)], np.ones(len(texts), bool), threshold)
    return forest.heads()


def test_words_of_many_scripts() -> None:
    assert words("The ﬁne-print, 'No. 5'!") == ["the", "fine", "print", "no", "5"]
    assert words("合同 Vertrag") == ["合", "同", "vertrag"]
    assert words(" -- ") == ["--"] and words("") == [""]


@given(st.text(st.characters(max_codepoint=127), max_size=60))
@settings(max_examples=300, deadline=None)
def test_words_of_ascii_texts_are_found_by_the_same_rule(text: str) -> None:
    assert words(text) == (words(f"é {text}")[1:] or [text.strip()])


@given(st.lists(st.text("ab c", max_size=30), min_size=1, max_size=8), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_ngrams_of_a_batch_are_those_of_each_text(texts: list[str], n: int) -> None:
    hashes, offsets = ngrams(*hash_words(texts), n)
    assert len(offsets) == len(texts) + 1
    seen: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(texts):
        own = words(text)
        runs = [tuple(own[j : j + n]) for j in range(max(1, len(own) - n + 1))]
        found = hashes[offsets[i] : offsets[i + 1]].tolist()
        assert len(found) == len(runs)
        for run, value in zip(runs, found, strict=True):
            assert seen.setdefault(run, value) == value
    assert len(set(seen.values())) == len(seen), "different runs have different hashes"


def test_the_sketch_estimates_jaccard_similarity() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    errors = []
    for _ in range(200):
        shared, own = rng.sample(vocabulary, 60), rng.randint(0, 60)
        rest = rng.sample(vocabulary, 2 * own)
        one, other = set(shared) | set(rest[:own]), set(shared) | set(rest[own:])
        truth = len(one & other) / len(one | other)
        sketches = sketch([" ".join(sorted(one)), " ".join(sorted(other))], 1, 0.5).signatures
        errors.append(float(similarity(sketches[:1], sketches[1:])[0]) - truth)
    # The standard error is sqrt(J (1 - J) / 128), at most 0.044; of its mean over 200 pairs 0.003.
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.044


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
def test_a_pair_at_the_threshold_is_seldom_missed(threshold: float) -> None:
    rows = band_rows(threshold)
    assert 1 <= rows <= PERMUTATIONS and (1 - threshold**rows) ** (PERMUTATIONS // rows) <= 0.01


def test_clusters_are_what_pairs_above_the_threshold_make() -> None:
    """Against every pair compared: the same clusters, heads first, also in buckets of unlike rows."""
    rng = random.Random(1)
    vocabulary = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(vocabulary, k=30)) for _ in range(150)]
    for _ in range(250):
        copy = rng.choice(texts).split()
        for _ in range(rng.randint(0, 3)):
            copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
        texts.append(" ".join(copy))
    threshold = 0.6
    signatures = sketch(texts, 2, threshold).signatures
    forest = Forest(len(texts))
    pairs = np.array(list(combinations(range(len(texts)), 2)))
    close = similarity(signatures[pairs[:, 0]], signatures[pairs[:, 1]]) >= threshold
    forest.join(pairs[close])
    expected = forest.heads()
    found = clusters(texts, 2, threshold)
    assert (expected != np.arange(len(texts))).sum() > 150
    # The chance to miss one pair is under a percent; a cluster has many pairs.
    assert (found != expected).sum() <= 4
    parts = [sketch(texts[i : i + 77], 2, threshold) for i in range(0, len(texts), 77)]
    split = Forest(len(texts))
    join_similar(split, parts, np.ones(len(texts), bool), threshold)
    assert np.array_equal(split.heads(), found), "cut into parts or not"


def test_rows_that_are_out_neither_drop_nor_join() -> None:
    texts = ["a b c d e f"] * 3
    forest = Forest(3)
    join_similar(forest, [sketch(texts, 1, 0.9)], np.array([False, True, True]), 0.9)
    assert forest.heads().tolist() == [0, 1, 1]


def test_paraphrases_of_mrpc(realdata: Path) -> None:
    """Lexical dedup should not call a pair equal that people called different, and cannot find most paraphrases."""
    rows = [json.loads(line) for line in (realdata / "prep/dedup/mrpc_train.jsonl").open()]
    same = np.array([row["label"] == 1 for row in rows])
    texts = [row["s1"] for row in rows] + [row["s2"] for row in rows]
    measured = {}
    for threshold in (0.5, 0.7, 0.85):
        heads = clusters(texts, 3, threshold)
        flagged = heads[: len(rows)] == heads[len(rows) :]
        measured[threshold] = (flagged[same].sum() / flagged.sum(), flagged[same].mean())
    assert measured[0.5][0] > 0.86 and measured[0.5][1] > 0.13, measured
    assert measured[0.7][0] > 0.93 and measured[0.7][1] > 0.015, measured
    assert measured[0.85][0] == 1.0, measured


def test_what_the_authors_of_gpteacher_dropped(realdata: Path) -> None:
    folder = realdata / "prep/dedup"

    def rows(name: str) -> list[tuple[str, str, str]]:
        lines = map(json.loads, (folder / f"gpteacher_toolformer_{name}.jsonl").open())
        return [(row["instruction"], row["input"], row["response"]) for row in lines]

    everything = rows("all")
    for name, n, threshold, agreement in (("0.9", 2, 0.7, 0.92), ("0.7", 1, 0.7, 0.83)):
        kept = set(rows(name))
        theirs = np.array([row not in kept for row in everything])
        heads = clusters([response for _, _, response in everything], n, threshold)
        ours = heads != np.arange(len(everything))
        assert (ours == theirs).mean() > agreement
