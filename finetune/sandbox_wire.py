"""The pipe between the sandbox's two processes.

What crosses it is JSON that stands for plain data, rebuilt as exact built-in types on the other side. Other objects
stay where they are and are held by number; the answer's side lets its objects be used, the tests' side only lets
functions be called that a test handed over.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import operator
import os
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

LONGEST = 4 * 2**20  # bytes of a message


class Lost(BaseException):
    """The other process is gone, or does not speak as it should."""


class Refused(BaseException):
    """A test that cannot be run here, whatever the answer is."""


# Plain data besides None, bool, float, str and small int: type -> (to JSON, from JSON).
_LEAVES: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    int: (hex, lambda text: int(text, 16)),
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    complex: (lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
    range: (lambda r: [r.start, r.stop, r.step], lambda parts: range(*parts)),
    decimal.Decimal: (str, decimal.Decimal),
    fractions.Fraction: (str, fractions.Fraction),
    datetime.datetime: (lambda d: d.isoformat(), datetime.datetime.fromisoformat),
    datetime.date: (lambda d: d.isoformat(), datetime.date.fromisoformat),
    datetime.time: (lambda t: t.isoformat(), datetime.time.fromisoformat),
    datetime.timedelta: (lambda d: [d.days, d.seconds, d.microseconds], lambda parts: datetime.timedelta(*parts)),
}
_HOLDERS: dict[type, Callable[[Any], Any]] = {
    list: list, tuple: tuple, set: set, frozenset: frozenset, collections.deque: collections.deque,
    type({}.keys()): list, type({}.values()): list, type({}.items()): list,
}  # fmt: skip
_READERS = {kind.__name__: read for kind, (_, read) in _LEAVES.items()}
_BUILDERS = {kind.__name__: build for kind, build in _HOLDERS.items()} | {"iterator": iter, "dict": dict}
_MUTABLE = (list, dict, set, bytearray, collections.deque)


class Side:
    """One end of the pipe. Either end may ask; while it waits for the reply it serves what the other asks back."""

    def __init__(self, read: int, write: int, tests: bool) -> None:
        self.read_end, self.write_end, self.tests = read, write, tests
        # The tests' side only lets its functions be called: their attributes would lead to what is expected.
        self.operations: dict[str, Callable[..., Any]] = {"call": _call} if tests else dict(_OPERATIONS)
        self.held: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.remotes: dict[int, Remote] = {}
        self.lost = False

    def pack(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, float, str)) or (type(value) is int and abs(value) < 2**63):
            return value
        if isinstance(value, Remote):
            return ["theirs", object.__getattribute__(value, "_number")]
        for kind, (write, _) in _LEAVES.items():
            if isinstance(value, kind):
                return [kind.__name__, write(value)]
        if isinstance(value, dict):
            return ["dict", [[self.pack(key), self.pack(part)] for key, part in dict.items(value)]]
        for kind in _HOLDERS:
            if isinstance(value, kind):
                return [kind.__name__, [self.pack(part) for part in kind.__iter__(value)]]  # type: ignore[attr-defined]
        if self.tests:
            if isinstance(value, Iterator):
                return ["iterator", [self.pack(part) for part in value]]
            if place := _place(value):
                return ["global", place]
            if not callable(value):
                text = f"hands the answer's code a value of type {type(value).__name__}, which is no plain data"
                # What the tests did not make themselves may have come about by the answer's doing.
                raise (Refused if type(value).__module__ == "tests" else TypeError)(text)
        number = self.numbers.setdefault(id(value), len(self.held))
        if number == len(self.held):
            self.held.append(value)
        return ["mine", number]

    def unpack(self, packed: Any) -> Any:
        if not isinstance(packed, list):
            return packed
        kind, content = packed
        if kind == "theirs":
            return self.held[content]
        if kind == "mine":
            return self.remotes.setdefault(content, Remote(self, content))
        if kind in _READERS:
            return _READERS[kind](content)
        if kind == "dict":
            return {self.unpack(key): self.unpack(part) for key, part in content}
        if kind == "global" and not self.tests:
            return operator.attrgetter(content[1])(sys.modules[content[0]])
        return _BUILDERS[kind]([self.unpack(part) for part in content])

    def send(self, message: Any) -> None:
        text = json.dumps(message).encode()
        if len(text) > LONGEST:
            raise ValueError(f"a value of {len(text)} bytes is too large to hand over")
        text = struct.pack("I", len(text)) + text
        while text:
            try:
                text = text[os.write(self.write_end, text) :]
            except OSError:
                self.give_up()

    def receive(self) -> Any:
        (size,) = struct.unpack("I", self._bytes(4))
        text = self._bytes(size) if size <= LONGEST else self.give_up()
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self.give_up()

    def _bytes(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            part = os.read(self.read_end, count - len(parts))
            parts += part or self.give_up()
        return parts

    def give_up(self) -> Any:
        self.lost = True
        raise Lost

    def ask(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """Have the other side do something with plain data, held objects and functions; lists and the like that it
        changed are changed here too."""
        if self.lost:
            raise Lost
        self.send([operation, [self.pack(a) for a in args], {key: self.pack(a) for key, a in kwargs.items()}])
        while True:
            message = self.receive()
            try:
                if message[0] == "raise":
                    error = _error(*message[1:])
                elif message[0] == "value":
                    value = self.unpack(message[1])
                    for index, packed in message[2]:
                        _replace(args[index], self.unpack(packed))
                    return value
                else:
                    self.answer(*message)
                    continue
            except Exception:  # no message of ours looks like this
                self.give_up()
            raise error

    def answer(self, operation: str, packed: list[Any], named: dict[str, Any]) -> None:
        try:
            args = [self.unpack(part) for part in packed]
            value = self.operations[operation](*args, **{key: self.unpack(part) for key, part in named.items()})
            changed = [
                [index, new]
                for index, arg in enumerate(args)
                if isinstance(arg, _MUTABLE) and (new := self.pack(arg)) != packed[index]
            ]
            self.send(["value", self.pack(value), changed])
        except Lost:
            raise
        except BaseException as error:  # SystemExit as well: the code must not end the run
            names = [kind.__name__ for kind in type(error).__mro__]
            try:
                text = str(error)[:1000]
            except BaseException:
                text = ""
            self.send(["raise", names, text])


class Remote:
    """An object that lives in the other process. Equality stays identity: what the answer's code says of equality is
    no evidence, and nor is what it says of order and membership."""

    def __init__(self, side: Side, number: int) -> None:
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_side").ask("call", self, *args, **kwargs)

    def __len__(self) -> int:
        return int(_ask(self, "len"))

    def __bool__(self) -> bool:
        return bool(_ask(self, "bool"))

    def __str__(self) -> str:
        return str(_ask(self, "str"))

    def __repr__(self) -> str:
        return str(_ask(self, "repr"))

    def __iter__(self) -> Any:
        return _ask(self, "iter")

    def __next__(self) -> Any:
        return _ask(self, "next")

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self, "delitem", key)


def _ask(remote: Remote, operation: str, *args: Any) -> Any:
    return object.__getattribute__(remote, "_side").ask(operation, remote, *args)


def _call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": _call, "getattr": getattr, "setattr": setattr, "len": len, "bool": bool, "str": str, "repr": repr,
    "iter": iter, "next": next, "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem,
}  # fmt: skip


def _place(value: Any) -> list[str] | None:
    """Module and name of what both processes have, such as len, math.sqrt or str.upper."""
    owner = getattr(value, "__objclass__", value)
    module, name = getattr(owner, "__module__", None), getattr(value, "__qualname__", None)
    try:
        found = operator.attrgetter(str(name))(sys.modules[str(module)])
    except (AttributeError, KeyError):
        return None
    return [str(module), str(name)] if found is value else None


def _error(names: list[str], text: str) -> Exception:
    """The nearest built-in exception. SystemExit and its like become a plain error."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and its like want more
                continue
    return RuntimeError(f"{names[0]}: {text}")


def _replace(old: Any, new: Any) -> None:
    if type(old) is not type(new):
        return
    if isinstance(old, (list, bytearray)):
        old[:] = new
    else:
        old.clear()
        (old.extend if isinstance(old, collections.deque) else old.update)(new)
