"""`retort generate` killed again and again, as it generates and as it scores: nothing is lost, doubled or redone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from teaching import lines, recipe_file, results, taught

from data_prep.logit_cache import CachedLogits
from distill.generate import generate
from recipes.load import load_recipe

GENERATING, SCORING = 12, 8  # kills
# A process that has the libraries loaded, and of which every stage is a fork: to load them again would take a minute.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["distill.generate", "distill.engine_transformers", "transformers", "torch"])


def run_stage(path: Path, log: Path) -> None:
    def say(line: str) -> None:
        with log.open("a") as out:
            out.write(line + "\n")

    generate(load_recipe(path), say=say)


def killed(path: Path, log: Path, ready: Callable[[], bool], wait: float) -> bool:
    """Run the stage and kill it a moment after it has come so far; False where it ended before."""
    log.write_text("")
    process = FORKS.Process(target=run_stage, args=(path, log))
    process.start()
    while process.is_alive() and not ready():
        time.sleep(0.001)
    time.sleep(wait)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in {0, -signal.SIGKILL}, log.read_text()
    return process.exitcode != 0


@pytest.mark.slow
def test_a_stage_killed_at_twenty_points_ends_as_if_it_never_was(tmp_path: Path) -> None:
    changes = {
        "data": {
            "train": [{"embedded": "legal", "limit": 160}],
            "eval": [{"embedded": "legal", "split": "heldout", "limit": 12}],
        },
        "method": {"type": "distill", "mode": "logits"},
    }
    # Plain batches of four: an answer is on disk every few hundredths of a second. Scored afterwards, so that both
    # halves of the stage are long enough to be killed in.
    engine = {"transformers": {"batching": "plain", "batch_size": 4, "device": "cpu", "dtype": "float32"}}
    teacher = {
        "model": "embedded:tiny-teacher",
        "sampling": {"max_tokens": 32},
        "engine": engine,
        "logits": {"k": 8, "while_generating": False},
    }
    whole, stats, _ = taught(recipe_file(tmp_path, teacher=teacher, output=str(tmp_path / "whole"), **changes))
    path = recipe_file(tmp_path, teacher=teacher, output=str(tmp_path / "killed"), **changes)
    folder, log, draw = tmp_path / "killed", tmp_path / "log", random.Random(7)

    def recorded() -> int:
        return sum(p.read_bytes().count(b"\n") for p in (folder / "teacher" / "journal").glob("*.jsonl"))

    points = []
    for _ in range(GENERATING):
        before = recorded()
        assert killed(path, log, lambda before=before: recorded() > before, draw.uniform(0, 0.05))
        points.append(recorded())
    assert len(set(points)) == GENERATING and points[-1] < stats["requests"]
    scored = 0
    for _ in range(SCORING):
        scored += killed(path, log, lambda: "distributions:" in log.read_text(), draw.uniform(0, 0.4))
    assert scored >= SCORING // 2  # the first of them found something to score
    recipe, last, _ = taught(path)
    assert results(recipe) == results(whole)
    assert last["calls_made"] == 0 and recorded() == stats["requests"]  # nothing was asked twice
    keys = [line["key"] for file in (folder / "teacher" / "journal").glob("*.jsonl") for line in lines(file)]
    assert len(keys) == len(set(keys))
    one, other = CachedLogits(tmp_path / "whole" / "logits"), CachedLogits(folder / "logits")
    assert set(one) == set(other)
    for key in one:
        assert (one[key].ids == other[key].ids).all() and abs(one[key].log_probs - other[key].log_probs).max() < 0.01
    told = json.loads((folder / "teacher" / "stats.json").read_text())
    assert all(told[name] == stats[name] for name in ("kept", "rejected", "truncated", "completions"))
