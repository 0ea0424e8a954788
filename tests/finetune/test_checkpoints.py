"""Checkpoints: whole or not at all, verified before they are used, kept by count and by metric, copied elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_train

from finetune.callbacks import Seal, copy_off, newest_complete
from recipes.errors import RetortError


def save(run: Path, step: int, seal: Seal) -> Path:
    """What the trainer does at a save: it writes files, then the callback runs."""
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes([step]) * 5000)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    everyone = SimpleNamespace(wait_for_everyone=lambda: None)
    args = SimpleNamespace(output_dir=str(run / "checkpoints"), distributed_state=everyone)
    seal.on_save(args, SimpleNamespace(is_world_process_zero=True, global_step=step), None)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, at: int = 1234) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_torn_a_flipped_and_an_unsealed_checkpoint_fall_back(tmp_path: Path) -> None:
    seal = Seal(keep=9)
    saved = [save(tmp_path, step, seal) for step in (1, 2, 3, 4, 5)]
    assert newest_complete(tmp_path / "checkpoints") == (saved[4], [])
    (saved[4] / "retort.json").unlink()  # killed before the seal
    flip(saved[3] / "optimizer.pt")  # one bit, same size
    (saved[2] / "optimizer.pt").write_bytes(b"half")
    assert newest_complete(tmp_path / "checkpoints") == (saved[1], [saved[4], saved[3], saved[2]])
    (saved[1] / "trainer_state.json").unlink()
    (saved[0] / "retort.json").write_text("{")
    assert newest_complete(tmp_path / "checkpoints") == (None, list(reversed(saved)))


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    seal = Seal(keep=2)
    lines = [{"step": 1, "loss": 2.0, "kept": True}, {"step": 2, "loss": 1.0, "kept": True}]
    for step in (1, 2):
        save(tmp_path, step, seal)
    (tmp_path / "watched.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (3, 4, 5):
        save(tmp_path, step, seal)
    assert names(tmp_path / "checkpoints") == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    with (tmp_path / "watched.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 5, "loss": 0.5, "kept": True}) + "\n" + '{"step": 6, "torn')
    save(tmp_path, 6, seal)
    assert names(tmp_path / "checkpoints") == ["checkpoint-5", "checkpoint-6"]


def test_sealed_checkpoints_are_copied_off_while_training_goes_on(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "other" / "disk"
    seal = Seal(keep=2, copy_to=away)
    for step in (1, 2, 3):
        save(run, step, seal)
    seal.on_train_end(None, None, None)
    assert names(away) == names(run / "checkpoints") == ["checkpoint-2", "checkpoint-3"]
    assert newest_complete(away)[0] == away / "checkpoint-3"
    copied = (away / "checkpoint-3" / "optimizer.pt").read_bytes()
    assert copied == (run / "checkpoints" / "checkpoint-3" / "optimizer.pt").read_bytes()


def test_a_copy_is_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    away, seal = tmp_path / "away", Seal(keep=9)
    saved = save(tmp_path / "run", 1, seal)
    flip(saved / "optimizer.pt")
    with pytest.raises(RetortError, match="differs from the original"):
        copy_off(saved, away)
    assert names(away) == []
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    seal = Seal(keep=9, copy_to=blocked)  # a copy that cannot be made is no reason to stop
    save(tmp_path / "run", 2, seal)
    seal.on_train_end(None, None, None)
    assert "warning: checkpoint-2 was not copied" in capsys.readouterr().out
    assert newest_complete(tmp_path / "run" / "checkpoints")[0] == tmp_path / "run" / "checkpoints" / "checkpoint-2"


@pytest.mark.slow
def test_a_flipped_bit_costs_one_checkpoint_and_changes_nothing(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    train: dict[str, Any] = {"tokens_per_step": 256, "seq_len": 128, "learning_rate": 5e-3, "max_steps": 8}
    path = make_recipe(train={**train, "save_every": 2, "micro_batch": 4, "device": "cpu"})
    run = tmp_path / "run"
    done = run_train(path)
    assert done.returncode == 0, done.stderr
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for leftover in ("manifest.json", "eval.json"):
        (run / leftover).unlink()  # as if it had been stopped after its last checkpoint
    newest, torn = newest_complete(run / "checkpoints")
    assert newest is not None and newest.name == "checkpoint-8" and torn == []
    flip(newest / "optimizer.pt", 3000)
    done = run_train(path)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-8 is not whole" in done.stdout and "resuming from checkpoint-6" in done.stdout
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
