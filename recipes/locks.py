"""The sole right to a file or folder, which the system takes back when the process ends, however it ends."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO, Any

from recipes.errors import RetortError
from recipes.lineage import writing


def hold(lock: Path, what: Path, busy: str, remedy: str) -> IO[Any]:
    """Take the lock; closing the stream gives it back. On a file system without locks it is only a stream.

    Args:
        lock: the file that the lock lies on; made with its folder.
        what: what it guards, for messages. busy, remedy: what to say where another process has it.

    Raises:
        RetortError: another process has it, or the file cannot be made.
    """
    with writing(what):
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise RetortError(busy, str(what), remedy) from None
    except OSError:
        pass  # a file system without locks
    return stream
