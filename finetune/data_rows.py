"""Rows of prepared data as the data page shows them: a few of many, as text, cut, compared word by word."""

from __future__ import annotations

import heapq
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.assemble import NAMES, shards
from data_prep.rows import STORED, Row, decode
from recipes.lineage import canonical_json

TEXT = 300  # characters of a row's text that are shown
LEAD = 60  # of them before the first word in which a copy differs
SAMPLES = 5  # dropped rows shown of one reason
CONTAMINATED, CONTAMINATED_SAMPLES = "contaminated", 12
PERSONAL = "pii"  # the reason of rows whose texts are not copied out of dropped.jsonl
_WORD = re.compile(r"\S+\s*|\s+")


@dataclass(frozen=True)
class Dropped:
    """What is kept of dropped.jsonl: sample lines by reason, and the texts of some rows by their place."""

    samples: dict[str, list[dict[str, Any]]]
    texts: dict[str, str]


def read_dropped(path: Path, places: set[str]) -> Dropped:
    """Read dropped.jsonl once. Which rows are samples depends on their places alone, not on the order of the file.

    Args:
        places: rows whose texts are wanted.
    """
    drawn: dict[str, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
    texts: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines):
            line = json.loads(text)
            place, reason = line["_source"], line["reason"]
            if place in places and reason != PERSONAL:
                texts.setdefault(place, text_of(line))
            sample = (-zlib.crc32(place.encode("utf-8", "replace")), -number, line)
            if len(drawn[reason]) < (CONTAMINATED_SAMPLES if reason == CONTAMINATED else SAMPLES):
                heapq.heappush(drawn[reason], sample)
            else:
                heapq.heappushpop(drawn[reason], sample)
    ordered = {reason: sorted(found, key=lambda sample: -sample[1]) for reason, found in drawn.items()}
    return Dropped({reason: [line for _, _, line in found] for reason, found in ordered.items()}, texts)


def kept_texts(folder: Path, places: set[str]) -> dict[str, str]:
    """Texts of prepared rows by their place; one column is read where none of them is."""
    import pyarrow.parquet as pq

    found: dict[str, str] = {}
    for path in (path for name in NAMES for path in shards(folder, name)):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                if found.keys() == places:
                    return found
                column = file.read_row_group(group, columns=["_source"])["_source"].to_pylist()
                if rows := [number for number, place in enumerate(column) if place in places]:
                    table = file.read_row_group(group, columns=list(STORED))
                    for stored in table.take(rows).to_pylist():
                        found.setdefault(stored["_source"], said(decode(stored)))
    return found


def text_of(line: dict[str, Any]) -> str:
    """The text of a line of dropped.jsonl: of the row, of the record that was no row, or empty."""
    if "row" in line:
        stored = {**dict.fromkeys(STORED), **line["row"], "_id": line["_id"], "_source": line["_source"]}
        return said(decode(stored))
    return json.dumps(line["record"], ensure_ascii=False) if "record" in line else ""


def said(row: Row) -> str:
    """All that is said in a row, each turn behind its role; system messages are left out."""
    if row.text is not None:
        return row.text
    turns = [(m["role"], m) for m in row.messages if m["role"] not in {"system", "developer"}]
    turns += [(kind, m) for kind, answer in (("chosen", row.chosen), ("rejected", row.rejected)) for m in answer]
    return "\n".join(f"{who}: {_content(message)}" for who, message in turns)


def _content(message: dict[str, Any]) -> str:
    parts = [message.get("reasoning_content"), message.get("content")]
    if message.get("tool_calls"):
        parts.append(canonical_json(message["tool_calls"]))
    return "\n".join(str(part) for part in parts if part)


def cut(text: str) -> str:
    """The first TEXT characters; a few more where that ends the text."""
    left_out = len(text) - TEXT
    return text if left_out <= TEXT // 10 else f"{text[:TEXT]} … ({left_out:,} more characters)"


def differences(kept: str, other: str) -> list[tuple[str, str]]:
    """`other` from a little before its first difference on, as stretches (kind, text).

    Kind is empty for words that both have, `ins` for words of `other` alone, `del` for words that it lacks. White space
    makes no difference.
    """
    same = (n for n, (a, b) in enumerate(zip(kept, other, strict=False)) if a != b)
    common = next(same, min(len(kept), len(other)))
    start = max(0, common - LEAD)
    if start:  # at a whole word where one begins soon
        start = kept.find(" ", start - 1, start + LEAD // 3) + 1 or start
    before, after = (_WORD.findall(text[start : start + 4 * TEXT]) for text in (kept, other))
    match = SequenceMatcher(None, [w.strip() for w in before], [w.strip() for w in after], autojunk=False)
    found = [("", "… ")] if start else []
    for tag, a, b, c, d in match.get_opcodes():
        found += _marked("del", before[a:b]) if tag != "equal" else ()
        found += _marked("" if tag == "equal" else "ins", after[c:d])
    return list(_first(found, TEXT))


def _marked(kind: str, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Words as one stretch; the white space behind them is not marked, and words that are lacking always have some."""
    text = "".join(words)
    if text.strip():
        yield kind, text.rstrip()
        yield "", text[len(text.rstrip()) :] or " " * (kind == "del")


def _first(stretches: Sequence[tuple[str, str]], most: int) -> Iterator[tuple[str, str]]:
    """Stretches up to `most` characters, a few more where that ends them."""
    most += most // 10 if sum(len(text) for _, text in stretches) <= most + most // 10 else 0
    for kind, text in stretches:
        if len(text) > most:
            yield kind, text[:most]
            yield "", " …"
            return
        most -= len(text)
        yield kind, text


def spread_rows(folder: Path, name: str, most: int) -> list[dict[str, Any]]:
    """Rows at even distances over all prepared rows of a part, the first and the last among them."""
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(path) for path in shards(folder, name)]
    total = sum(file.metadata.num_rows for file in files)
    wanted = sorted({round(n) for n in np.linspace(0, total - 1, min(most, total))})
    columns = ["_id", "_source", "input_ids", "loss_mask"]
    found: list[dict[str, Any]] = []
    start = 0
    for file, group in ((f, group) for f in files for group in range(f.num_row_groups)):
        stop = start + file.metadata.row_group(group).num_rows
        if here := [n - start for n in wanted if start <= n < stop]:
            found += file.read_row_group(group, columns=columns).take(here).to_pylist()
        start = stop
    return found


def ends(text: str, most: int) -> str:
    """`text` with its middle left out where it is long: a reader looks for where the loss begins and ends."""
    left_out = len(text) - most
    half = most // 2
    return text if left_out <= 0 else f"{text[:half]} … ({left_out:,} more characters) … {text[-half:]}"
