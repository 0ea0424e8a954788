"""How long the teacher's machine was held: a line in sessions.jsonl for every stretch of a session's time.

A session is one call of the stage that started the engine. Its lines add up: each tells the seconds and the calls since
the one before, so a session that is killed has told all but its last stretch, and machines that share the work write to
one file.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from recipes.errors import RetortError
from recipes.lineage import writing

SESSIONS = "sessions.jsonl"  # in teacher/
SHORTEST, LONGEST = 1.0, 60.0  # seconds of a stretch, and a tenth of the time so far between them


class Session:
    """One call of the stage, from where it is made until `close`: asking, filters, and scoring.

    Args:
        folder: teacher/.
        calls: how many requests the teacher was handed so far.
    """

    def __init__(self, folder: Path, engine: str, shard: tuple[int, int], calls: Callable[[], int]) -> None:
        self._path, self._calls = folder / SESSIONS, calls
        self._about = {
            "began": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "engine": engine,
            "shard": list(shard),
        }
        self._began = time.monotonic()
        self._told = (0.0, 0)  # seconds and calls that are in the file
        self._ended = threading.Event()
        self._teller: threading.Thread | None = None

    def start(self) -> None:
        """The engine starts: from here on there is something to pay for, and what came before belongs to it."""
        if self._teller is None:
            self._tell()
            self._teller = threading.Thread(target=self._go_on_telling, name="session", daemon=True)
            self._teller.start()

    def close(self) -> None:
        """Write the last stretch. A session whose engine was never started leaves nothing."""
        self._ended.set()
        if self._teller is not None:
            self._teller.join()
            self._teller = None
            self._tell()

    def _go_on_telling(self) -> None:
        while not self._ended.wait(min(LONGEST, max(SHORTEST, self._told[0] / 10))):
            try:
                self._tell()
            except RetortError:  # a full disk, say: the last line, in the caller's thread, says so
                continue

    def _tell(self) -> None:
        """One line more, in one write: shards on other machines add theirs to the same file."""
        seconds, calls = round(time.monotonic() - self._began, 3), self._calls()
        stretch = {"seconds": round(seconds - self._told[0], 3), "calls": calls - self._told[1]}
        with writing(self._path), self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({**self._about, **stretch}) + "\n")
        self._told = (seconds, calls)


def seconds_of(folder: Path) -> float:
    """Seconds of all sessions so far, those of several machines added up. A torn line is left out."""
    path = folder / SESSIONS
    found = 0.0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            found += float(json.loads(line)["seconds"])
        except (ValueError, TypeError, KeyError):
            continue
    return found
