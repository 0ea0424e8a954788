"""A run that is warned stops with a whole checkpoint and an exit code that says so, and goes on to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from conftest import ROOT, run_train, train_command
from test_resume import last_step
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.preempt import EXIT_CODE, MARK, SIGNALS, Preempted, Preemption

STEPS = 40
TRAIN = {
    "tokens_per_step": 256,
    "seq_len": 128,
    "learning_rate": 5e-3,
    "max_steps": STEPS,
    "save_every": 500,  # none but those that a warning causes
    "micro_batch": 2,
    "device": "cpu",
}


def warned(command: list[str], run: Path, number: int, at: int, one: Callable[[int], int] = int) -> tuple[str, int]:
    """Start a command and warn it at a step; returns what it said and its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with warm.start(command, run.parent, environment, merged=True) as process:
        deadline = time.monotonic() + 200
        while last_step(run) < at:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the step was never reached"
            time.sleep(0.005)
        os.kill(one(process.pid), number)
        said = process.communicate(timeout=100)[0]
        return said, process.returncode


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_warned_twice_and_going_on(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, run = make_recipe(train=TRAIN, adapter={"r": 4, "dropout": 0.1}), tmp_path / "run"
    stops = [0]
    for number in SIGNALS:
        said, code = warned(train_command(recipe), run, number, stops[-1] + 5)
        assert code == EXIT_CODE == 75, said
        mark = json.loads((run / MARK).read_text())
        step = mark["step"]
        assert stops[-1] + 5 <= step < STEPS and mark["signal"] == number
        assert f"preempted at step {step}; the same command goes on" in said and "Traceback" not in said
        assert (run / "checkpoints" / f"checkpoint-{step}" / "retort.json").is_file()
        assert last_step(run) == step and not (run / "manifest.json").exists()
        stops.append(step)
    done = run_train(recipe)
    assert done.returncode == 0 and f"resuming from checkpoint-{stops[-1]}" in done.stdout, done.stderr
    assert not (run / MARK).exists()
    whole = run_train(recipe, "--set", f"output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert adapter(run) == adapter(tmp_path / "whole")
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run, tmp_path / "whole")]
    losses = [[(entry["step"], entry["loss"]) for entry in map(json.loads, one)] for one in lines]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.mark.slow
def test_one_of_two_processes_is_warned_and_both_stop(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, run = make_recipe(train=TRAIN), tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "finetune" / "train.py"), str(recipe)]
    said, code = warned(command, run, signal.SIGUSR1, 4, second_process)
    assert code == 1, "torchrun's own"
    step = json.loads((run / MARK).read_text())["step"]
    assert f"preempted at step {step}; the same command goes on" in said
    assert "exitcode  : 75" in said and "SIGKILL" not in said, said
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert again.returncode == 0 and f"resuming from checkpoint-{step}" in again.stdout, again.stderr[-3000:]
    assert last_step(run) == STEPS and (run / "manifest.json").is_file()


def second_process(launcher: int) -> int:
    """The process of rank 1 that a launcher started."""
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) if folder.name.isdigit() else 0
            if parent == launcher and b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    pytest.fail("the launcher has no process of rank 1")


def test_stops_only_where_the_run_can_be_taken_up_again(tmp_path: Path) -> None:
    """Several updates on the same completions (every=2), and the last step."""
    preemption = Preemption(tmp_path, every=2)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state, control = TrainerState(max_steps=6), TrainerControl()
    before = [signal.getsignal(number) for number in SIGNALS]
    preemption.listen()
    try:
        state.global_step = 2
        preemption.on_step_end(args, state, control)
        assert not control.should_training_stop and preemption.warned is None
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        preemption.ignore()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert preemption.warned == signal.SIGUSR1
    for step, stops in ((3, False), (6, False), (4, True)):
        state.global_step = step
        preemption.on_step_end(args, state, control)
        assert (control.should_training_stop, control.should_save) == (stops, stops), step
    with pytest.raises(Preempted, match="preempted at step 4; the same command goes on") as raised:
        preemption.require(True)
    assert raised.value.exit_code == 75
    assert json.loads((tmp_path / MARK).read_text()) == {"step": 4, "signal": int(signal.SIGUSR1)}


def test_an_undisturbed_run_is_left_alone(tmp_path: Path) -> None:
    preemption = Preemption(tmp_path)
    preemption.require(True)
    assert not (tmp_path / MARK).exists()
