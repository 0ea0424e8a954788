"""Write the legal sample data: contract clauses with questions, from the wordings in scripts/legal_data/.

    python -m scripts.build_legal_data            # writes recipes/embedded/legal
    python -m scripts.build_legal_data --check    # exit 1 if the committed files differ

Notation of a wording: `[a|b]` is a free choice, `<yes|no>` switches the answer of the wording's yes/no
question, `{slot}` is a drawn value (`{slot^}` with a capital). The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML

from scripts.legal_slots import CONTENT, FIELDS, Slots, common

TARGET = Path(__file__).parent.parent / "recipes" / "embedded" / "legal"
SIZES = {"train": 2448, "heldout": 408}  # clauses; multiples of 17 types, so that every type has the same share
# Parties come up in most clauses; without these weights they would crowd out the other fields.
FIELD_WEIGHTS = {"party": 1, "date": 3, "amount": 3, "notice": 3}


@dataclass(frozen=True)
class Wording:
    """One way to write a clause of a type; `ask` maps a slot to the noun phrase that asks for its value."""

    id: str
    text: str
    ask: dict[str, str]
    yesno: str | None


@dataclass(frozen=True)
class ClauseType:
    label: str
    roles: list[list[str]]
    kinds: list[str]
    wordings: dict[str, list[Wording]]
    asides: dict[str, list[str]]


@dataclass(frozen=True)
class Question:
    task: str
    field: str
    text: str
    answer: str


@dataclass(frozen=True)
class Clause:
    """A finished clause.

    `skeleton` is its text before the slot values went in; `terms` maps a noun phrase to the value that it asks for.
    """

    text: str
    clause_type: str
    wording: str
    values: dict[str, str]
    skeleton: str
    terms: dict[str, str]
    questions: tuple[Question, ...]


@cache
def clause_types() -> tuple[ClauseType, ...]:
    """All clause types, by file name."""
    files = sorted(path for path in CONTENT.glob("*.yaml") if path.name != "common.yaml")
    return tuple(_clause_type(YAML(typ="safe").load(path)) for path in files)


def _clause_type(raw: dict[str, Any]) -> ClauseType:
    slug = raw["label"].replace(" ", "-")
    wordings = {
        split: [
            Wording(f"{slug}-{key}", item["text"].strip(), item.get("ask", {}), item.get("yesno"))
            for key, item in raw[split].items()
        ]
        for split in SIZES
    }
    return ClauseType(raw["label"], raw["roles"], raw["kinds"], wordings, raw["asides"])


def clauses(seed: int, count: int, split: str) -> Iterator[Clause]:
    """Yield `count` clauses of a split ("train" or "heldout"), evenly over types and wordings.

    Repeated skeletons are redrawn a few times, so duplicates stay rare until the wordings are used up.
    """
    rng = Random(f"{seed}/{split}")
    seen: set[str] = set()
    for index in range(count):
        turn, position = divmod(index, len(clause_types()))
        clause_type = clause_types()[position]
        wordings = clause_type.wordings[split]
        lap, place = divmod(turn, len(wordings))
        positive = (lap + place) % 2 == 0
        for _ in range(12):
            clause = _clause(rng, split, clause_type, wordings[place], positive)
            if clause.skeleton not in seen:
                break
        seen.add(clause.skeleton)
        yield clause


def _clause(rng: Random, split: str, clause_type: ClauseType, wording: Wording, positive: bool) -> Clause:
    slots = Slots(rng, split, clause_type.roles, clause_type.kinds)
    body = _choose(rng, wording.text, positive)
    names_parties = _may_name_parties(wording) and rng.random() < (0.25 if wording.ask else 0.8)
    parts = _arrange(rng, split, clause_type, body, names_parties)
    text = " ".join(slots.fill(part, scope) for scope, part in parts)
    text = re.sub(r"\.\.(?= |$)", ".", text)  # "Inc." at the end of a sentence
    ask = wording.ask | ({"A": "the {x}", "B": "the {y}"} if names_parties else {})
    left = dict(ask)
    questions = [_type_question(rng, split, clause_type), *_extractions(rng, split, slots, left, (1.0, 0.2))]
    polar = [wording.yesno] if wording.yesno else []
    if polar and rng.random() < 0.68:
        questions.append(_polar_question(rng, slots, polar.pop(), positive))
    skeleton = " ".join(part for _, part in parts)
    # A generator of its own: the clauses that follow do not depend on how much is asked about this one.
    more = Random(text)
    terms = {slots.fill(_choose(more, phrase, True)): slots.values[slot] for slot, phrase in ask.items()}
    if split == "train":  # a clause that is read once may as well answer all it can
        questions += _extractions(more, split, slots, left, (0.8,) * len(left))
        questions += [_polar_question(more, slots, question, positive) for question in polar]
    return Clause(text, clause_type.label, wording.id, slots.values, skeleton, terms, tuple(questions))


def _may_name_parties(wording: Wording) -> bool:
    roles, names = re.search(r"\{[XY]\}", wording.text), re.search(r"\{[AB]\}", wording.text)
    return roles is not None and names is None


def _choose(rng: Random, text: str, positive: bool) -> str:
    text = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), text)
    return re.sub(r"<([^<>|]*)\|([^<>|]*)>", lambda match: match[1] if positive else match[2], text)


def _arrange(rng: Random, split: str, own: ClauseType, body: str, names_parties: bool) -> list[tuple[str, str]]:
    """Put leads, distractors, an aside and tails around the body; returns (scope, template) pairs in order."""
    pool = common()
    # Short bodies stay bare more often than not, so that both lengths occur in every type.
    extras = rng.choices([0, 1, 2, 3, 4], [48, 26, 14, 8, 4])[0]
    before: list[str] = []
    after: list[str] = []
    if names_parties:
        before.append(rng.choice(pool["party_leads"][split]))
    elif extras and rng.random() < 0.25:
        before.append(rng.choice(pool["sentence_leads"][split]))
        extras -= 1
    kinds = [rng.choices(["distractors", "tails", "aside"], [50, 35, 15])[0] for _ in range(extras)]
    for kind in dict.fromkeys(kinds):
        source = _asides(rng, split, own) if kind == "aside" else pool[kind][split]
        for extra in rng.sample(source, min(kinds.count(kind), len(source))):
            (before if kind == "distractors" and rng.random() < 0.4 else after).append(extra)
    rng.shuffle(after)
    if not before or rng.random() < 0.3:
        body = _prefixed(rng, split, body)
    if rng.random() < 0.3:
        first = before if before else [body]
        first[0] = rng.choice(pool["numbers"]) + first[0]
        body = body if before else first[0]
    sentences = [*((f"before{i}.", part) for i, part in enumerate(before)), ("", body)]
    return sentences + [(f"after{i}.", part) for i, part in enumerate(after)]


def _asides(rng: Random, split: str, own: ClauseType) -> list[str]:
    other = rng.choice([kind for kind in clause_types() if kind.label != own.label])
    return other.asides[split]


def _prefixed(rng: Random, split: str, body: str) -> str:
    word = body.split()[0]
    if rng.random() > 0.3 or not (body.startswith("{A}") or word in common()["lowerable"]):
        return body
    return rng.choice(common()["prefix_leads"][split]) + (body if word.startswith("{") else body[0].lower() + body[1:])


def _phrasing(rng: Random, split: str, field: str) -> str:
    phrasings = common()["questions"][field]
    return rng.choice(phrasings["heldout" if split == "heldout" and rng.random() < 0.4 else "train"])


def _type_question(rng: Random, split: str, clause_type: ClauseType) -> Question:
    return Question("type", "type", _phrasing(rng, split, "type"), clause_type.label)


def _polar_question(rng: Random, slots: Slots, question: str, positive: bool) -> Question:
    return Question(
        "obligation", "obligation", slots.fill(_choose(rng, question, positive)), "yes" if positive else "no"
    )


def _extractions(
    rng: Random, split: str, slots: Slots, left: dict[str, str], chances: tuple[float, ...]
) -> Iterator[Question]:
    """Questions for values in `left`, which is used up: one for each chance, until a chance is missed."""
    for chance in chances:
        if not left or rng.random() > chance:
            return
        slot = rng.choices(list(left), [FIELD_WEIGHTS[FIELDS[name]] for name in left])[0]
        asked = slots.fill(_choose(rng, left.pop(slot), True))
        field = FIELDS[slot]
        yield Question("extract", field, _phrasing(rng, split, field).format(np=asked), slots.values[slot])


def rows(seed: int, split: str) -> list[dict[str, Any]]:
    """The chat rows of a split, in shuffled clause order; the rows of one clause share `group`."""
    made = list(clauses(seed, SIZES[split], split))
    Random(f"{seed}/order/{split}").shuffle(made)
    return rows_of(made, split)


def rows_of(made: Iterable[Clause], split: str = "train") -> list[dict[str, Any]]:
    """The chat rows of clauses."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{clause.text}\n\n{question.text}"},
                {"role": "assistant", "content": question.answer},
            ],
            "task": question.task,
            "field": question.field,
            "clause_type": clause.clause_type,
            "wording": clause.wording,
            "group": f"{split}-{number:04}",
        }
        for number, clause in enumerate(made, 1)
        for question in clause.questions
    ]


