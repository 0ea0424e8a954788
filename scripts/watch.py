"""`retort watch RUN_DIR [--once]`: the curves of a run in the terminal, drawn again as its files grow.

It only reads: metrics.jsonl, the plan, and while a teacher works its journal. It needs no connection to the process
that writes them, so it works for a job on another node that shares the disk.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.journal import JOURNAL
from finetune.series import SERIES
from recipes.errors import RetortError
from recipes.lineage import read_object
from recipes.student import PROMPTS, TEACHER

EVERY = 2.0  # seconds between looks at the files
RECENT = 20  # log lines that the speed is taken from
HEIGHT = 6  # lines of a plot
WIDTH = 58  # columns of a panel; as many stand side by side as fit
FIRST = ("loss", "eval_loss", "learning_rate", "tokens_per_second", "mfu", "reward", "kl", "reward_accuracy")
UNPLOTTED = {"step", "epoch", "seconds", "tokens_seen", "memory_bytes", "grad_norm"}
# The dots of a braille character by row and column: U+2800 plus these bits.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class Tail:
    """The JSON lines of a file that grows; a line without its end is left for later, a file begun anew is read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._offset, self._inode = 0, -1

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        try:
            with self.path.open("rb") as stream:
                stat = self.path.stat()
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self.lines, self._offset, self._inode = [], 0, stat.st_ino
                stream.seek(self._offset)
                whole, _, _ = stream.read().rpartition(b"\n")
        except OSError:
            return self.lines
        if whole:
            self._offset += len(whole) + 1
            self.lines += [line for text in whole.split(b"\n") if (line := _line(text)) is not None]
        return self.lines


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


