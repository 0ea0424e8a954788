"""`retort watch`: curves of a run's own files, finished, growing or not there yet."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from recipes.errors import RetortError
from scripts.watch import Lines, Tail, Watch, braille

LINE = {"epoch": 0.1, "loss": 2.0, "learning_rate": 1e-4, "tokens_per_second": 500.0, "memory_bytes": 3 * 2**30}


def write_lines(path: Path, lines: list[dict[str, Any]], mode: str = "w") -> None:
    with path.open(mode, encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def steps(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {"step": i, "seconds": 10.0 * i, "tokens_seen": 1000 * i, **LINE, "loss": 2.0 / i} for i in range(first, last)
    ]


def show(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "130"}
    command = [sys.executable, "-m", "scripts.cli", "watch", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_a_line_through_points_in_braille_dots() -> None:
    # Two columns of two dots, one row of four: a falling line has one dot in each column.
    assert braille([0, 1, 2, 3], [3, 2, 1, 0], 2, 1) == [chr(0x2800 + 0x01 + 0x10) + chr(0x2800 + 0x04 + 0x80)]
    rising = [[0, 0, 0x40 + 0x20, 0x02 + 0x08], [0x40 + 0x20, 0x02 + 0x08, 0, 0]]  # one dot in each of eight columns
    assert braille([0, 1], [0, 1], 4, 2) == ["".join(chr(0x2800 + bits) for bits in line) for line in rising]
    flat = braille([0, 5], [1.0, 1.0], 3, 1)
    assert flat == [chr(0x2800 + 0x02 + 0x10) * 3], "in the middle"
    assert braille([], [], 3, 2) == ["\u2800" * 3] * 2
    assert braille([0, 1], [float("nan"), 1.0], 1, 1) == [chr(0x2800 + 0x02)]


def test_a_file_is_read_as_it_grows_and_anew_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    write_lines(path, steps(1, 3))
    assert [line["step"] for line in tail.read()] == [1, 2]
    with path.open("a") as stream:
        stream.write('not json\n{"step": 3, "lo')
    assert [line["step"] for line in tail.read()] == [1, 2]
    with path.open("a") as stream:
        stream.write('ss": 0.5}\n')
    assert [line["step"] for line in tail.read()] == [1, 2, 3]
    write_lines(tmp_path / "fresh", steps(1, 2))  # a resumed run writes the lines that it keeps as a new file
    os.replace(tmp_path / "fresh", path)
    assert [line["step"] for line in tail.read()] == [1]
    write_lines(path, steps(2, 4), "a")
    assert [line["step"] for line in tail.read()] == [1, 2, 3]


def test_a_finished_run_is_shown_with_its_last_values(tmp_path: Path) -> None:
    measured = [{"step": 2, "eval_loss": 1.25}, {"step": 4, "eval_loss": 0.75}]
    more = [{**line, "reward": 0.1 * line["step"], "kl": 0.01} for line in steps(1, 5)]
    write_lines(tmp_path / "metrics.jsonl", [*more, *measured])
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 4, "estimated_bytes": 2**31}))
    (tmp_path / "manifest.json").write_text("{}")
    done = show(tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "step 4 of 4, loss 0.5000, 4,000 tokens in 40 s",
        "memory: peak 3.00 GiB, planned 2.00",
        "finished",
        "loss 0.5 nats/token",
        "held-out loss 0.75",
        "learning rate 0.0001",
        "tokens per second 500 tokens/s",
        "reward 0.4 points",
        "kl 0.01 nats/token",
        "step 4",
    ):
        assert words in done.stdout, words
    order = [done.stdout.index(name) for name in ("loss 0.5 nats", "held-out loss", "learning rate", "reward 0.4")]
    assert order == sorted(order) and " left" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 130


def test_a_run_under_way_tells_the_time_left(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", steps(1, 41))
    (tmp_path / "plan.json").write_text(json.dumps({"steps": 100}))
    assert "step 40 of 100" in (said := show(tmp_path, "--once").stdout)
    assert "about 10 min left" in said, "60 steps of 10 s"


def test_nothing_there_yet_is_one_line(tmp_path: Path) -> None:
    done = show(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to watch yet" in done.stdout.replace("\n", " ")
    missing = show(tmp_path / "none")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1 and "no such run directory" in missing.stderr
    with pytest.raises(RetortError):
        Watch(tmp_path / "none")


def test_the_teachers_progress_is_that_of_its_journal(tmp_path: Path) -> None:
    journal = tmp_path / "teacher" / "journal"
    journal.mkdir(parents=True)
    (tmp_path / "prompts").mkdir()
    asked = {"counts": {"train_rows": 50}, "recipe": {"teacher": {"samples": 2, "rounds": [{"write": "answer"}]}}}
    (tmp_path / "prompts" / "manifest.json").write_text(json.dumps(asked))
    (journal / "shard-00001-of-00002.jsonl").write_text("{}\n" * 10)
    watch = Watch(tmp_path)
    watch.look(now=0.0)
    assert watch.words() == ["teacher: 10 answers in the journal, 50 prompts x 2 samples"]
    (journal / "shard-00002-of-00002.jsonl").write_text("{}\n" * 20 + '{"half')
    watch.look(now=10.0)
    assert watch.words() == [
        "teacher: 30 answers in the journal, 50 prompts x 2 samples, 120 a minute, about 35 s left"
    ]
    (tmp_path / "teacher" / "manifest.json").write_text("{}")
    assert watch.words() == ["teacher: 30 answers in the journal, done"]
    counted = Lines(journal / "shard-00001-of-00002.jsonl")
    assert [counted.read(), counted.read()] == [10, 10]


def test_on_a_terminal_the_picture_follows_the_run_to_its_end(tmp_path: Path) -> None:
    """A real terminal: the program draws, draws again when lines come, and leaves when the manifest is there."""
    write_lines(tmp_path / "metrics.jsonl", steps(1, 4))
    outer, inner = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "LINES": "40", "TERM": "xterm"}
    command = [sys.executable, "-m", "scripts.cli", "watch", str(tmp_path)]
    program = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=env)
    os.close(inner)
    try:
        assert wait_for(outer, "step 3, loss 0.6667")
        write_lines(tmp_path / "metrics.jsonl", steps(4, 9), "a")
        assert wait_for(outer, "step 8, loss 0.2500")
        (tmp_path / "manifest.json").write_text("{}")
        assert wait_for(outer, "finished")
        assert program.wait(60) == 0
    finally:
        program.kill()
        os.close(outer)


def wait_for(terminal: int, words: str) -> bool:
    """Read a terminal until some words are there, for a minute at most."""
    seen, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                return words in seen.decode(errors="replace")
        if words in seen.decode(errors="replace"):
            return True
    return False
