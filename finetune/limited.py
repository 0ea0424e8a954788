"""Questions about texts of a model, answered by a process that is ended where one takes too long (reward_worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from finetune.reward_worker import SECONDS
from recipes.errors import EngineError

_ROOT = Path(__file__).resolve().parent.parent
# The root comes last in the path, so that nothing beside Retort can stand for a module of another package.
_START = f"import sys; sys.path.append({str(_ROOT)!r}); from finetune.reward_worker import main; main()"


class Limited:
    """One kind of question; its process starts with the first one, and again after one that it could not bear.

    Args:
        kind, options: of `reward_worker.KINDS`; the options are plain JSON values.
        remedy: what to do where the process does not start.
    """

    def __init__(self, kind: str, options: Any = None, remedy: str | None = None) -> None:
        self.kind, self.options, self.remedy = kind, options, remedy
        self.told = False
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, *question: str) -> bool:
        """The answer; False, which is said once, where it would take more time or memory than there is.

        Raises:
            EngineError: the process does not start.
        """
        with self._lock:
            worker = self._started()
            try:
                worker.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]
                worker.stdin.flush()  # type: ignore[union-attr]
                reply = worker.stdout.readline()  # type: ignore[union-attr]
            except OSError:
                reply = ""
            if not reply:
                _end(worker)
                self._worker = None
                if not self.told:
                    print(f"the reward {self.kind}: what takes over {SECONDS:g} s to check counts as wrong")
                    self.told = True
            return reply.strip() == "true"

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None:
            # The texts are a model's: what parses them gets no token that may stand in the environment.
            env = {key: value for key, value in os.environ.items() if key in {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH"}}
            self._worker = worker = subprocess.Popen(
                [sys.executable, "-P", "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=env,
            )
            weakref.finalize(self, _end, worker)
            with contextlib.suppress(OSError):
                worker.stdin.write(json.dumps([self.kind, self.options]) + "\n")  # type: ignore[union-attr]
                worker.stdin.flush()  # type: ignore[union-attr]
            if worker.stdout.readline() != "ready\n":  # type: ignore[union-attr]
                _end(worker)
                self._worker = None
                raise EngineError(f"the process of the reward {self.kind} does not start", None, self.remedy)
        return self._worker


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    with contextlib.suppress(OSError), worker:  # closes its pipes and waits
        pass