class Lines:
    """How many whole lines a growing file has."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self._offset = path, 0, 0

    def read(self) -> int:
        with self.path.open("rb") as stream:
            if self.path.stat().st_size < self._offset:
                self.count = self._offset = 0
            stream.seek(self._offset)
            while block := stream.read(1 << 20):
                self.count += block.count(b"\n")
                self._offset += len(block)
        return self.count


def braille(xs: Sequence[float], ys: Sequence[float], width: int, height: int) -> list[str]:
    """A line through points as text, `height` lines of `width` characters with 2 x 4 dots in each.

    Args:
        xs: rising; not finite values of `ys` are left out. A flat line lies in the middle.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    cells = [[0] * width for _ in range(height)]
    if points:
        columns, rows = 2 * width - 1, 4 * height - 1
        left, right = points[0][0], points[-1][0]
        low, high = min(y for _, y in points), max(y for _, y in points)
        before: tuple[int, int] | None = None
        for x, y in points:
            column = round((x - left) / (right - left) * columns) if right > left else columns // 2
            row = round((high - y) / (high - low) * rows) if high > low else rows // 2
            for c, r in _between(before, (column, row)):
                cells[r // 4][c // 2] |= _DOTS[r % 4][c % 2]
            before = (column, row)
    return ["".join(chr(0x2800 + bits) for bits in line) for line in cells]


def _between(start: tuple[int, int] | None, end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line, `start` left out."""
    if start is None:
        return [end]
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        tuple(round(a + (b - a) * i / steps) for a, b in zip(start, end, strict=True))  # type: ignore[misc]
        for i in range(1, steps + 1)
    ]


@dataclass
class Watch:
    """What is known of a run, read anew by `look`.

    Attributes:
        asked: answers that the journal holds by the time they were counted; the speed is taken from them.
    """

    folder: Path
    tail: Tail = field(init=False)
    journals: dict[Path, Lines] = field(default_factory=dict)
    asked: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise RetortError("there is no such run directory", str(self.folder), "name the folder of a run")
        self.tail = Tail(self.folder / "metrics.jsonl")

    @property
    def finished(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    def series(self) -> dict[str, tuple[list[float], list[float]]]:
        """Steps and values of what is worth a curve, the most looked at first."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for line in self.tail.lines:
            for name, value in line.items():
                if name not in UNPLOTTED and isinstance(value, int | float):
                    xs, ys = found.setdefault(name, ([], []))
                    xs.append(line["step"])
                    ys.append(float(value))
        known = {name: i for i, name in enumerate(FIRST)}
        return dict(sorted(found.items(), key=lambda item: known.get(item[0], len(FIRST))))

    def look(self, now: float | None = None) -> None:
        """Read what was added to the files."""
        self.tail.read()
        for path in (self.folder / TEACHER / JOURNAL).glob("*.jsonl"):
            self.journals.setdefault(path, Lines(path))
        total = sum(lines.read() for path, lines in self.journals.items() if path.is_file())
        self.asked = [*self.asked[-RECENT:], (time.monotonic() if now is None else now, total)]

    def words(self) -> list[str]:
        """What there is to say beside the curves."""
        said = [line for line in (self._training(), self._memory(), self._teacher()) if line]
        if self.finished:
            said.append("finished")
        return said

    def _training(self) -> str:
        steps = [line for line in self.tail.lines if "loss" in line]
        if not steps:
            return ""
        last = steps[-1]
        total = read_object(self.folder / "plan.json").get("steps")
        words = [f"step {last['step']}{f' of {total}' if total else ''}", f"loss {last['loss']:.4f}"]
        recent = steps[-RECENT:]
        done, took = last["step"] - recent[0]["step"], last.get("seconds", 0.0) - recent[0].get("seconds", 0.0)
        if total and done > 0 and last["step"] < total and not self.finished:
            words.append(f"about {_duration(took / done * (total - last['step']))} left")
        words.append(f"{last.get('tokens_seen', 0):,} tokens in {_duration(last.get('seconds', 0.0))}")
        age = time.time() - self.tail.path.stat().st_mtime if self.tail.path.is_file() else 0.0
        if not self.finished and age > 60:
            words.append(f"nothing new for {_duration(age)}")
        return ", ".join(words)

    def _memory(self) -> str:
        took = [line["memory_bytes"] for line in self.tail.lines if line.get("memory_bytes")]
        planned = read_object(self.folder / "plan.json").get("estimated_bytes")
        words = [f"peak {took[-1] / 2**30:.2f} GiB"] if took else []
        words += [f"planned {planned / 2**30:.2f}"] if planned else []
        return f"memory: {', '.join(words)}" if words else ""

    def _teacher(self) -> str:
        if not self.journals:
            return ""
        count = self.asked[-1][1] if self.asked else 0
        prompts = read_object(self.folder / PROMPTS / "manifest.json")
        rows = (prompts.get("counts") or {}).get("train_rows")
        samples = ((prompts.get("recipe") or {}).get("teacher") or {}).get("samples")
        rounds = len(((prompts.get("recipe") or {}).get("teacher") or {}).get("rounds") or ()) or 1
        words = [f"teacher: {count:,} answers in the journal"]
        done = (self.folder / TEACHER / "manifest.json").is_file()
        if done:
            return f"{words[0]}, done"
        if rows and samples:
            words.append(f"{rows:,} prompts x {samples} samples{f' in {rounds} rounds' if rounds > 1 else ''}")
        (then, before), (now, after) = self.asked[0], self.asked[-1]
        if after > before and now > then:
            rate = (after - before) / (now - then)
            words.append(f"{rate * 60:,.0f} a minute")
            if rows and samples and rounds == 1 and rows * samples > after:
                words.append(f"about {_duration((rows * samples - after) / rate)} left")
        return ", ".join(words)


def picture(watch: Watch, width: int) -> Any:
    """The whole picture for rich; one line where there is nothing to see yet."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    said, series = watch.words(), watch.series()
    if not said and not series:
        return Text(f"{watch.folder}: nothing to watch yet (no metrics.jsonl, no journal)")
    columns = min(WIDTH, max(24, width))
    plots = [
        Panel(Text(_plot(xs, ys, columns - 4), no_wrap=True), title=_title(name, ys), width=columns, title_align="left")
        for name, (xs, ys) in series.items()
    ]
    head = Text("\n".join([str(watch.folder), *said]))
    return Group(head, Columns(plots, padding=(0, 0))) if plots else head


def _title(name: str, ys: Sequence[float]) -> str:
    unit = SERIES[name][1] if name in SERIES and SERIES[name][1] != "1" else ""
    words = f"{name.replace('eval_', 'held-out ').replace('_', ' ')} {_number(ys[-1])}"
    return f"{words} {unit}".strip().replace("[", "\\[")


def _plot(xs: Sequence[float], ys: Sequence[float], width: int) -> str:
    """A curve with its ends named: the highest and lowest value at the left, the steps below."""
    finite = [y for y in ys if math.isfinite(y)] or [0.0]
    marks = [_number(max(finite)), _number(min(finite))]
    room = max(map(len, marks))
    lines = braille(xs, ys, width - room - 1, HEIGHT)
    labels = [marks[0], *[""] * (HEIGHT - 2), marks[1]]
    body = [f"{label:>{room}} {line}" for label, line in zip(labels, lines, strict=True)]
    first, last = f"{xs[0]:g}", f"step {xs[-1]:g}"
    return "\n".join([*body, f"{'':>{room}} {first}{last:>{width - room - 1 - len(first)}}"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def watch_run(folder: Path, once: bool = False) -> None:
    """Show a run until it is finished or the user has seen enough (Ctrl-C); once where stdout is no terminal.

    Raises:
        RetortError: there is no such folder.
    """
    from rich.console import Console
    from rich.live import Live

    console, watch = Console(), Watch(folder)
    watch.look()
    if not once and console.is_terminal and not watch.finished:
        try:
            with Live(picture(watch, console.width), console=console, screen=True, auto_refresh=False) as live:
                while not watch.finished:
                    time.sleep(EVERY)
                    watch.look()
                    live.update(picture(watch, console.width), refresh=True)
        except KeyboardInterrupt:
            pass  # the last picture stays on the terminal
    console.print(picture(watch, console.width))
