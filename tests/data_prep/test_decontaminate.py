"""Decontamination: own cases by hand, then rephrased HumanEval and rows that have nothing to do with it."""

import hashlib
import json

import numpy as np
import pytest
from conftest import ROOT

from data_prep import decontaminate
from data_prep.decontaminate import CODE, NEAR, NGRAM, Index, Item
from recipes.errors import DataError

CLAUSE = (
    "The Supplier shall keep the machines in working order and repair each fault within three days of the Customer's "
    "written notice, save for faults that the Customer's own staff have caused on purpose."
)
WORDS = CLAUSE.replace(",", "").replace(".", "").replace("'", " ").casefold().split()
FUNCTION = '''def total_of_even(numbers, start):
    """Add the even numbers, from a place on."""
    total = 0
    for place in range(start, len(numbers)):
        if numbers[place] % 2 == 0 and numbers[place] > 0:
            total += numbers[place]
        elif numbers[place] < -100:
            return None
    return {"total": total, "count": len(numbers)}
'''
RENAMED = """def f(xs, i):
    # quite another comment
    s = 1
    for k in range(i, len(xs)):
        if xs[k] % 7 == 3 and xs[k] > 9:
            pass
            s += xs[k]
        elif xs[k] < -5:
            return None
    return {'sum': s, 'n': len(xs)}
"""


def index_of(*texts, **options):
    items = [Item(f"items:{i}", (t,) if isinstance(t, str) else tuple(t)) for i, t in enumerate(texts)]
    return Index.build(items, **options)


def kinds(index, *rows):
    found = index.overlaps([(row,) if isinstance(row, str) else row for row in rows])
    return [overlap and overlap.kind for overlap in found]


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_none() -> None:
    index = index_of(CLAUSE)
    twelve, thirteen = " ".join(WORDS[3:15]), " ".join(WORDS[3:16]).upper().replace(" ", " -- ")
    before, after = "It was said at length that ", "; nobody knew why, least of all we ourselves."
    first, second = index.overlaps([(before + twelve + after,), ("no", before + thirteen + after)])
    assert first is None
    assert second is not None and (second.source, second.kind) == ("items:0", NGRAM)
    assert second.shared == " ".join(WORDS[3:16])
    assert second.share == pytest.approx(1 / (len(WORDS) - 12))


def test_the_closest_item_is_named_with_all_stretches_in_common() -> None:
    index = index_of(" ".join([*WORDS[:15], "and", "so", "on"]), CLAUSE)
    (whole, part) = index.overlaps([(CLAUSE,), (" ".join([*WORDS[:14], "come", "what", "may", *WORDS[15:]]),)])
    assert whole.source == "items:1" and whole.share == 1.0
    assert whole.shared.startswith("the supplier shall keep") and len(whole.shared) == 120 and whole.shared[-1] == "…"
    assert part.source == "items:1" and part.share < 0.5
    assert part.shared.startswith(f"{' '.join(WORDS[:14])} … {' '.join(WORDS[15:18])}")


def test_a_short_question_matches_whole_and_inside_a_longer_text() -> None:
    index = index_of(("Which river flows through the old town?", "The Aare"), ("Who wrote Effi Briest?", "Fontane"))
    inside = "Tell me, please: which river flows through the old town? I have to know."
    assert kinds(index, "which river flows through the old town", inside) == [NGRAM, NGRAM]
    assert kinds(index, "Who wrote Effi Briest?", "You know who wrote Effi Briest, I suppose.") == [NGRAM, None]
    assert kinds(index, "Which river flows through the new town?", "The Aare", "Fontane") == [None, None, None]
    assert index.overlaps([("x", inside)])[0].shared == "which river flows through the old town"
    long = index_of(" ".join(f"word{i}" for i in range(12)))
    assert kinds(long, " ".join(f"word{i}" for i in range(11)), " ".join(f"word{i}" for i in range(13))) == [
        None,
        NGRAM,
    ]


def test_labels_and_short_answers_never_match() -> None:
    answer = "I am sorry, but I cannot help with that."
    index = index_of((CLAUSE, "yes"), ("How is a safe opened?", answer), ("termination",), ("", "no"), ("2 + 2 =", "4"))
    assert kinds(index, "yes", "termination", ("Is it so?", "no"), answer, "4", "2 + 2 =", "") == [None] * 7
    assert index.unmatched == ("items:2", "items:3", "items:4")


def test_numbers_alone_are_no_overlap() -> None:
    count = " ".join(map(str, range(1, 16)))
    index = index_of(f"{CLAUSE} The machines are those of the numbers {count}.")
    assert kinds(index, f"He shut his eyes, took a breath and began to count slowly: {count}, and then he ran.") == [
        None
    ]
    assert kinds(index, f"He shut his eyes, read aloud machines are those of the numbers {count}, and then ran.") == [
        NGRAM
    ]


