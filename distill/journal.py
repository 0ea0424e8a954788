"""The journal: every answer of the teacher, on disk before anything is done with it.

It stands between the engine and everything else. A run that is killed has lost no answer that anyone has seen, and asks
for none of them again. Each machine appends to a file of its own, and all files of the folder are read, so the work of
several machines is put together by copying their files into one folder.

What a crash cut short is cut off by the file's next writer. A line that was damaged later is set aside and counted, and
its answer is asked for again. What a line is, journal_files.py says.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from distill.journal_files import Paid, Records, aside, encode, repair, sync_folder
from distill.teachers import Completion, Request, Teacher
from recipes.errors import EngineError, RetortError
from recipes.lineage import cannot_write, writing
from recipes.locks import hold

JOURNAL = "journal"  # folder inside a run's teacher/
AHEAD = 256  # answers that the engine may be ahead of the disk
PATIENCE = 10.0  # seconds that an engine is waited for when nobody wants its answers any more


class Journal:
    """One machine's access to the journal: reads every file of the folder, and alone appends to its own.

    An answer that was cut counts as missing once a longer one is wanted. Where a key has several answers the whole one
    is taken before the cut one, then the one with the larger limit, then the one that stands first (by name of the
    file, and in it).

    Args:
        folder: where the files are; made when it is not there.
        shard: which part of how many this machine works on, from 1; names its file.
        patience: seconds to wait for the engine's next answer after the consumer left. An engine that takes longer is
            left behind in its thread, which ends with the process.

    Attributes:
        calls_made: requests handed to the teacher. from_journal: requests answered without it.
        damaged: lines that could not be trusted. ignored: answers nobody asked for, or a second time.
        notes: what happened to the files, to be printed.

    Raises:
        RetortError: another process writes to this machine's file, or it cannot be written.
        DataError: a file cannot be read, or another version of Retort wrote it.
    """

    def __init__(self, folder: Path, shard: tuple[int, int] = (1, 1), patience: float = PATIENCE) -> None:
        number, of = shard
        if not 1 <= number <= of:
            raise ValueError(f"there is no shard {number} of {of}")
        self.path = folder / f"shard-{number:05}-of-{of:05}.jsonl"
        self.calls_made = self.from_journal = self.ignored = 0
        self.notes: list[str] = []
        self._patience = patience
        self._pump: _Pump | None = None
        self._failed = False
        with ExitStack() as held:  # given back in close(), or at once when opening fails
            # It lies on a file beside it, since a repair puts another file in its place.
            lock = self.path.with_name(f"{self.path.name}.lock")
            held.enter_context(
                hold(lock, self.path, "another process writes to it", "wait for it, or take another shard")
            )
            self._stream, moved = self._open()
            held.callback(os.close, self._stream)
            self._records = Records(folder)
            held.callback(self._records.close)
            self._held = held.pop_all()
        self._size = os.fstat(self._stream).st_size
        self._own = self._records.number_of(self.path)
        self.damaged = moved + sum(self._records.damaged.values())
        self.notes += [_note(name, n, "were left out") for name, n in self._records.damaged.items()]

    def _open(self) -> tuple[int, int]:
        """This machine's file, in order and ready for appending (a descriptor), and how many lines were set aside."""
        with writing(self.path):
            moved, torn = repair(self.path) if self.path.exists() else (0, 0)
            stream = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            with suppress(OSError):  # a file system that syncs no folders
                sync_folder(self.path.parent)
        if moved:
            self.notes.append(_note(self.path.name, moved, f"were moved to {aside(self.path).name}"))
        if torn:
            self.notes.append(f"{self.path.name}: an unfinished last line ({torn} bytes) was cut off")
        return stream, moved

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop a run under way, write what was received, and let others write to the file."""
        try:
            if self._pump is not None:
                self._end(self._pump)
        finally:
            self._held.close()

    @property
    def paid(self) -> Paid:
        """What all answers on record took."""
        return self._records.paid

    def get(self, key: str, max_tokens: int) -> Completion | None:
        """The answer on record, unless it was cut under a smaller limit than is wanted now."""
        return self._records.get(key, max_tokens)

    def add(self, completions: Sequence[Completion]) -> None:
        """Append answers. They are on the disk when it returns; one that is there already, word for word, is not
        written again.

        Raises:
            RetortError: the disk is full, say. Those that still found room count.
        """
        fresh = [c for c in completions if self._records.get(c.key) != c]
        lines = [encode(c) for c in fresh]
        if not lines:
            return
        offset = self._size
        try:
            self._append(b"".join(lines))
        finally:
            for completion, line in zip(fresh, lines, strict=True):
                if offset + len(line) <= self._size:
                    self._records.place(completion, self._own, offset, len(line))
                offset += len(line)

    def _append(self, data: bytes) -> None:
        """Write lines and sync them. On an error the file ends with the last whole line that was written."""
        start, written = self._size, 0
        try:
            if os.fstat(self._stream).st_size != start:  # on a file system without locks
                raise RetortError("another process wrote to it", str(self.path), "let one at a time work on a shard")
            while written < len(data):
                written += os.write(self._stream, memoryview(data)[written:])
            os.fsync(self._stream)
        except OSError as error:
            self._failed = True
            unsynced = written == len(data)  # then nobody knows what is on the disk
            self._cut(start if unsynced else start + data.rfind(b"\n", 0, written) + 1)
            raise cannot_write(self.path, error) from None
        except RetortError:
            self._failed = True
            raise
        except BaseException:  # an interrupt from the keyboard: what was received is written when the run ends
            self._cut(start)
            raise
        self._size = start + len(data)

    def _cut(self, size: int) -> None:
        with suppress(OSError):  # what cannot be cut now is cut by the next writer
            os.ftruncate(self._stream, size)
            if size > self._size:
                os.fsync(self._stream)
                self._size = size

    def run(self, requests: Sequence[Request], teacher_factory: Callable[[], Teacher]) -> Iterator[Completion]:
        """Answers to all requests, each once, in any order: what is on record first, then what the teacher writes, each
        only when it is on the disk.

        The engine works in a thread, and what it has finished meanwhile is written together under one fsync, so it does
        not wait for the disk. When the iterator is closed, or an exception passes through it, the engine is stopped
        and what was received is written. The teacher itself is left open: it belongs to the caller.

        Args:
            requests: with different keys.
            teacher_factory: called in the caller's thread, and only when an answer is missing.

        Raises:
            ValueError: two requests have the same key, a run is under way, or the journal was closed under this one.
            EngineError: the teacher ended without answering everything. Its own exceptions pass unchanged; either
                comes after all that was received has been written and yielded.
            RetortError: the disk is full, say; see `add`.
        """
        if len({request.key for request in requests}) != len(requests):
            raise ValueError("two requests have the same key")
        return self._run(requests, teacher_factory)

    def _run(self, requests: Sequence[Request], teacher_factory: Callable[[], Teacher]) -> Iterator[Completion]:
        if self._pump is not None:
            raise ValueError("a run of this journal is under way")
        missing = []
        for request in requests:
            found = self.get(request.key, request.max_tokens)
            if found is None:
                missing.append(request)
            else:
                self.from_journal += 1
                yield found
        if not missing:
            return
        teacher = teacher_factory()
        pump = self._pump = _Pump(teacher, missing, self._count)
        try:
            pump.start()
            while pump.wait():
                yield from self._keep(pump)
                if self._pump is not pump:
                    raise ValueError("the journal was closed while a run was under way")
        finally:
            self._end(pump)
        if pump.error is not None:
            raise pump.error
        if pump.waiting:
            raise EngineError(
                f"the teacher left {len(pump.waiting)} of {len(missing)} requests unanswered",
                str(self.path.parent),
                "run it again: what it answered is kept",
            )

    def _count(self) -> None:
        self.calls_made += 1

    def _keep(self, pump: _Pump) -> list[Completion]:
        """Write what was received; returns what of it was wanted. Nothing leaves the pump before it is on the disk."""
        if self._failed:
            return []
        received = pump.received()
        fresh: dict[str, Completion] = {}
        for completion in received:
            if completion.key in pump.waiting:
                fresh.setdefault(completion.key, completion)
        self.add(list(fresh.values()))
        pump.waiting -= fresh.keys()
        pump.drop(len(received))
        self.ignored += len(received) - len(fresh)
        return list(fresh.values())

    def _end(self, pump: _Pump) -> None:
        if pump is not self._pump:
            return
        try:
            self._keep(pump)  # before the wait, in which a second interrupt may come
        finally:
            stopped = pump.stop(self._patience)
            self._pump = None
        self._keep(pump)
        if not stopped:
            self.notes.append(f"the engine did not stop within {self._patience:g} s and was left behind")


class _Pump:
    """The engine at work in a thread of its own; what it has finished waits here until it is on the disk.

    Attributes:
        waiting: keys without an answer yet. error: what ended the engine, if anything did.
    """

    def __init__(self, teacher: Teacher, requests: Sequence[Request], count: Callable[[], None]) -> None:
        self.waiting = {request.key for request in requests}
        self.error: BaseException | None = None
        self._teacher, self._requests, self._count = teacher, requests, count
        self._received: list[Completion] = []
        self._turn = threading.Condition()
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._work, name="teacher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the next answer; False: none will come."""
        with self._turn:
            self._turn.wait_for(lambda: self._received or self._ended)
            return bool(self._received)

    def received(self) -> list[Completion]:
        with self._turn:
            return list(self._received)

    def drop(self, count: int) -> None:
        """Forget the first so many."""
        with self._turn:
            del self._received[:count]
            self._turn.notify_all()

    def stop(self, patience: float) -> bool:
        """Let the engine end after its next answer. Returns whether it did within so many seconds."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        if self._thread.ident is not None:
            self._thread.join(patience)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            answers = self._teacher.generate(self._hand_out())
            try:
                for completion in answers:
                    self._put(completion)
                    if self._stopping:
                        break
            finally:
                if close := getattr(answers, "close", None):  # a generator: let it clear up, in its own thread
                    close()
        except BaseException as error:
            self.error = error
        finally:
            with self._turn:
                self._ended = True
                self._turn.notify_all()

    def _hand_out(self) -> Iterator[Request]:
        for request in self._requests:
            if self._stopping:
                return
            self._count()
            yield request

    def _put(self, completion: Completion) -> None:
        with self._turn:
            self._turn.wait_for(lambda: len(self._received) < AHEAD or self._stopping)
            self._received.append(completion)
            self._turn.notify_all()


def read_journal(folder: Path) -> dict[str, Completion]:
    """The best answer to every key, by the files' order; empty where there is no journal. Takes no lock and changes
    nothing; unfinished and damaged lines are passed over.

    Raises:
        DataError: a file cannot be read, or another version of Retort wrote it.
    """
    records = Records(folder)
    try:
        return {key: completion for key in records if (completion := records.get(key)) is not None}
    finally:
        records.close()


def _note(name: str, count: int, what: str) -> str:
    return f"{name}: damaged lines {what} ({count}); what they held is asked again"
