"""A run that was killed and resumed is the run that was never killed: the same bytes in the adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from conftest import run_cli, run_train, train_command

TRAIN = {
    "tokens_per_step": 256,
    "seq_len": 128,
    "learning_rate": 5e-3,
    "max_steps": 24,
    "save_every": 6,
    "micro_batch": 2,  # several micro-batches a step, so that a kill falls inside one
    "device": "cpu",
}


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def kill_when(recipe: Path, reached: Callable[[], bool], *options: str) -> str:
    """Start a training process and `kill -9` it as soon as `reached()`; fails if it ends by itself first.

    Returns what it printed until then.
    """
    with warm.start(train_command(recipe, *options), recipe.parent, merged=True) as process:
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the point to kill at was never reached"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        return process.communicate()[0]


def whole_and_killed(path: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of a recipe that saves every 6 of 24 steps: one left alone, one killed three times and resumed.

    The kills come before the first checkpoint, between two, and while the one of step 18 is written; the adapters must
    be the same bytes.
    """
    run, whole = tmp_path / "run", tmp_path / "whole"
    done = run_train(path, "--set", f"output={whole}")
    assert done.returncode == 0, done.stderr
    kill_when(path, lambda: last_step(run) >= 3)
    kill_when(path, lambda: last_step(run) >= 10)
    assert (run / "checkpoints" / "checkpoint-6").is_dir()
    kill_when(path, lambda: (run / "checkpoints" / "checkpoint-18").exists())
    (run / "checkpoints" / "checkpoint-18" / "retort.json").unlink(missing_ok=True)
    done = run_train(path, "--resume")
    assert done.returncode == 0 and "resuming from checkpoint-12" in done.stdout, done.stderr
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, run)]
    assert adapters[0] == adapters[1]
    return whole, run


@pytest.mark.slow
def test_killed_at_every_stage_gives_the_same_adapter(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(train=TRAIN, adapter={"r": 4, "dropout": 0.1})
    run = tmp_path / "run"
    done = run_train(recipe, "--set", f"output={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr

    kill_when(recipe, lambda: (run / "state.json").exists())  # in preparation
    assert not (run / "data" / "manifest.json").exists()
    printed = kill_when(recipe, lambda: (run / "masks.json").exists())  # while the base is loaded or measured
    assert "measured" not in printed and not (run / "base_answers.jsonl").exists()
    kill_when(recipe, lambda: last_step(run) >= 3)  # before the first checkpoint
    assert not (run / "manifest.json").exists()
    kill_when(recipe, lambda: last_step(run) >= 10)  # between two checkpoints, inside a step
    assert (run / "checkpoints" / "checkpoint-6").is_dir()
    kill_when(recipe, lambda: (run / "checkpoints" / "checkpoint-18").exists())  # while a checkpoint is written
    torn = run / "checkpoints" / "checkpoint-18"
    (torn / "retort.json").unlink(missing_ok=True)  # the kill may have come a moment too late to tear it
    (torn / "optimizer.pt").write_bytes(b"half")

    # While the result is saved and measured: all steps are done, and not one more may follow.
    printed = kill_when(recipe, lambda: (run / "adapter").exists(), "--resume")
    assert "checkpoint-18 is not whole" in printed and "resuming from checkpoint-12" in printed
    assert not (run / "manifest.json").exists()
    done = run_train(recipe, "--resume")
    assert done.returncode == 0 and "resuming from checkpoint-24" in done.stdout, done.stderr
    whole, resumed = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")
    )
    assert whole == resumed
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(s["step"], s["loss"], s["tokens_seen"]) for s in steps] == [
        (s["step"], s["loss"], s["tokens_seen"]) for s in reference
    ]
    results = [json.loads((tmp_path / n / "eval.json").read_text()) for n in ("whole", "run")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_changed_recipe_finished_run_and_second_process(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(train=TRAIN)
    run = tmp_path / "run"
    nothing = run_train(recipe, "--resume")
    assert nothing.returncode == 2 and "nothing to resume" in nothing.stderr
    kill_when(recipe, lambda: last_step(run) >= 7)

    changed = run_train(recipe, "--set", "train.learning_rate=1e-3", "--set", "seed=7")
    assert changed.returncode == 2
    assert "seed (42 -> 7), train.learning_rate (0.005 -> 0.001)" in changed.stderr and "--fresh" in changed.stderr
    assert "Traceback" not in changed.stderr
    described = run_train(recipe, "--set", "description=only words")  # no other run: it resumes
    assert described.returncode == 0 and "resuming from checkpoint-6" in described.stdout

    again = run_train(recipe)
    assert again.returncode == 0 and "holds the finished run" in again.stdout
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    other = run_train(recipe, "--set", "train.max_steps=2")
    assert other.returncode == 0 and "moved to" in other.stdout
    assert (tmp_path / "run.1" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_other_data_and_another_device_count_are_no_resumption(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe(train=TRAIN)
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    kill_when(recipe, lambda: last_step(run) >= 7)
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps({**plan, "world_size": 2}))
    spread = run_train(recipe)
    assert spread.returncode == 1 and "was begun on 2 x cpu, this is 1 x cpu" in spread.stderr
    (run / "plan.json").write_text(json.dumps(plan))
    before = rows.read_bytes()
    rows.write_bytes(before + before.splitlines(keepends=True)[0].replace(b"red", b"blue"))
    changed = run_train(recipe)
    assert changed.returncode == 2 and "rows.jsonl" in changed.stderr and "--fresh" in changed.stderr
    prepared = (run / "data" / "train-00000.parquet").read_bytes()
    by_hand = run_cli("prepare", str(recipe), cwd=tmp_path)
    assert by_hand.returncode == 4 and "is the data of a run, and would change" in by_hand.stderr
    assert (run / "data" / "train-00000.parquet").read_bytes() == prepared
    rows.write_bytes(before)
    assert run_train(recipe).returncode == 0


def test_a_run_directory_takes_one_process(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = run_train(make_recipe())
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith(f"error: {folder}: another process is at work in it")
    shutil.rmtree(folder)