def conversations(seed: int, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions with one row a clause, asked one after the other in random order: the clause is read once."""
    rng = Random(f"{seed}/conversations")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        groups.setdefault(row["group"], []).append(row)
    made = []
    for group, asked in groups.items():
        rng.shuffle(asked)
        messages: list[dict[str, str]] = []
        for row in asked:
            user, answer = row["messages"]
            question = user["content"].rpartition("\n\n")[2]
            messages += [{**user, "content": question} if messages else user, answer]
        kept = {name: asked[0][name] for name in ("clause_type", "wording")}
        made.append({"messages": messages, **kept, "group": group})
    return made


def preferences(seed: int, split: str, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One pair a clause: a question with its answer, and a wrong answer of the same kind.

    Wrong is another clause type, the other of yes and no, or what another clause gives for the same field.
    """
    rng = Random(f"{seed}/preferences/{split}")
    answers: dict[str, list[str]] = {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        answers.setdefault(row["field"], []).append(row["messages"][-1]["content"])
        groups.setdefault(row["group"], []).append(row)
    made = []
    for asked in groups.values():
        row = rng.choice(asked)
        question, answer = (message["content"] for message in row["messages"])
        wrong = rng.choice(sorted({other for other in answers[row["field"]] if other != answer}))
        kept = {name: row[name] for name in ("task", "field", "clause_type", "wording", "group")}
        made.append({"prompt": question, "chosen": answer, "rejected": wrong, **kept})
    return made


def build(seed: int) -> dict[str, bytes]:
    """The files of the data set by name."""
    made = {split: rows(seed, split) for split in SIZES}
    tables = {
        **made,
        "conversations": conversations(seed, made["train"]),
        "preferences": preferences(seed, "train", made["train"]),
        "preferences_heldout": preferences(seed, "heldout", made["heldout"]),
    }
    files = {
        f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        for split, table in tables.items()
    }
    readme = (CONTENT / "README.md.in").read_text(encoding="utf-8")
    files["README.md"] = readme.replace("@SEED@", str(seed)).replace("@COUNTS@", _counts_table(made))
    files["LICENSE"] = (CONTENT / "LICENSE").read_text(encoding="utf-8")
    return {name: text.encode() for name, text in files.items()}


def _counts_table(made: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | train | held out |", "|---|---:|---:|"]

    def line(name: str, count: dict[str, int]) -> None:
        lines.append(f"| {name} | {count['train']} | {count['heldout']} |")

    line("clauses", {split: len({row["group"] for row in table}) for split, table in made.items()})
    line("wordings", {split: len({row["wording"] for row in table}) for split, table in made.items()})
    line("rows", {split: len(table) for split, table in made.items()})
    by_field = {split: Counter(row["field"] for row in table) for split, table in made.items()}
    for field in ("type", "party", "date", "amount", "notice", "obligation"):
        line(f"rows with field `{field}`", {split: by_field[split][field] for split in made})
    return "\n".join(lines)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the legal sample data.")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the files differ")
    options = parser.parse_args()
    files = build(options.seed)
    if options.check:
        differing = [path for name, data in files.items() if not _holds(path := options.out / name, data)]
        for path in differing:
            print(f"{path}: differs from what the generator writes; run python -m scripts.build_legal_data")
        return 1 if differing else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (options.out / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