def test_boilerplate_of_many_items_is_left_out_and_counted() -> None:
    template = "Read the clause below with care and say in one word which of the seventeen types it is of. Clause: "
    tails = [f"the {a} pays the {b} for {c} {a}s" for a in ("buyer", "tenant", "agent") for b in "pqrs" for c in "xyz"]
    index = index_of(*(template + tail for tail in tails))
    other = "when rain falls nobody is to blame"
    assert kinds(index, template + other, template + tails[7]) == [None, NGRAM]
    assert index.ignored[NGRAM] > len(template.split()) - 13
    few = index_of(*(template + tail for tail in tails[:10]))
    assert few.ignored[NGRAM] == 0
    # Even the runs of a few items count only with half of an item beside them, or with a run that is its own.
    assert kinds(few, f"{' '.join(template.split()[:14])} {CLAUSE}", template + tails[7]) == [None, NGRAM]


def test_items_of_equal_texts_are_one() -> None:
    index = Index.build([Item(f"copy:{i}", (CLAUSE, "yes")) for i in range(40)])
    assert index.sources == ("copy:0",) and index.ignored[NGRAM] == 0
    assert index.overlaps([(CLAUSE,)])[0].source == "copy:0"


def test_a_rephrased_text_is_a_near_duplicate() -> None:
    told = (
        "The Supplier must keep the machines in working order and mend each fault within three days of the Customer's "
        "notice, save for faults the Customer's own staff caused on purpose."
    )
    index = index_of(("Sum up the clause.", CLAUSE), similarity=0.4)
    (near,) = index.overlaps([("What does it say?", told)])
    assert near.kind == NEAR and 0.4 < near.share < 0.8 and "machines in working order" in near.shared
    assert kinds(index_of(CLAUSE, similarity=0.8), told) == [None]
    # All texts of an item in one are known too, as text rows hold them.
    assert index_of((CLAUSE, told[60:])).overlaps([(f"{CLAUSE} {told[60:]}",)])[0].kind == NGRAM


def test_code_with_other_names_and_literals_is_found_and_other_code_is_not() -> None:
    index = index_of(FUNCTION)
    (found, fenced) = index.overlaps([(RENAMED,), ("Do it.", f"Here you are:\n```python\n{RENAMED}```\nHave fun!")])
    assert found.kind == fenced.kind == CODE and found.share == fenced.share == 1.0
    assert found.shared.startswith("def f ( xs , i ) : s = 1 for k in range ( i")
    other = "def g(a):\n    with open(a) as stream:\n        return [line.strip() for line in stream if line]\n"
    assert kinds(index, other, "Please return the books (all of them) to me;\nthank you;\n") == [None, None]


def test_saved_index_is_the_same_and_its_bytes_never_change(tmp_path) -> None:
    texts = [(CLAUSE, "yes"), FUNCTION, ("Which river flows through the old town?", "The Aare"), "Über \ud800 (x);"]
    rows = [(CLAUSE,), (RENAMED,), ("which river flows through the old town",), ("nothing",), ()]
    index = index_of(*texts)
    index.save(tmp_path / "one")
    index_of(*texts).save(tmp_path / "two")
    one, two = (
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / n).iterdir()} for n in ("one", "two")
    )
    assert one == two and len(one) == 18
    loaded = Index.load(tmp_path / "one")
    assert loaded.overlaps(rows) == index.overlaps(rows)
    assert [o and o.kind for o in loaded.overlaps(rows)] == [NGRAM, CODE, NGRAM, None, None]
    assert not loaded.views[NGRAM].values.flags.owndata
    assert (loaded.fingerprint, loaded.sources, loaded.ignored) == (index.fingerprint, index.sources, index.ignored)
    assert index_of(*texts[:3]).fingerprint != index.fingerprint != index_of(*texts, similarity=0.5).fingerprint


def test_an_empty_index_finds_nothing_and_a_broken_one_is_refused(tmp_path) -> None:
    index = Index.build([])
    index.save(tmp_path / "empty")
    assert Index.load(tmp_path / "empty").overlaps([(CLAUSE, FUNCTION), ()]) == [None, None]
    assert index.overlaps([]) == [] and index.unmatched == ()
    with pytest.raises(DataError, match="holds no index"):
        Index.load(tmp_path / "absent")
    (tmp_path / "empty" / f"{CODE}-values.npy").write_bytes(b"")
    with pytest.raises(DataError, match="prepare it again"):
        Index.load(tmp_path / "empty")


