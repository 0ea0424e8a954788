"""`retort generate` killed again and again, as it generates and as it scores: nothing is lost, doubled or redone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from teaching import lines, recipe_file, results, taught

from data_prep.logit_cache import CachedLogits
from recipes.load import load_recipe

KILLS = 20
TEACHER = {"model": "embedded:tiny-teacher", "sampling": {"max_tokens": 32}}


def recorded(folder: Path) -> int:
    """Whole lines of the journal."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "teacher" / "journal").glob("*.jsonl"))


def parts(folder: Path) -> int:
    return len(list((folder / "logits").glob("part-*.parquet")))


def killed(recipe: Path, folder: Path, wait: float, progress: str) -> bool:
    """Start the stage and kill it once it has done something more, a moment later; False where it ended before."""
    count = recorded if progress == "journal" else parts
    before = count(folder)
    command = [sys.executable, "-m", "scripts.cli", "generate", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=recipe.parent)
    while process.poll() is None and count(folder) <= before:
        time.sleep(0.002)
    time.sleep(wait)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    stderr = process.communicate()[1]
    assert process.returncode in {0, -signal.SIGKILL}, stderr
    return process.returncode != 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stage_killed_at_twenty_points_ends_as_if_it_never_was(tmp_path: Path) -> None:
    changes = {
        "data": {
            "train": [{"embedded": "legal", "limit": 160}],
            "eval": [{"embedded": "legal", "split": "heldout", "limit": 12}],
        },
        "method": {"type": "distill", "mode": "logits"},
    }
    # Plain batches of four: an answer is on disk every few hundredths of a second. Scored afterwards, so that a kill
    # in the second half costs only what waits for the next part.
    engine = {"transformers": {"batching": "plain", "batch_size": 4, "device": "cpu", "dtype": "float32"}}
    teacher = {**TEACHER, "engine": engine, "logits": {"k": 8, "while_generating": False}}
    whole, stats, _ = taught(recipe_file(tmp_path, teacher=teacher, output=str(tmp_path / "whole"), **changes))
    path = recipe_file(tmp_path, teacher=teacher, output=str(tmp_path / "killed"), **changes)
    folder, draw = tmp_path / "killed", random.Random(7)
    happened, answered = 0, []
    for _ in range(KILLS):
        generating = recorded(folder) < stats["requests"]
        answered.append(recorded(folder))
        happened += killed(path, folder, draw.uniform(0, 0.3), "journal" if generating else "logits")
    assert happened >= 8 and len(set(answered)) >= 8  # kills at as many different points
    recipe, last, _ = taught(path)
    assert results(recipe) == results(whole)
    assert recorded(folder) == stats["requests"]  # no answer was asked for twice, and none is there twice
    assert last["calls_made"] == stats["requests"] - answered[-1] or last["calls_made"] == 0
    keys = [line["key"] for file in (folder / "teacher" / "journal").glob("*.jsonl") for line in lines(file)]
    assert len(keys) == len(set(keys))
    one, other = CachedLogits(tmp_path / "whole" / "logits"), CachedLogits(folder / "logits")
    assert set(one) == set(other)
    for key in one:
        assert (one[key].ids == other[key].ids).all() and abs(one[key].log_probs - other[key].log_probs).max() < 0.01
    stated = json.loads((folder / "teacher" / "stats.json").read_text())
    assert {k: stated[k] for k in ("kept", "rejected", "truncated")} == {
        k: stats[k] for k in ("kept", "rejected", "truncated")
    }
    assert load_recipe(path).run_dir == folder
