"""The string metadata in the header of a GGUF file."""

from __future__ import annotations

import struct
from typing import BinaryIO

LONGEST = 1 << 24  # bytes of one string


def strings(stream: BinaryIO) -> dict[str, list[str]]:
    """Every string value in a GGUF header of the format's version 2 or 3, by its key; of lists (tags, data sets) only
    those under `general.`. A key that stands twice keeps both values.

    Raises:
        ValueError, KeyError, struct.error: it is no such file, or is torn.
    """
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(form: str) -> int:
        return int(struct.unpack(form, stream.read(struct.calcsize(form)))[0])

    def string() -> bytes:
        size = number("<Q")
        if size > LONGEST:
            raise ValueError("a string of over 16 MB")
        return stream.read(size)

    if stream.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := number("<I")) not in (2, 3):
        raise ValueError(f"version {version}")
    number("<Q")
    found: dict[str, list[str]] = {}
    for _ in range(min(number("<Q"), 10_000)):
        key, kind = string().decode(), number("<I")
        if kind == 8:
            found.setdefault(key, []).append(string().decode("utf-8", "replace"))
        elif kind == 9:
            inner, count = number("<I"), number("<Q")
            if inner == 8:
                for _ in range(count):
                    text = string()
                    if key.startswith("general."):
                        found.setdefault(key, []).append(text.decode("utf-8", "replace"))
            else:
                stream.seek(sizes[inner] * count, 1)
        else:
            stream.seek(sizes[kind], 1)
    return found
