"""The string metadata in the header of a GGUF file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO


def strings(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """(key, value) of the string values in a GGUF header, as of the format's version 2 and 3."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(form: str) -> int:
        return int(struct.unpack(form, stream.read(struct.calcsize(form)))[0])

    def string() -> bytes:
        size = number("<Q")
        if size > 1 << 24:
            raise ValueError("a string of over 16 MB")
        return stream.read(size)

    if stream.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := number("<I")) not in (2, 3):
        raise ValueError(f"version {version}")
    number("<Q")
    for _ in range(min(number("<Q"), 10_000)):
        key, kind = string().decode(), number("<I")
        if kind == 8:
            yield key, string().decode("utf-8", "replace")
        elif kind == 9:
            inner, count = number("<I"), number("<Q")
            if inner == 8:
                for _ in range(count):
                    string()
            else:
                stream.seek(sizes[inner] * count, 1)
        else:
            stream.seek(sizes[kind], 1)
