"""What a person sees while a run trains: plain lines in a log, a bar on a terminal, with the same numbers."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.callbacks import Metrics, Progress

SAID = r"loss 1\.\d{4}(  reward accuracy 0\.750)?  [\d,]+ tokens/s  \d+\.\d GiB"


def train(folder: Path, steps: int, first: int = 0) -> None:
    """The callbacks of a run, told of so many steps of 1,000 tokens."""
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.counter = lambda: 1000 * state.global_step  # type: ignore[assignment]
    shown = Progress(metrics)
    state = SimpleNamespace(is_world_process_zero=True, global_step=first, max_steps=steps, epoch=0.5)
    for callback in (metrics, shown):
        callback.on_train_begin(None, state, None)
    for step in range(first + 1, steps + 1):
        state.global_step = step
        for callback in (metrics, shown):
            callback.on_log(None, state, None, {"loss": 1.0 + 1 / step, "rewards/accuracies": 0.75})
    shown.on_train_end(None, state, None)


def test_plain_lines_say_loss_speed_memory_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 80, first=10)
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.findall(r"step (\d+)/80", line)[0]) for line in lines] == [11, *range(12, 81, 2)]
    for line in lines:
        assert re.fullmatch(rf"step \d+/80  {SAID}  about \d+ s left", line), line
    assert float(lines[-1].split(" tokens/s")[0].split()[-1].replace(",", "")) > 0
    assert " 0.0 GiB" not in lines[-1], "this process's own memory"


def test_a_bar_on_a_terminal_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = pty.openpty()
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with io.TextIOWrapper(os.fdopen(inner, "wb", 0), write_through=True) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train(tmp_path, 3)
        monkeypatch.undo()
        shown = b""
        while select.select([outer], [], [], 0.2)[0]:
            shown += os.read(outer, 65536)
    os.close(outer)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert re.search(rf"training .* 3/3 *{SAID} *\d:\d\d:\d\d", plain.replace("\r", "\n")), plain
