"""A preparation that is killed goes on where it was, with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import write_rows
from test_pipeline import chat, content, made_entries, run, texts

from data_prep.prepare import prepare
from recipes.load import load_recipe

KILLED = """
import os, signal, sys
from pathlib import Path
from data_prep import cache
from data_prep.prepare import prepare
from recipes.load import load_recipe

after, original = int(sys.argv[3]), cache.os.rename
def rename(*args):
    global after
    after -= 1
    if after < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args)
cache.os.rename = rename
prepare(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_preparation_goes_on_where_it_was(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Killed just before the entry after N others is put into its place, for every N: in each step of the work."""
    rows = [chat(t) for t in texts(300, low=30, high=60)]
    paths = [write_rows(tmp_path / f"{n}.jsonl", rows[n::2] + rows[:20]) for n in range(2)]
    steps = ["clean", "exact_dedup", "near_dedup", "decontaminate"]
    held = write_rows(tmp_path / "held.jsonl", rows[:5])
    data = {
        "train": [{"path": str(p), "limit": 2000} for p in paths],
        "eval": [{"path": str(held)}],
        "steps": steps,
        "too_long": "truncate",
    }
    whole = run(make_recipe, tmp_path / "whole" / "run", **data)
    expected, total = content(whole), len(list((tmp_path / "whole" / ".retort-cache").glob("*/*/*/statistics.json")))
    assert total == 7  # three sources, an index, three tokenised blocks
    for after in range(total):
        out = tmp_path / f"killed{after}" / "run"
        command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(out), str(after)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        done_before = made_entries(out.parent / ".retort-cache")
        again = prepare(load_recipe(tmp_path / "recipe.yaml"), out)
        assert content(again) == expected
        now = made_entries(out.parent / ".retort-cache")
        assert all(now[path] == when for path, when in done_before.items()), "finished work was redone"


KILLED_AT = """
import os, signal, sys
from pathlib import Path
import data_prep.prepare as stage
from data_prep import assemble, near_dup
from recipes.load import load_recipe

owner = {"near_dup": near_dup, "assemble": assemble, "stage": stage}[sys.argv[3]]
name, calls = sys.argv[4], int(sys.argv[5])
original = getattr(owner, name)
def until_then(*args, **options):
    global calls
    calls -= 1
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
setattr(owner, name, until_then)
stage.prepare(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def goes_on(recipe: Path, out: Path, expected: dict[str, bytes]) -> None:
    """What was killed ends in the same bytes, and finished work stands."""
    done_before = made_entries(out.parent / ".retort-cache")
    assert content(prepare(load_recipe(recipe), out)) == expected
    now = made_entries(out.parent / ".retort-cache")
    assert all(now[path] == when for path, when in done_before.items()), "finished work was redone"
    assert [path.name for path in out.iterdir()] == ["data"], "nothing half-made is left"


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [("near_dup", "sketch", 2), ("assemble", "_write_shards", 2), ("stage", "write_manifest", 1)]
)
def test_one_killed_inside_a_step_or_the_last_write_goes_on(
    where: tuple[str, str, int], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", [chat(t) for t in texts(60, seed=n)]) for n in range(2)]
    data = {"train": [{"path": str(p)} for p in paths], "eval": {"fraction": 0.1}, "steps": ["clean", "near_dedup"]}
    expected = content(run(make_recipe, tmp_path / "whole" / "run", **data))
    out = tmp_path / "killed" / "run"
    command = [sys.executable, "-c", KILLED_AT, str(tmp_path / "recipe.yaml"), str(out), *map(str, where)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    goes_on(tmp_path / "recipe.yaml", out, expected)


@pytest.mark.slow
def test_two_processes_killed_at_any_time_go_on(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    rows = [chat(t) for t in texts(1600, low=30, high=60)]
    paths = [write_rows(tmp_path / f"{n}.jsonl", rows[n::8]) for n in range(8)]
    data = {"train": [{"path": str(p)} for p in paths], "steps": ["clean", "exact_dedup", "near_dedup"]}
    expected = content(run(make_recipe, tmp_path / "whole" / "run", **data))
    out = tmp_path / "killed" / "run"
    code = KILLED_AT.split("owner =")[0] + "stage.prepare(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml"), str(out)]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "RETORT_WORKERS": "2"})
    entries, later = random.randrange(16), random.random() / 20
    while process.poll() is None and len(made_entries(out.parent / ".retort-cache")) < entries:
        time.sleep(0.005)
    time.sleep(later)
    with suppress(ProcessLookupError):  # it was quicker
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    goes_on(tmp_path / "recipe.yaml", out, expected)
