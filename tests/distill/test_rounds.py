"""Rounds: what is asked about a row, and the rows that an answer leads to. No model is needed to see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from teaching import recipe_file

from data_prep.rows import Row
from distill.rounds import Asker, Thread, going_on, parts, question, student_row
from distill.teachers import Completion
from recipes.errors import DataError
from recipes.load import load_recipe
from recipes.schema_teacher import Round

CHAT = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is due?"},
    {"role": "assistant", "content": "Rent."},
    {"role": "user", "content": "How much?"},
)


def thread(**extra: Any) -> Thread:
    return Thread(Row("rows.jsonl:1", CHAT, extra={"passage": "The rent is 900.", **extra}), "p1", "900")


def answered(text: str, finish: str = "stop") -> Completion:
    return Completion("k", text, finish, None, 5, 3, 0.1, "teacher", 64)


def test_the_row_itself_is_asked_or_a_wording_of_the_recipe() -> None:
    assert question(Round(), thread()) == CHAT
    ruled = question(Round(system="Answer in Latin."), thread())
    assert [m["content"] for m in ruled] == ["Answer in Latin.", *(m["content"] for m in CHAT[1:])]
    asked = Round(write="critique", ask="{conversation}\n--\n{passage} {prompt}", system="Judge.")
    system, user = question(asked, thread())
    assert system == {"role": "system", "content": "Judge."}
    assert user["content"].startswith(
        "System: Be short.\n\nUser: What is due?\n\nAssistant: Rent.\n\nUser: How much?\n--"
    )
    assert user["content"].endswith("The rent is 900. What is due?\nRent.\nHow much?")
    # A text that holds a place stays as it is: places are filled in one pass.
    (said,) = question(Round(write="x", ask="{passage}"), thread(passage="{prompt}"))
    assert said["content"] == "{prompt}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: has no column 'topic'.*the round that writes x"):
        question(Round(write="x", ask="{topic}"), thread())


def test_an_answer_goes_on_as_a_turn_or_as_a_column() -> None:
    (after,) = going_on(Round(), thread(), answered("<think>\nhm\n</think>\n\n900 euros"))
    assert after.row.messages == (*CHAT, {"role": "assistant", "content": "900 euros"})
    (user,) = going_on(Round(write="user", ask="x"), after, answered("When?"))
    assert [m["role"] for m in user.row.messages[-2:]] == ["assistant", "user"]
    assert user.prompt == "p1" and user.row.group == thread().row.group
    made = list(
        going_on(Round(write="q", ask="x", split="lines"), thread(), answered("1. Who pays?\n- When?\n\n2) Who pays?"))
    )
    assert [one.row.extra["q"] for one in made] == ["Who pays?", "When?"]
    assert all(one.row.extra["passage"] == "The rent is 900." for one in made)
    assert list(going_on(Round(), thread(), answered("cut", "length"))) == []
    assert list(going_on(Round(), thread(), answered("<think>never ends"))) == []


@pytest.mark.parametrize(
    ("reply", "columns"),
    [
        ('["a", "b", ""]', [{"q": "a"}, {"q": "b"}]),
        ('```json\n["a", 7]\n```', [{"q": "a"}, {"q": "7"}]),
        ('[{"q": "a", "level": "hard"}]', [{"q": "a", "level": "hard"}]),
        ("no list at all", []),
        ('{"q": "a"}', []),
        ('["a", "b"', []),
    ],
)
def test_a_json_list_makes_a_row_of_each_entry(reply: str, columns: list[dict[str, str]]) -> None:
    assert parts(Round(write="q", ask="x", split="json"), reply) == columns


def test_the_student_may_see_less_than_the_teacher() -> None:
    seen = student_row(Round(ask="{passage} {prompt}", student_sees="{prompt}"), thread())
    assert seen.messages == ({"role": "user", "content": "What is due?\nRent.\nHow much?"},)
    assert student_row(Round(ask="{passage}"), thread()).messages == CHAT
    assert (
        student_row(Round(student_sees="Short: {prompt}"), thread()).messages[0] == CHAT[0]
    )  # its system message stays


def test_keys_name_what_decides_an_answer_and_nothing_else(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    drawn = {"temperature": 1.0}

    def keys(samples: int = 1, asked: Round = Round(), seed: int = 42, who: str = "a", **sampling: float) -> list[str]:  # noqa: B008
        changed = recipe.model_copy(update={"seed": seed})
        asker = Asker(changed, {"model": who}, None, {**drawn, **sampling})
        return [one.request.key for one in asker.ask(asked, [thread(), thread()], samples)]

    assert len(keys()) == 1  # equal questions are asked once
    assert keys(3)[:2] == keys(2) and len(set(keys(3))) == 3
    assert keys(asked=Round(max_tokens=7)) == keys()
    others = [keys(seed=1), keys(who="b"), keys(top_p=0.9), keys(asked=Round(system="Be long."))]
    assert len({keys()[0], *(one[0] for one in others)}) == 5
    assert keys(temperature=0.0) == keys(temperature=0.0, seed=1)  # a greedy answer has no seed
