"""The legal sample data: what a user relies on when training on the one file and measuring on the other."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from scripts.build_legal_data import SIZES, TARGET, Clause, build, clause_types, clauses, main
from scripts.legal_slots import common

SEED = 17
EXPECTED_LABELS = {
    *("assignment", "audit", "confidentiality", "data protection", "delivery", "force majeure", "governing law"),
    *("indemnity", "insurance", "intellectual property", "liability cap", "non-compete", "payment", "renewal"),
    *("rent", "termination", "warranty"),
}


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TARGET / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tables() -> dict[str, list[dict[str, Any]]]:
    return {split: read(split) for split in SIZES}


@pytest.fixture(scope="module")
def made() -> dict[str, list[Clause]]:
    return {split: list(clauses(SEED, count, split)) for split, count in SIZES.items()}


def clause_and_question(row: dict[str, Any]) -> tuple[str, str]:
    clause, question = row["messages"][0]["content"].split("\n\n")
    return clause, question


def answer(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def shingles(text: str, size: int = 4) -> set[tuple[str, ...]]:
    words = re.findall(r"\{\w+\^?\}|\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def near_identical_share(made: list[Clause], threshold: float) -> float:
    """Share of clauses whose skeleton has a Jaccard similarity of at least `threshold` with an earlier one."""
    by_wording: dict[str, list[set[tuple[str, ...]]]] = defaultdict(list)
    for clause in made:
        by_wording[clause.wording].append(shingles(clause.skeleton))
    near: set[tuple[str, int]] = set()
    for wording, sets in by_wording.items():
        for (_, left), (j, right) in combinations(enumerate(sets), 2):
            if len(left & right) >= threshold * len(left | right):
                near.add((wording, j))
    return len(near) / len(made)


def test_regenerating_gives_the_committed_bytes() -> None:
    files = build(SEED)
    pairs = ["preferences.jsonl", "preferences_heldout.jsonl"]
    assert sorted(files) == ["LICENSE", "README.md", "conversations.jsonl", "heldout.jsonl", *pairs, "train.jsonl"]
    for name, data in files.items():
        assert (TARGET / name).read_bytes() == data, name
    assert build(SEED) == files
    assert build(SEED + 1)["train.jsonl"] != files["train.jsonl"]
    assert sum(map(len, files.values())) < 9_000_000


def test_check_exits_1_when_a_file_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["build_legal_data", "--out", str(tmp_path)])
    assert main() == 0
    monkeypatch.setattr("sys.argv", ["build_legal_data", "--out", str(tmp_path), "--check"])
    assert main() == 0
    (tmp_path / "heldout.jsonl").write_bytes((tmp_path / "heldout.jsonl").read_bytes()[:-1])
    assert main() == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'heldout.jsonl'}: differs")


@pytest.mark.parametrize(("split", "least"), [("train", 2400), ("heldout", 400)])
def test_every_type_has_the_same_number_of_clauses(tables: dict[str, Any], split: str, least: int) -> None:
    clause_type_of = {row["group"]: row["clause_type"] for row in tables[split]}
    counts = Counter(clause_type_of.values())
    assert set(counts) == EXPECTED_LABELS
    assert sum(counts.values()) >= least
    assert set(counts.values()) == {SIZES[split] // 17}


@pytest.mark.parametrize(("split", "shares"), [("train", (0.31, 0.48, 0.21)), ("heldout", (0.40, 0.40, 0.20))])
def test_every_clause_has_one_type_question_and_the_tasks_have_their_shares(
    tables: dict[str, Any], split: str, shares: tuple[float, float, float]
) -> None:
    """A training clause is asked about nearly all that it says, a held-out one about some of it."""
    rows = tables[split]
    type_questions = Counter(row["group"] for row in rows if row["task"] == "type")
    assert set(type_questions) == {row["group"] for row in rows}
    assert set(type_questions.values()) == {1}
    share = {task: count / len(rows) for task, count in Counter(row["task"] for row in rows).items()}
    for task, expected in zip(("type", "extract", "obligation"), shares, strict=True):
        assert share[task] == pytest.approx(expected, abs=0.03)
    fields = Counter(row["field"] for row in rows if row["task"] == "extract")
    assert set(fields) == {"party", "date", "amount", "notice"}
    assert min(fields.values()) / sum(fields.values()) > 0.12


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_in_the_clause_or_among_the_labels(tables: dict[str, Any], split: str) -> None:
    for row in tables[split]:
        clause, _ = clause_and_question(row)
        if row["task"] == "extract":
            assert answer(row) in clause, row
        elif row["task"] == "type":
            assert answer(row) == row["clause_type"]
        else:
            assert answer(row) in {"yes", "no"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_yes_and_no_are_balanced_for_every_type(tables: dict[str, Any], split: str) -> None:
    answers = [answer(row) for row in tables[split] if row["task"] == "obligation"]
    assert Counter(answers)["yes"] / len(answers) == pytest.approx(0.5, abs=0.05)
    with_both = {(row["clause_type"], answer(row)) for row in tables[split] if row["task"] == "obligation"}
    assert len(with_both) == 2 * len({clause_type for clause_type, _ in with_both})


def test_no_two_answers_can_be_confused(made: dict[str, list[Clause]]) -> None:
    """A distractor never contains the answer of an extraction question, nor is it contained in it."""
    kinds = {"party": ("A", "B", "C", "P"), "date": ("date", "later", "earlier"), "amount": ("amount", "fee")}
    for clause in made["train"] + made["heldout"]:
        for question in clause.questions:
            names = kinds.get(question.field, ())
            others = [value for key, value in clause.values.items() if key.rsplit(".")[-1] in names]
            assert sum(question.answer in other or other in question.answer for other in others) == bool(others), clause


def test_held_out_wordings_and_texts_do_not_occur_in_training(
    tables: dict[str, Any], made: dict[str, list[Clause]]
) -> None:
    wordings = {split: {row["wording"] for row in rows} for split, rows in tables.items()}
    assert not wordings["train"] & wordings["heldout"]
    per_type = {split: Counter(name.rsplit("-", 1)[0] for name in names) for split, names in wordings.items()}
    assert set(per_type["heldout"].values()) == {4}
    assert min(per_type["train"].values()) >= 12
    skeletons = [clause.skeleton for clause in made["train"]]
    assert not {clause.skeleton for clause in made["heldout"]} & set(skeletons)
    seen = set().union(*map(shingles, skeletons))
    overlap = [len(own & seen) / len(own) for own in (shingles(clause.skeleton) for clause in made["heldout"])]
    assert max(overlap) < 0.25  # of a clause's four-word runs, those that occur anywhere in training


def test_held_out_leads_tails_and_distractors_do_not_occur_in_training() -> None:
    parts = common()
    names = ["stems", "party_leads", "sentence_leads", "prefix_leads", "distractors", "tails"]
    for pair in [*(parts[name] for name in names), *parts["questions"].values(), *(t.asides for t in clause_types())]:
        assert pair["train"] and pair["heldout"]
        assert not set(pair["train"]) & set(pair["heldout"])


def test_some_held_out_names_and_question_phrasings_are_unseen(tables: dict[str, Any]) -> None:
    asked = {
        split: {clause_and_question(row)[1] for row in rows if row["task"] == "type"} for split, rows in tables.items()
    }
    assert len(asked["train"]) == 5
    assert asked["heldout"] - asked["train"] == set(common()["questions"]["type"]["heldout"])
    seen = {answer(row) for row in tables["train"] if row["field"] == "party"}
    parties = [answer(row) for row in tables["heldout"] if row["field"] == "party"]
    assert sum(name not in seen for name in parties) / len(parties) > 0.9


def test_clauses_are_short_and_long_and_rarely_alike(made: dict[str, list[Clause]]) -> None:
    words = [len(clause.text.split()) for clause in made["train"]]
    assert sum(words) / len(words) == pytest.approx(47, abs=4)
    assert sum(count <= 30 for count in words) > 200
    assert sum(count >= 80 for count in words) > 80
    assert max(words) <= 130
    assert len({clause.text for clause in made["train"]}) == SIZES["train"]
    assert len({clause.skeleton for clause in made["train"]}) == SIZES["train"]
    assert near_identical_share(made["train"], 0.9) < 0.03
    assert near_identical_share(made["train"], 0.8) < 0.07


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_text_is_clean(tables: dict[str, Any], split: str) -> None:
    broken = re.compile(r"[\[\]{}<>|]|  |\.\.| [.,;]|\b(\w+) \1\b|''|\bA [aeiou]|\ba (?!one)[aeio]")
    for row in tables[split]:
        clause, question = clause_and_question(row)
        assert not broken.search(clause), clause
        assert not broken.search(question), question
        assert clause[-1] == "." and question[-1] in "?."


def test_the_pretraining_clauses_use_training_wordings_only() -> None:
    held_out = {wording.id for clause_type in clause_types() for wording in clause_type.wordings["heldout"]}
    many = list(clauses(3, 5000, "train"))
    assert len(many) == 5000
    assert not {clause.wording for clause in many} & held_out
    assert len({clause.text for clause in many}) > 4990
    assert list(clauses(3, 10, "train")) == many[:10]


def test_every_wording_has_a_question_beside_the_type_or_no_value_to_ask_for() -> None:
    for clause_type in clause_types():
        for wording in [*clause_type.wordings["train"], *clause_type.wordings["heldout"]]:
            slots = set(re.findall(r"\{(\w+)\^?\}", wording.text))
            assert set(wording.ask) <= slots, wording.id
            assert wording.ask or wording.yesno or {"X", "Y"} & slots, wording.id
            if wording.yesno:
                assert re.search(r"<[^<>|]*\|[^<>|]*>", wording.text), wording.id


def test_a_pair_has_the_right_answer_and_a_wrong_one_of_its_kind() -> None:
    for split, name in (("train", "preferences"), ("heldout", "preferences_heldout")):
        made = [json.loads(line) for line in (TARGET / f"{name}.jsonl").read_text().splitlines()]
        right = {}
        answers: dict[str, set[str]] = {}
        for line in (TARGET / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            question, answer = (message["content"] for message in row["messages"])
            right[question] = answer
            answers.setdefault(row["field"], set()).add(answer)
        assert len(made) == len({pair["group"] for pair in made})
        for pair in made:
            assert right[pair["prompt"]] == pair["chosen"] != pair["rejected"]
            assert pair["rejected"] in answers[pair["field"]]
