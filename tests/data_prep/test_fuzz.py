"""A thousand damaged files: each ends in rows, in counted drops, or in one clear error; no row is lost silently."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from test_documents import column, pdf
from test_pipeline import chat, texts

from data_prep.prepare import prepare
from recipes.errors import DataError
from recipes.load import load_recipe
from recipes.tables import KINDS, kind_of

FILES = 1000
NASTY = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"\r",
    b"\n",
    b"\n\n",
    b"\xed\xa0\x80",
    b",",
    b"<",
]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
ANSWERED = [
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "x", "reasoning_content": "why"},
]


def originals(folder: Path) -> list[Path]:
    """One good file of every kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [chat(t, n=i) for i, t in enumerate(texts(12, low=5, high=15))]
    pairs = [{"prompt": r["messages"][0]["content"], "completion": 'says "red",\nor blue'} for r in rows]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    made = {
        "a.jsonl": lines,
        "b.json": json.dumps(pairs).encode(),
        "c.csv": ("prompt,completion\r\n" + "".join(f'"{p["prompt"]}","a ""red"" one"\r\n' for p in pairs)).encode(),
        "d.jsonl.gz": gzip.compress(lines, mtime=0),
        "e.tsv": ("prompt\tcompletion\n" + "".join(f"{p['prompt']}\tred\n" for p in pairs)).encode(),
        "g.txt": "\n\n".join(texts(6)).encode(),
        "h.md": ("# One\n\n" + "\n\n## Two\n\n".join(texts(6))).encode(),
        "i.html": f"<html><body><h1>One</h1>{''.join(f'<p>{t}</p>' for t in texts(6))}</body></html>".encode(),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(pairs), folder / "f.parquet", row_group_size=5)
    with pa.output_stream(folder / "k.jsonl.zst", compression="zstd") as stream:
        stream.write(lines)
    pdf(folder / "l.pdf", column(*texts(8)), column(*texts(8, seed=3)))
    shapes: dict[str, list[dict[str, Any]]] = {
        "m.jsonl": [
            {"conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": "a"}]} for t in texts(10)
        ],
        "n.jsonl": [{"instruction": t, "input": "", "output": "b"} for t in texts(10)],
        "o.jsonl": [{"messages": [{"role": "user", "content": t}, CALL, *ANSWERED]} for t in texts(10)],
    }
    for name, records in shapes.items():
        write_rows(folder / name, records)
    import docx

    document = docx.Document()
    for text in texts(4):
        document.add_paragraph(text)
    document.save(str(folder / "j.docx"))
    return sorted(folder.iterdir())


def damaged(content: bytes, rng: random.Random) -> bytes:
    raw = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(raw):
            raw[at] = rng.randrange(256)
        elif kind == 1:
            raw[at:at] = rng.choice(NASTY)
        elif kind == 2:
            del raw[at : at + rng.choice([1, 3, 50])]
        elif kind == 3:
            raw = raw[:at]
        else:
            raw[at:at] = raw[max(0, at - 40) : at]
    return bytes(raw)


@pytest.mark.slow
def test_damaged_files_end_in_rows_or_in_a_clear_error(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    good = originals(folder)
    assert len(good) == 15
    rng = random.Random(5)
    ends: Counter[str] = Counter()
    train = {"seq_len": 256, "tokens_per_step": 512, "max_steps": 2, "device": "cpu"}
    for number in range(FILES):
        path = good[number % len(good)]
        bad = tmp_path / f"bad{number}{''.join(path.suffixes)}"
        bad.write_bytes(damaged(path.read_bytes(), rng))
        method = {"type": "sft", "on": "assistant" if kind_of(path) in KINDS else "text"}
        data: dict[str, Any] = {"train": [{"path": str(bad)}], "steps": ["clean", "exact_dedup"]}
        sections = {"data": {**data, "on_bad_row": "drop", "too_long": "split"}, "train": train, "method": method}
        try:
            prepared = prepare(load_recipe(make_recipe(**sections)), tmp_path / "run" / str(number))
        except DataError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 600 and (str(bad) in text or "no training row is left" in text), (
                text
            )
            ends["error"] += 1
            continue
        counts = prepared.counts
        dropped = (prepared.folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        assert counts["rows_in"] == counts["rows_out"] + len(dropped)
        assert len(dropped) == sum(counts["dropped"].values())
        if bad.suffix == ".jsonl":  # counted without the program: none is lost before it is counted
            lines = bad.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert counts["rows_in"] == sum(bool(line.strip()) for line in lines), bad
        ends["drops" if dropped else "rows"] += 1
    assert ends.total() == FILES and min(ends["error"], ends["drops"], ends["rows"]) > 100, ends
