"""Licence texts told by their content. Only hashes of the texts are kept (`licenses/texts.json`).

The licences that permit most are known word for word: every run of five words, in order. A text is one of them when
each of its words stands where it stands in the licence, and none is missing; a title, lines of copyright and what the
steward of the licence put before and after it may differ or be left out. The notice by which a work is put under
Apache-2.0 stands for that licence, alone or next to its text. Of the others a sketch is kept, the hashes
that are divisible by a stride (FracMinHash, Irber et al. 2022): there a text is identified when nearly all of the
licence is in it, little else is, and no word of restriction more. With an added paragraph a text is another licence.
"""

from __future__ import annotations

import base64
import html
import json
import re
import struct
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

SKETCHES = Path(__file__).resolve().parent / "licenses" / "texts.json"
SHINGLE = 5  # words
LONG = 600  # words; of longer texts one shingle in STRIDE is kept
STRIDE = 8
PRESENT, EXPLAINED = 0.9, 0.93  # share of the licence in the file, share of the file in the licence
ALIKE = 0.5  # from this share on a text is a changed form of a licence
NAME = 16  # words of a name that is filled in
NOTICE = "notice by which a work is put under Apache-2.0"  # which of the texts it is
# What scancode's collection, from which such texts are often copied, writes above them.
_FRONT_MATTER = re.compile(r"\A---\nkey: [\w.+-]+\n.*?\n---\n", re.DOTALL)
# A line is read as words and what is between them, in one way only: an ambiguous pattern would take forever.
_HOLDER = re.compile(
    r"^[^\w\n]*(?:(?:portions[^\w\n]+)?copyright(?:[^\w\n]+c\b)?(?![^\w\n]*(?:notice|licen[cs]e|law|owner|holder|patent|and)\b)"
    r"|(?<=\()c(?=\))|(?<=©))(?:[^\w\n]+\w+){1,20}[^\w\n]*$|^[^\w\n]*all[ ]rights[ ]reserved[^\w\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
# No name holds these words, so a line with one of them is a sentence, whatever it begins with.
_SENTENCE = re.compile(
    r"\b(?:no|not|may|must|only|shall|unless|except|without|prohibited|forbidden|grant(?:s|ed)?|permi\w+|use[ds]?|"
    r"restrict\w*|void|condition\w*|requires?d?|if|when|however|provided|subject|terms)\b",
    re.IGNORECASE,
)
_TITLE = re.compile(
    r"(?:the|this|project|is|licensed|under|mit|expat|licen[cs]es?|apache|version|january|www|org|isc|bsd|clause|new|"
    r"simplified|revised|modified|berkeley|software|distribution|agreement|zlib|unlicense|creative|commons|attribution|"
    r"international|public|cc|by|universal|legal|code|text|of|txt|for|file|md|spdx|identifier|standard|full|all|rights|"
    r"reserved)"
)
# Words that a restriction is made of: one more of them than in the licence, and the text is a changed form of it.
_RESTRICTS = re.compile(
    r"\b(?:non-?commercial\w*|commercial\w*|prohibit\w*|forbid\w*|exclu[ds]\w*|research|academic|outputs?|train\w*|"
    r"compet\w*|revenue|restrict\w*|users?|evaluation|military|distill?\w*)\b"
)


@dataclass(frozen=True)
class Sketch:
    """A licence's text as hashes.

    Attributes:
        text: which of the licence's texts.
        stride: of the hashes kept; 1: all of them.
        restricts: how often each word of _RESTRICTS occurs.
        order: of a text known word for word the hashes of its runs of words in order, else empty.
        core: the numbers of the first word that must stand there and of the first that need not again.
        names: (first, end) of the words in whose place a name may stand.
    """

    licence: str
    text: str
    stride: int
    hashes: frozenset[int]
    restricts: dict[str, int]
    order: tuple[int, ...] = ()
    core: tuple[int, int] = (0, 0)
    names: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Match:
    """`licence` is None where no known text is the file; `near` is then the licence that it alters, if any."""

    licence: str | None
    share: float
    near: str | None = None


def words_of(text: str) -> list[str]:
    """The words of a text, lower case, without lines of copyright and without what numbers its paragraphs."""
    plain = unicodedata.normalize("NFKC", html.unescape(text)).replace("\u00ad", "")
    kept = _HOLDER.sub(lambda line: line[0] if _SENTENCE.search(line[0]) else " ", plain)
    joined = re.sub(r"(?<=[a-z])-\s*(?=[a-z])", "", kept.casefold())  # sub-licence, and what a line's end divides
    return [w for w in re.findall(r"\w+", joined) if len(w) > 1 and not w.isdigit() and w not in {"http", "https"}]


def runs(words: list[str]) -> list[int]:
    """The hash of every run of SHINGLE words, in order."""
    starts = range(max(min(1, len(words)), len(words) - SHINGLE + 1))
    return [zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in starts]


def restrictions(text: str) -> dict[str, int]:
    """How often each word occurs that restrictions are made of."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return dict(sorted(Counter(_RESTRICTS.findall(plain)).items()))


def identify(text: str) -> Match:
    """The licence whose text this is."""
    text = _FRONT_MATTER.sub("", text)
    words, restricts = _without_notice(words_of(text)), restrictions(text)
    order = runs(words)
    found = set(order)
    best, near, nearest = Match(None, 0.0), None, 0.0
    for sketch in _known():
        here = found if sketch.stride == 1 else {h for h in found if h % sketch.stride == 0}
        common = len(here & sketch.hashes)
        present, explained = common / len(sketch.hashes), common / max(1, len(here))
        score = min(present, explained)
        if max(present, explained) > nearest:
            near, nearest = sketch.licence, max(present, explained)
        if any(count > sketch.restricts.get(word, 0) for word, count in restricts.items()):
            continue
        if sketch.order:
            same = present >= ALIKE and _word_for_word(words, order, sketch)
        else:
            same = present >= PRESENT and explained >= EXPLAINED
        if same and score > best.share:
            best = Match(sketch.licence, score)
    return best if best.licence else Match(None, nearest, near if nearest >= ALIKE else None)


def _without_notice(words: list[str]) -> list[str]:
    """The words of a file without Apache's notice, unless that is all it says."""
    notice = next(list(sketch.order) for sketch in _known() if sketch.text == NOTICE)
    order, length = runs(words), len(notice) + SHINGLE - 1
    for start in reversed([i for i, run in enumerate(order) if run == notice[0]]):
        rest = words[:start] + words[start + length :]
        if order[start : start + len(notice)] == notice and len(rest) >= length:
            words = rest
    return words


def _word_for_word(words: list[str], order: list[int], sketch: Sketch) -> bool:
    """Whether a text is a licence's: what differs is a title, a name filled in, or before and after its core."""
    blocks = SequenceMatcher(None, sketch.order, order, autojunk=False).get_matching_blocks()
    ends = [(b.a, b.a + b.size + SHINGLE - 1, b.b, b.b + b.size + SHINGLE - 1) for b in blocks if b.size]
    total = len(sketch.order) + SHINGLE - 1
    at, here = 0, 0  # the words of licence and file that are accounted for
    for first, end, begin, stop in [*ends, (total, total, len(words), len(words))]:
        missing, added = (at, max(at, first)), words[here : max(here, begin)]
        if not _explained(missing, added, sketch, is_first=here == 0):
            return False
        at, here = max(at, end), max(here, stop)
    return True


def _explained(missing: tuple[int, int], added: list[str], sketch: Sketch, is_first: bool) -> bool:
    """Whether words of a licence may be missing in one place of a file, and others stand there instead."""
    start, end = missing
    if any(first <= start and end <= last for first, last in sketch.names):
        return len(added) <= NAME and not _SENTENCE.search(" ".join(added))
    outside = start == end or end <= sketch.core[0] or start >= sketch.core[1]
    is_title = (is_first or end <= sketch.core[0]) and len(added) <= 2 * NAME and _titles(added)
    is_holder = added[:1] == ["copyright"] and len(added) <= NAME and not _SENTENCE.search(" ".join(added))
    return outside and (not added or is_title or is_holder)


def _titles(words: list[str]) -> bool:
    """Whether words are titles of licences, with a name or two of what is licensed."""
    others = [w for w in words if not _TITLE.fullmatch(w)]
    return len(others) <= 2 and not _SENTENCE.search(" ".join(others))


@cache
def _known() -> tuple[Sketch, ...]:
    return tuple(_sketch(entry) for entry in json.loads(SKETCHES.read_text("utf-8")))


def _sketch(entry: dict[str, object]) -> Sketch:
    hashes = unpack(str(entry["hashes"]))
    exact = "core" in entry
    core: list[int] = entry.get("core", [0, 0])  # type: ignore[assignment]
    names: list[list[int]] = entry.get("names", [])  # type: ignore[assignment]
    return Sketch(
        str(entry["licence"]),
        str(entry["text"]),
        int(str(entry["stride"])),
        frozenset(hashes),
        entry["restricts"],  # type: ignore[arg-type]
        hashes if exact else (),
        (core[0], core[1]),
        tuple((first, end) for first, end in names),
    )


def sketch_of(
    licence: str, name: str, text: str, core: tuple[str, str] | None = None, names: tuple[str, ...] = ()
) -> dict[str, object]:
    """The entry of `licenses/texts.json` for one text.

    Args:
        core: the first and the last words that must stand in it (empty: its ends), for a licence that is to be known
            word for word.
        names: the words in whose place others write a name.
    """
    words = words_of(text)
    order = runs(words)
    about = {"licence": licence, "text": name, "restricts": restrictions(text)}
    if core is None:
        stride = STRIDE if len(set(order)) > LONG else 1
        return {**about, "stride": stride, "hashes": pack(sorted(h for h in set(order) if h % stride == 0))}
    first = _places(words, core[0])[0][0] if core[0] else 0
    last = _places(words, core[1])[-1][1] if core[1] else len(words)
    places = sorted({place for phrase in names for place in _places(words, phrase)})
    return {**about, "stride": 1, "core": [first, last], "names": places, "hashes": pack(order)}


def _places(words: list[str], phrase: str) -> list[tuple[int, int]]:
    """(first, end) of every place of a phrase."""
    wanted = words_of(phrase)
    found = [(i, i + len(wanted)) for i in range(len(words)) if words[i : i + len(wanted)] == wanted]
    if not found:
        raise ValueError(f"'{phrase}' does not stand in the text")
    return found


def pack(values: list[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}I", *values)).decode()


def unpack(text: str) -> tuple[int, ...]:
    raw = base64.b64decode(text)
    return struct.unpack(f"<{len(raw) // 4}I", raw)