def test_slices_of_many_rows_give_what_one_call_gives(monkeypatch) -> None:
    index = index_of(CLAUSE, FUNCTION)
    rows = [
        (f"row {i} of no interest", CLAUSE if i % 3 == 0 else RENAMED if i % 3 == 1 else "nothing") for i in range(20)
    ]
    whole = index.overlaps(rows)
    monkeypatch.setattr(decontaminate, "_ROWS", 7)
    assert index.overlaps(rows) == whole
    assert [overlap and overlap.kind for overlap in whole] == ([NGRAM, CODE, None] * 7)[:20]


def read(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.fixture(scope="module")
def humaneval(realdata):
    tests = read(realdata / "prep" / "decontam" / "humaneval_test.jsonl")
    return Index.build([Item(f"humaneval:{i}", (row["text"],)) for i, row in enumerate(tests)])


def test_every_verbatim_humaneval_row_is_found(humaneval, realdata) -> None:
    rows = read(realdata / "data" / "code" / "humaneval.jsonl")
    whole = humaneval.overlaps([(row["prompt"] + row["canonical_solution"],) for row in rows])
    parts = humaneval.overlaps([(row["prompt"], row["canonical_solution"]) for row in rows])
    assert [o.kind for o in (*whole, *parts)] == [NGRAM] * 328 and {o.share for o in whole} == {1.0}
    # HumanEval/61 is 56 with other brackets: punctuation is no word.
    assert [i for i, o in enumerate(whole) if o.source != f"humaneval:{i}"] == [61]
    assert humaneval.unmatched == ()


def test_rephrased_humaneval_is_found_in_part_and_named_rightly(humaneval, realdata) -> None:
    rows = read(realdata / "prep" / "decontam" / "rephrase_humaneval_python.jsonl")
    found = humaneval.overlaps([(row["text"],) for row in rows])
    right = [o.kind for i, o in enumerate(found) if o is not None and o.source == f"humaneval:{i}"]
    assert sum(1 for row in rows if row["text"]) == 147  # the others are empty
    assert right.count(CODE) >= 42 and right.count(NGRAM) <= 2
    assert sum(o is not None for o in found) - len(right) <= 2


def test_unrelated_rows_raise_almost_no_alarm(humaneval, realdata) -> None:
    pairs = read(realdata / "prep" / "decontam" / "codealpaca_db.jsonl")
    judged = [(text, same) for row in pairs for text, same in zip(row["train"], row["results"], strict=True)]
    # The nearest training rows of another corpus by embedding, judged no rephrase: the hardest that are unrelated.
    code = humaneval.overlaps([(text,) for text, same in judged if not same])
    assert len(code) == 146 and sum(o is not None for o in code) <= 3
    data = realdata / "data"
    texts = [(r["question"], r["answer"]) for r in read(data / "math" / "gsm8k_train.jsonl")]
    texts += [(r["instruction"], r["input"], r["output"]) for r in read(data / "general" / "alpaca_en_demo.jsonl")]
    texts += [tuple(map(str, r["row"].values())) for r in read(data / "legal" / "legalbench_train.jsonl")]
    assert len(texts) == 8923 and humaneval.overlaps(texts) == [None] * len(texts)
    chinese = [(r["instruction"], r["input"], r["output"]) for r in read(data / "general" / "alpaca_zh_demo.jsonl")]
    assert sum(o is not None for o in humaneval.overlaps(chinese)) <= 1  # the greatest element, in a loop


def test_paraphrases_are_found_more_often_than_sentences_of_another_meaning(realdata) -> None:
    rows = read(realdata / "prep" / "dedup" / "mrpc_train.jsonl")
    found = {}
    for label in (1, 0):
        pairs = [row for row in rows if row["label"] == label]
        index = Index.build([Item(str(i), (row["s1"],)) for i, row in enumerate(pairs)])
        overlaps = index.overlaps([(row["s2"],) for row in pairs])
        found[label] = np.mean([o is not None and o.source == str(i) for i, o in enumerate(overlaps)])
    assert found[1] >= 0.38 and found[0] <= 0.22


@pytest.mark.parametrize("train", ["train", "conversations"])
def test_held_out_clauses_do_not_occur_in_the_training_clauses(train) -> None:
    folder = ROOT / "recipes" / "embedded" / "legal"
    held, rows = (
        [tuple(m["content"] for m in row["messages"]) for row in read(folder / f"{name}.jsonl")]
        for name in ("heldout", train)
    )
    index = Index.build([Item(f"heldout:{i}", texts) for i, texts in enumerate(held)])
    assert index.overlaps(rows) == [None] * len(rows)
    assert index.ignored[NGRAM] > 0 and index.unmatched == ()
    assert all(o is not None and o.kind == NGRAM for o in index.overlaps(held))
