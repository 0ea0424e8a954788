"""What the teacher's work cost: the time of all sessions, killed ones too, and every answer that was paid for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from teaching import PROMPTS, lines, recipe_file, taught

from distill.generate import generate
from distill.journal_files import decode
from distill.sessions import seconds_of
from recipes.load import load_recipe

HOLD = """
import sys, time
from pathlib import Path
from distill.sessions import Session
session = Session(Path(sys.argv[1]), "http", (2, 3), lambda: 7)
session.start()
time.sleep(60)
"""


def test_time_runs_until_the_last_row_is_scored(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path,
        method={"type": "distill", "mode": "logits"},
        teacher={"logits": {"k": 8, "while_generating": False}, "price": {"hour": 3600.0}},
    )
    held: list[float] = []

    def say(line: str) -> None:
        if line.startswith("starting the teacher"):
            held.append(time.monotonic())
        if line.startswith("logits: "):  # the last thing that scoring says
            time.sleep(1.0)
            held.append(time.monotonic())

    stats = generate(load_recipe(path), say=say)
    folder = tmp_path / "run" / "teacher"
    told = lines(folder / "sessions.jsonl")
    assert seconds_of(folder) == pytest.approx(sum(line["seconds"] for line in told))
    assert seconds_of(folder) > held[1] - held[0] > 1.0
    assert sum(line["calls"] for line in told) == stats["calls_made"] > PROMPTS
    assert len({line["began"] for line in told}) == 1
    # At a coin a second.
    assert stats["seconds"] == pytest.approx(stats["cost"]) == pytest.approx(seconds_of(folder), abs=1e-3)
    assert json.loads((folder / "stats.json").read_text()) == stats
    before = (folder / "sessions.jsonl").read_bytes()
    again = generate(load_recipe(path), say=lambda _: None)  # the teacher is not started, so there is nothing to pay
    assert (folder / "sessions.jsonl").read_bytes() == before and again["cost"] == stats["cost"]


def test_a_killed_session_has_told_its_time(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)]) as process:
        path, began = tmp_path / "sessions.jsonl", time.monotonic()
        while not path.is_file() or path.read_bytes().count(b"\n") < 3:
            assert time.monotonic() - began < 30 and process.poll() is None
            time.sleep(0.02)
        process.kill()
    with path.open("a") as out:
        out.write('{"began": "torn')
    told = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [line["calls"] for line in told] == [7, 0, 0] and {tuple(line["shard"]) for line in told} == {(2, 3)}
    assert seconds_of(tmp_path) == pytest.approx(sum(line["seconds"] for line in told))
    assert seconds_of(tmp_path) > 1.5


def test_answers_that_were_cut_and_asked_for_again_were_paid_for(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, teacher={"price": {"prompt": 1e6, "completion": 1e6}})
    _, short, _ = taught(path, "teacher.sampling.max_tokens=4")
    assert short["paid"]["answers"] == short["completions"]
    recipe, longer, _ = taught(path)
    assert longer["paid"]["answers"] == short["completions"] + longer["calls_made"] > longer["completions"]
    journals = (recipe.run_dir / "teacher" / "journal").glob("*.jsonl")
    written = [decode(line, "") for journal in journals for line in journal.read_bytes().splitlines(keepends=True)]
    for key in ("prompt_tokens", "completion_tokens"):
        assert longer["paid"][key] == sum(getattr(one, key) for one in written) > longer[key]
    assert longer["cost"] == longer["paid"]["prompt_tokens"] + longer["paid"]["completion_tokens"]
