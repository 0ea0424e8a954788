"""Licence texts told by their content: sketches of five-word shingles, compared in both directions.

A text is identified when nearly all of a known licence is in it, little else is, and no word of restriction more than
in the licence: with an added paragraph it is another licence. Sketches (`licenses/texts.json`) keep the hashes that are
divisible by a stride (FracMinHash, Irber et al. 2022), so that the share of one text in another can be told from both.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SKETCHES = Path(__file__).resolve().parent / "licenses" / "texts.json"
SHINGLE = 5  # words
LONG = 600  # words; of longer texts one shingle in STRIDE is kept
STRIDE = 8
PRESENT, EXPLAINED = 0.9, 0.93  # share of the licence in the file, share of the file in the licence
_FRONT_MATTER = re.compile(r"\A---\n(?:(?:[\w-]+:|[ -]).{0,300}\n)*---\n")
_HOLDER = re.compile(r"^\W*(?:copyright|\(c\)|©)(?:[^\w\n]+[\w@.-]+){0,12}\W*$", re.MULTILINE | re.IGNORECASE)
# Words that a restriction is made of: one more of them than in the licence, and the text is a changed form of it.
_RESTRICTS = re.compile(
    r"\b(?:non-?commercial\w*|commercial\w*|prohibit\w*|forbid\w*|exclu[ds]\w*|research|academic|outputs?|train\w*|"
    r"compet\w*|revenue|restrict\w*|users?|evaluation|military|distill?\w*)\b"
)


@dataclass(frozen=True)
class Sketch:
    licence: str
    text: str  # which of the licence's texts
    stride: int
    hashes: frozenset[int]
    restricts: dict[str, int]  # how often each word of _RESTRICTS occurs


@dataclass(frozen=True)
class Match:
    """`licence` is None where no known text is the file; `near` is then the licence that it alters, if any."""

    licence: str | None
    share: float
    near: str | None = None


def shingles(text: str) -> set[int]:
    """Hashes of all runs of SHINGLE words; front matter and copyright lines are left out."""
    plain = _plain(_HOLDER.sub(" ", text))
    words = re.findall(r"\w+", plain)
    starts = range(max(min(1, len(words)), len(words) - SHINGLE + 1))
    return {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in starts}


def restrictions(text: str) -> dict[str, int]:
    """How often each word occurs that restrictions are made of."""
    return dict(sorted(Counter(_RESTRICTS.findall(_plain(text))).items()))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", _FRONT_MATTER.sub("", text)).casefold()


def identify(text: str) -> Match:
    """The licence whose text this is."""
    found, restricts = shingles(text), restrictions(text)
    best, near, nearest = Match(None, 0.0), None, 0.0
    for sketch in _known():
        here = {h for h in found if h % sketch.stride == 0}
        common = len(here & sketch.hashes)
        present, explained = common / len(sketch.hashes), common / max(1, len(here))
        score = min(present, explained)
        added = any(count > sketch.restricts.get(word, 0) for word, count in restricts.items())
        if present >= PRESENT and explained >= EXPLAINED and not added and score > best.share:
            best = Match(sketch.licence, score)
        if max(present, explained) > nearest:
            near, nearest = sketch.licence, max(present, explained)
    return best if best.licence else Match(None, nearest, near if nearest >= 0.5 else None)


@cache
def _known() -> tuple[Sketch, ...]:
    entries = json.loads(SKETCHES.read_text("utf-8"))
    return tuple(
        Sketch(e["licence"], e["text"], e["stride"], frozenset(unpack(e["hashes"])), e["restricts"]) for e in entries
    )


def sketch_of(licence: str, name: str, text: str) -> dict[str, object]:
    """The entry of `licenses/texts.json` for one text."""
    found = shingles(text)
    stride = STRIDE if len(found) > LONG else 1
    kept = pack(h for h in found if h % stride == 0)
    return {"licence": licence, "text": name, "stride": stride, "restricts": restrictions(text), "hashes": kept}


def pack(hashes: object) -> str:
    values = sorted(hashes)  # type: ignore[call-overload]
    return base64.b64encode(struct.pack(f"<{len(values)}I", *values)).decode()


def unpack(text: str) -> tuple[int, ...]:
    raw = base64.b64decode(text)
    return struct.unpack(f"<{len(raw) // 4}I", raw)
