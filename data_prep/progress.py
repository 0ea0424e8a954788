"""A progress bar for long work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with a progress bar on a terminal; without one elsewhere, on other ranks, and for a single item."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not console.is_terminal or total < 2 or os.environ.get("RANK", "0") != "0"
    yield from track(items, what, total, console=console, disable=quiet, transient=True)
