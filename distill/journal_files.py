"""The files of the journal: what a line says, which lines count, and which answer counts where a key has several.

A line is one JSON object whose first field is a checksum over the bytes that follow it. It counts when its newline
stands and its checksum fits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from distill.teachers import Completion
from recipes.errors import DataError

_SUM = b'{"sum":"'
_BODY = len(_SUM) + 16 + len(b'",')  # where the bytes under the checksum begin
_FIELDS = tuple(f.name for f in fields(Completion) if f.name != "sparse")


class _Spot(NamedTuple):
    """Where a record stands, and what its rank is decided by."""

    file: int
    offset: int
    length: int
    truncated: bool
    max_tokens: int

    @property
    def rank(self) -> tuple[bool, int]:
        return (not self.truncated, self.max_tokens)


@dataclass
class Paid:
    """What stands in all files: every answer that the teacher wrote, the best to its key or not."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Records:
    """Where the best answer to every key stands in a folder's journal files. Texts stay on the disk: memory is some
    400 bytes a key. Takes no lock and changes nothing.

    Attributes:
        damaged: damaged lines by file name, where there are any.
        paid: what all answers took, those that a better one replaced included.

    Raises:
        DataError: a file cannot be read, or another version of Retort wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.damaged: dict[str, int] = {}
        self.paid = Paid()
        self._best: dict[str, _Spot] = {}
        self._paths = sorted(folder.glob("*.jsonl"))
        self._files: list[int] = []  # kept open: a file that another machine repairs stays what it was for us
        try:
            for number, path in enumerate(self._paths):
                self._files.append(os.open(path, os.O_RDONLY))
                self._scan(number, path)
        except OSError as error:
            self.close()
            raise DataError(f"cannot be read ({error.strerror or error})", str(folder)) from None
        except BaseException:
            self.close()
            raise

    def _scan(self, number: int, path: Path) -> None:
        offset = 0
        with open(self._files[number], "rb", closefd=False) as stream:
            for line in stream:
                completion = decode(line, str(path))
                if completion is not None:
                    self.place(completion, number, offset, len(line))
                elif line.endswith(b"\n"):
                    self.damaged[path.name] = self.damaged.get(path.name, 0) + 1
                offset += len(line)

    def place(self, completion: Completion, file: int, offset: int, length: int) -> None:
        """Take note of a record. It replaces only one of lower rank."""
        self.paid.answers += 1
        self.paid.prompt_tokens += completion.prompt_tokens
        self.paid.completion_tokens += completion.completion_tokens
        spot = _Spot(file, offset, length, completion.truncated, completion.max_tokens)
        known = self._best.get(completion.key)
        if known is None or spot.rank > known.rank:
            self._best[completion.key] = spot

    def number_of(self, path: Path) -> int:
        return self._paths.index(path)

    def __len__(self) -> int:
        return len(self._best)

    def __iter__(self) -> Iterator[str]:
        return iter(self._best)

    def __contains__(self, key: str) -> bool:
        return key in self._best

    def get(self, key: str, max_tokens: int = 0) -> Completion | None:
        """The best answer, unless it was cut under a smaller limit than `max_tokens`.

        Raises:
            DataError: the file changed since it was opened.
        """
        spot = self._best.get(key)
        if spot is None or (spot.truncated and spot.max_tokens < max_tokens):
            return None
        place = str(self._paths[spot.file])
        completion = decode(os.pread(self._files[spot.file], spot.length, spot.offset), place)
        if completion is None or completion.key != key:
            raise DataError("was changed while it was read", place, "run it again")
        return completion

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


def encode(completion: Completion) -> bytes:
    """The line of a completion, its newline included; `sparse` is left out."""
    values = {name: getattr(completion, name) for name in _FIELDS}
    try:
        body = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can say and UTF-8 cannot
        body = json.dumps(values, separators=(",", ":")).encode()
    return b"".join((_SUM, _digest(body[1:]), b'",', body[1:], b"\n"))


def decode(line: bytes, place: str) -> Completion | None:
    """The completion of a line; None where it is damaged or unfinished.

    Args:
        place: names the file, for the message.

    Raises:
        DataError: it is undamaged, but has other fields: another version of Retort wrote it.
    """
    if not _sound(line):
        return None
    try:
        values: dict[str, Any] = json.loads(line)
        del values["sum"]
        ids = values["token_ids"]
        values["token_ids"] = None if ids is None else tuple(ids)
        values["tool_calls"] = tuple(values["tool_calls"])
        return Completion(**values)
    except (ValueError, TypeError, KeyError):
        raise DataError(
            "was written by another version of Retort", place, "go on with that version, or move the file away"
        ) from None


def _sound(line: bytes) -> bool:
    body = line[_BODY:-1]
    return line.endswith(b"\n") and line.startswith(b"".join((_SUM, _digest(body), b'",')))


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


def repair(path: Path) -> tuple[int, int]:
    """Cut an unfinished last line off a file, and move damaged lines to a file beside it. Returns how many lines were
    moved, and how many bytes cut off."""
    damaged, whole = [], 0
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                whole += len(line)
                if not _sound(line):
                    damaged.append(line)
    torn = path.stat().st_size - whole
    if damaged:
        _write(aside(path), "ab", damaged)
        new = path.with_name(f"{path.name}.new")
        with path.open("rb") as stream:
            _write(new, "wb", (line for line in stream if _sound(line)))
        os.replace(new, path)
    elif torn:
        os.truncate(path, whole)
    return len(damaged), torn


def _write(path: Path, mode: str, lines: Iterable[bytes]) -> None:
    with open(path, mode) as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")
