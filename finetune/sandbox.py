"""Running code that a model wrote against tests, with nothing at stake: not the machine, and not the verdict.

Per answer a supervisor forks two processes (sandbox_child.py). One holds the answer's code and has never seen a test;
the other holds the tests and calls the answer's functions through a pipe (sandbox_wire.py). Both run under

- a seccomp filter (sandbox_lock.py) that admits some twenty system calls, those of computing with memory: no file,
  socket, process, signal, sleep or timer can be had, whatever library the code gets hold of; what is open is a pipe
  and /dev/null;
- limits on processor time, time by the clock, address space, and no core, file or process; an empty environment; a
  session of its own, all of which is ended and waited for before `run_tests` returns.

Why two processes. In one, an answer can reach the tests (frames, gc, memory), can make `==` true (a class of its own,
another `abs`), and can end the process with a good exit code. Here it can do what it likes with its own process: the
assertions are evaluated in the other one, over exact built-in values rebuilt from JSON, and only that one holds the
verdict. So what an answer can forge is what its functions return or raise for the arguments that they are given, and
what they change in lists and the like that they are given, which is what the tests test. Objects of the answer's own
classes stay with it; the tests may use their attributes, methods, length, items and text. Their equality is identity,
order and isinstance they have none, and `abs`, `len`, `math` are always Python's.

Names that the tests use and nobody defines are taken from the answer: the reward `code` lets that be only what answers
are asked for (rewards.py), for a missing helper of the tests would be the answer's own judge.

What this does not protect against: a kernel bug within those system calls; tests whose expectations stand in the
prompt, that work them out by calling the answer (`decode(encode(x)) == x`) or that any object satisfies (`f() != 3`); a
function under test that is called like a built-in one, for the tests then test the built-in; an answer that uses up
its time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.sandbox_lock import SYSCALLS
from recipes.errors import DataError, EngineError

_ROOT = Path(__file__).resolve().parent.parent
# The root comes last in the path, so that nothing beside Retort can stand for a module of the standard library.
_START = f"import sys; sys.path.append({str(_ROOT)!r}); from finetune.sandbox_child import main; main()"
_REMEDY = "the reward `code` needs Linux with seccomp on x86_64 or aarch64; leave it out"


def run_tests(code: str, tests: Sequence[str], seconds: float, memory_mb: int) -> float:
    """Share of the tests that the code passes; 0 where it does not run at all.

    Args:
        code: Python of an answer. It may import what `sandbox_child.MODULES` names.
        tests: each Python that raises where the code is wrong. They share one namespace, in their order.
        seconds: of processor time, for all tests together; by the clock, three times as long. Tests that were not
            reached, or that follow one that ended the code's process, count as failed.
        memory_mb: address space of either process, in MiB.

    Raises:
        DataError: a test that cannot be run whatever the code is.
        EngineError: this machine cannot give the protection.
    """
    if not tests:
        raise ValueError("there are no tests")
    if not sys.platform.startswith("linux") or os.uname().machine not in SYSCALLS:
        raise EngineError("there is no sandbox for this kind of machine", None, _REMEDY)
    output, errors = _run(code, tests, seconds, memory_mb)
    if not output.startswith("@"):
        why = output.removeprefix("!") or errors or "its processes ended at once"
        raise EngineError(f"the sandbox does not start: {why}", None, _REMEDY)
    signs, _, refusal = output[1:].partition("?")
    if refusal:
        raise DataError(refusal)
    return signs.count("+") / len(tests)


def _run(code: str, tests: Sequence[str], seconds: float, memory_mb: int) -> tuple[str, str]:
    """What the tests' process reports, and the last line that the supervisor complained in."""
    code_file, tests_file = _in_memory(code), _in_memory(json.dumps(list(tests)))
    arguments = (code_file, tests_file, seconds, memory_mb)
    try:
        process = subprocess.Popen(
            # -P -s -S: nothing of this folder and of the installation beyond the standard library is in the path.
            [sys.executable, "-P", "-s", "-S", "-B", "-c", _START, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(code_file, tests_file),
            env={"PYTHONHASHSEED": "0"},  # the same code gets the same reward, sets included
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(code_file)
        os.close(tests_file)
    try:
        output, errors = process.communicate(timeout=3 * seconds + 60)
    except subprocess.TimeoutExpired:
        raise EngineError("the sandbox's supervisor does not end") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return output.decode(errors="replace"), (errors.decode(errors="replace").strip().splitlines() or [""])[-1]


def _in_memory(text: str) -> int:
    """An open file that no folder knows. Unlike a pipe it takes any text at once."""
    number = os.memfd_create("retort")
    with open(number, "wb", closefd=False) as stream:
        stream.write(text.encode(errors="replace"))
    os.lseek(number, 0, os.SEEK_SET)
    return number
