"""How far the teacher is: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

EVERY = 30.0  # seconds between lines of a log


class Meter:
    """Counts answers and their tokens.

    Args:
        what: what is counted, in words.
        total: answers that are wanted.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None]) -> None:
        self.what, self.total, self.say = what, total, say
        self.done = self.tokens = 0
        self.began = self.spoke = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal and self.total > 1:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=console, transient=True)
            self.bar.add_task(self.what, total=self.total, rate="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, tokens: int) -> None:
        """One answer more, of so many tokens."""
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        rate = self.tokens / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=1, rate=f"{rate:,.0f} tokens/s")
        elif now - self.spoke > EVERY:
            self.spoke = now
            left = (now - self.began) / self.done * (self.total - self.done)
            how_far = f"{self.done:,} of {self.total:,}, {rate:,.0f} tokens/s, about {left / 60:.0f} min left"
            self.say(f"{self.what}: {how_far}")
