"""Questions of passages, evolved for a persona, and answered from the passage: rounds from beginning to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chaos_server import ChaosServer
from conftest import ROOT
from teaching import lines, recipe_file, rows_of, taught

PASSAGE = "The tenant pays a rent of 900 euros within ten days of each month."
# The wordings of docs/distillation.md.
ROUNDS = [
    {"write": "question", "ask": "{passage}\n\nWrite two questions that it answers, one per line.", "split": "lines"},
    {
        "write": "question",
        "ask": "{passage}\n\n{question}\n\nWrite it again as each of two people would ask it who know nothing of law. "
        'A JSON list of {"persona": ..., "question": ...}.',
        "split": "json",
    },
    {
        "write": "answer",
        "ask": "{passage}\n\n{question}\n\nAnswer from the passage alone.",
        "student_sees": "{persona} asks: {question}\n\n{passage}",
    },
]


class Writer(ChaosServer):
    """A teacher that writes what it is asked for; of the second question it invents the answer."""

    def reply_to(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply, asked = super().reply_to(path, body), body["messages"][-1]["content"]
        if "one per line" in asked:
            said = "1. How much is the rent?\n2. May I keep a dog?"
        elif "JSON list" in asked:
            about = "dog" if "keep a dog" in asked else "rent"
            said = (
                f'[{{"persona": "A student", "question": "What about the {about}?"}}, "What of the {about}, please?"]'
            )
        else:
            said = "Dogs and cats are most welcome here." if "dog" in asked else "The tenant pays a rent of 900 euros."
        reply["choices"][0]["message"]["content"] = said
        reply["choices"][0]["finish_reason"] = "stop"
        return reply


def test_questions_of_a_passage_are_evolved_and_answered_from_it(tmp_path: Path) -> None:
    text = tmp_path / "clauses.txt"
    text.write_text(PASSAGE, encoding="utf-8")
    server = Writer(model="org/teacher")
    # Entries of the list that name no persona keep the one that the row has.
    rounds = [{"write": "persona", "ask": "{passage}\n\nWho asks?", "samples": 1}, *ROUNDS]
    try:
        recipe, stats, _ = taught(
            recipe_file(
                tmp_path,
                use={"purpose": "research", "distribute": False},
                data={"train": [{"path": str(text), "license": "MIT"}], "requests": [{"task": "summaries"}]},
                teacher={
                    "model": "org/teacher",
                    "license": "Apache-2.0",
                    "engine": {"http": {"urls": [server.url]}},
                    "rounds": rounds,
                    "filters": ["truncated", "empty", {"grounded": {"column": "passage", "share": 0.8}}],
                },
            )
        )
    finally:
        server.kill()
    assert stats["requests"] == 1 + 1 + 2 + 4 and stats["rejected"] == {"grounded": 2}
    prompts = [row["messages"][0]["content"] for row in rows_of(recipe)]
    first = "The tenant pays a rent of 900 euros. asks: "
    wanted = [f"A student asks: What about the rent?\n\n{PASSAGE}", f"{first}What of the rent, please?\n\n{PASSAGE}"]
    assert sorted(prompts) == sorted(wanted)
    assert {row["messages"][-1]["content"] for row in rows_of(recipe)} == {"The tenant pays a rent of 900 euros."}
    assert all("dog" in line["prompt"] for line in lines(recipe.run_dir / "teacher" / "rejected.jsonl"))


def test_the_shipped_recipe_puts_questions_in_the_words_of_others(tmp_path: Path) -> None:
    recipe, stats, _ = taught(
        ROOT / "recipes" / "legal-evolve.yaml",
        f"output={tmp_path / 'run'}",
        "data.train=[{embedded: legal, split: train, limit: 12}]",
        "data.eval=[{embedded: legal, split: heldout, limit: 4}]",
    )
    rows = rows_of(recipe)
    assert len(rows) == stats["kept"] == 12 - sum(stats["rejected"].values()) > 8
    prepared = {row["messages"][0]["content"].partition("\n\n")[0] for row in rows}
    assert len(prepared) > 1 and all(one.startswith("You are asked by somebody whose work is ") for one in prepared)
    assert not any("whose work is" in row["messages"][0]["content"] for row in rows_of(recipe, "heldout"))
