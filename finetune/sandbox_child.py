"""The processes in which an answer's code and its tests run; sandbox.py starts them.

    supervisor --- forks ---> answer   holds the answer's code, serves calls; never sees a test
               \\- forks ---> tests    holds the tests, calls the answer through a pipe; alone reports verdicts

Both give up every right before they read a line that somebody else wrote.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.machinery
import json
import os
import signal
import symtable
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

from finetune.sandbox_lock import lock_down
from finetune.sandbox_wire import Refused, Side

# What an answer or a test may import. They are loaded beforehand, since no file can be opened later.
MODULES = (
    "__future__", "abc", "array", "bisect", "calendar", "cmath", "collections", "collections.abc", "copy",
    "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "json",
    "math", "numbers", "operator", "random", "re", "statistics", "string", "textwrap", "time", "types", "typing",
    "unicodedata",
)  # fmt: skip


def serve(side: Side, code: str) -> None:
    """The answer's process: run the code, then whatever the tests ask of it."""
    module = types.ModuleType("answer")  # not __main__: a script's main part would not find its arguments
    sys.modules["answer"] = module  # dataclasses look their module up
    side.operations["get"] = vars(module).__getitem__
    side.operations["run"] = lambda text: exec(compile(text, "<answer>", "exec", dont_inherit=True), vars(module))
    side.answer("run", [code], {})
    while True:
        side.answer(*side.receive())


def judge(side: Side, tests: list[str], verdict: int) -> None:
    """The tests' process: run each, and report one sign for it."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    bound = set(dir(builtins))  # the answer must not bring an `abs` or `set` of its own
    for number, test in enumerate(tests, 1):
        try:
            os.write(verdict, b"+" if _passes(side, test, namespace, bound) else b"-")
        except Refused as error:
            os.write(verdict, f"?test {number} {error}".encode(errors="replace"))
            return


def _passes(side: Side, test: str, namespace: dict[str, Any], bound: set[str]) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(test)))
        borrowed = _borrowed(symtable.symtable(test, "<test>", "exec"), bound)
        opened = _opened(nodes)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(f"is no Python: {error}") from None
    for node in nodes:
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if missing := [name for name in names if name not in sys.modules]:
            raise Refused(f"imports {missing[0]}, which is not there")
    try:
        for name in sorted(borrowed):
            if name in opened:  # `math` is Python's, whatever the answer calls so
                namespace[name] = sys.modules[name]
                continue
            namespace.pop(name, None)
            with contextlib.suppress(KeyError):
                namespace[name] = side.ask("get", name)
        exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
    except Refused:
        raise
    except BaseException:
        return False
    return not side.lost


def taken(tests: Sequence[str]) -> set[str]:
    """The names that tests take from the answer: those that neither they, up to there, nor Python define.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: a test is no Python.
    """
    bound, found = set(dir(builtins)), set()
    for test in tests:
        borrowed = _borrowed(symtable.symtable(test, "<test>", "exec"), bound)
        found |= borrowed - _opened(list(ast.walk(ast.parse(test))))
    return found


def _opened(nodes: list[ast.AST]) -> set[str]:
    """Modules of Python whose attributes a test uses, imported or not."""
    names = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    return names & set(MODULES)


def _borrowed(top: symtable.SymbolTable, bound: set[str]) -> set[str]:
    """Global names that a test uses and neither the tests so far nor Python define; adds to `bound` what it defines."""
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                bound |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    return used - bound


def main() -> None:
    """The supervisor: start both processes, end them when the tests are done or time is up, leave none behind.

    Its arguments: the numbers of two open files, with the answer's code and with a JSON list of tests (it reads
    neither, since the answer's process would inherit what it knows); seconds of processor time for either process, and
    three times as many by the clock; MiB of address space.
    """
    code, tests, memory_mb = (int(sys.argv[index]) for index in (1, 2, 4))
    seconds = float(sys.argv[3])
    sys.modules["_hashlib"] = None  # type: ignore[assignment] # OpenSSL is slow to load, and Python has its own
    for name in MODULES:
        importlib.import_module(name)
    sys.meta_path.remove(importlib.machinery.PathFinder)  # what is not loaded now is not there
    ask_read, ask_write = os.pipe()
    reply_read, reply_write = os.pipe()
    parent, verdict = os.getpid(), os.dup(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])

    def answer() -> None:
        side = Side(ask_read, reply_write, tests=False)
        try:
            lock_down({code, ask_read, reply_write}, seconds, memory_mb, parent)
        except OSError as error:
            side.send(str(error))
            return
        side.send("")
        serve(side, _read(code))

    def test() -> None:
        side = Side(reply_read, ask_write, tests=True)
        try:
            lock_down({tests, verdict, ask_write, reply_read}, seconds, memory_mb, parent)
            problem = side.receive()
        except OSError as error:
            problem = str(error)
        if problem:
            os.write(verdict, f"!{problem}".encode())
            return
        os.write(verdict, b"@")
        if side.receive()[0] == "value":
            judge(side, json.loads(_read(tests)), verdict)

    judging, answering = _fork(test), _fork(answer)
    for end_of_pipe in (ask_read, ask_write, reply_read, reply_write):  # either must see it when the other dies
        os.close(end_of_pipe)
    end = time.monotonic() + 3 * seconds
    while not (done := os.waitpid(judging, os.WNOHANG)[0]) and (left := end - time.monotonic()) > 0:
        signal.sigtimedwait([signal.SIGCHLD], left)
    for child in [answering] if done else [judging, answering]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def _read(number: int) -> str:
    parts = []
    while part := os.read(number, 2**20):
        parts.append(part)
    os.close(number)
    return b"".join(parts).decode()
