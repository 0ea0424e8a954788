"""Held-out rows of the student: text of the kind that it trains on, and beside it the answer that is the right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chaos_server import ChaosServer
from teaching import lines, recipe_file, rows_of, taught

from data_prep.assemble import read_rows
from data_prep.prepare import prepare
from finetune.evals import reference_of
from recipes.student import student_recipe

WORKING = "Twice three is six."


class Thinker(ChaosServer):
    """Thinks, and then answers 7; a question about 13 is cut."""

    def reply_to(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = super().reply_to(path, body)
        cut = "number 13?" in body["messages"][-1]["content"]
        said = "<think>\nToo long" if cut else f"<think>\n{WORKING}\n</think>\n\n\\boxed{{7}}"
        reply["choices"][0] |= {"finish_reason": "length" if cut else "stop"}
        reply["choices"][0]["message"]["content"] = said
        return reply


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_loss_is_of_the_teachers_text_and_answers_are_compared_with_the_right_one(
    tmp_path: Path, thinks: bool, known: bool
) -> None:
    def write(name: str, numbers: range) -> dict[str, Any]:
        asked = [{"prompt": f"What is {n} plus {3 * n}, as number {n}?"} for n in numbers]
        right = [{**row, "completion": str(4 * n)} for n, row in zip(numbers, asked, strict=True)]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in (right if known else asked)), encoding="utf-8")
        return {"path": str(path), "license": "MIT"}

    server = Thinker(model="org/teacher")
    try:
        recipe, _, _ = taught(
            recipe_file(
                tmp_path,
                use={"purpose": "research", "distribute": False},
                data={"train": [write("train.jsonl", range(20, 40))], "eval": [write("eval.jsonl", range(10, 16))]},
                teacher={
                    "model": "org/teacher",
                    "license": "Apache-2.0",
                    "engine": {"http": {"urls": [server.url]}},
                    "keep_thinking": thinks,
                },
            )
        )
    finally:
        server.kill()
    train, held_out = rows_of(recipe), rows_of(recipe, "heldout")
    assert len(train) == 20 and len(lines(recipe.run_dir / "teacher" / "answers.jsonl")) == 6
    asked = {row["messages"][0]["content"]: row for row in held_out}
    cut = asked.pop("What is 13 plus 39, as number 13?", None)
    assert len(asked) == 5
    for row in asked.values():
        assert row["messages"][-1] == train[0]["messages"][-1]  # the same fields, and here the same words
        assert (WORKING in json.dumps(row["messages"][-1])) is thinks
    # A cut answer is no text to learn: the row's own stands in for it, and without one there is no row.
    assert (cut is not None) is known
    if cut is not None:
        assert cut["messages"][-1] == {"role": "assistant", "content": "52"}
    prepared = prepare(student_recipe(recipe, recipe.run_dir), recipe.run_dir)
    wanted = {row["messages"][0]["content"]: reference_of(row, recipe) for row in read_rows(prepared.folder, "eval")}
    right = {f"What is {n} plus {3 * n}, as number {n}?": str(4 * n) for n in range(10, 16)}
    assert wanted == (right if known else dict.fromkeys(asked, "\\boxed{7}"))
