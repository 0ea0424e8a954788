"""Rows in, rows out: every accepted shape, every refused one with its place, and nothing lost on the way."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, colour_rows, run_cli, write_rows

from data_prep.assemble import count_packs, read_rows
from data_prep.formats import to_row
from data_prep.prepare import prepare
from data_prep.readers import read_piece, scan
from recipes.errors import DataError
from recipes.lineage import read_manifest
from recipes.load import load_recipe
from recipes.schema_data import Source
from recipes.tables import BadRecord

WIDE = {**os.environ, "COLUMNS": "250"}
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHAPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": CHAT}, {}),
    ({"prompt": "Q", "completion": "A"}, {}),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {}),
    ({"instruction": "Q", "input": "", "output": "A"}, {}),
    ({"question": "Q", "answer": "A"}, {"columns": {"prompt": "question", "completion": "answer"}}),
    ({"row": {"text": "Q", "answer": "A"}}, {"columns": {"prompt": "row.text", "completion": "{row.answer}"}}),
    ({"chat": CHAT}, {"columns": {"messages": "chat"}}),
]


@pytest.mark.parametrize(("record", "options"), SHAPES)
def test_every_shape_becomes_the_same_row(record: dict[str, Any], options: dict[str, Any]) -> None:
    row = to_row(record, "f:1", Source(path="f", **options))
    assert [(m["role"], m["content"]) for m in row.messages] == [("user", "Q"), ("assistant", "A")]
    assert row.id == to_row({"messages": CHAT, "other": 1}, "g:9", Source(path="g")).id
    assert row.reference == "A"


def test_mapped_parts_and_kept_columns() -> None:
    columns = {"system": "Be brief.{n}", "prompt": "{q}?\n{n}", "completion": "a", "reasoning": "why"}
    source = Source(path="f", columns=columns)
    row = to_row({"q": "Q", "n": 2, "a": "A", "why": "because", "group": "g7"}, "f:1", source)
    assert row.messages == (
        {"role": "system", "content": "Be brief.2"},
        {"role": "user", "content": "Q?\n2"},
        {"role": "assistant", "content": "A", "reasoning_content": "because"},
    )
    assert row.group == "g7" and row.extra["why"] == "because"
    assert to_row({"messages": CHAT, "group": 0}, "f:1", Source(path="f")).group == "0"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, CHAT[1]]
    assert to_row({"messages": parts}, "f:1", Source(path="f")).messages == tuple(CHAT)


BAD_RECORDS: list[tuple[Any, dict[str, Any], str]] = [
    ({"messages": []}, {}, "at least one message"),
    ({"messages": "text"}, {}, "must be a list"),
    ({"messages": [1]}, {}, "message 1 is no object"),
    ({"messages": [{"role": "bot", "content": "x"}]}, {}, "message 1 has the role 'bot'"),
    ({"messages": [{"role": "user"}]}, {}, "message 1 (user) has no content"),
    ({"messages": [{"role": "user", "content": 3}]}, {}, "has int content"),
    ({"messages": CHAT[:1]}, {}, "has no assistant turn"),
    ({"messages": [*CHAT, CHAT[0]]}, {}, "ends with a user turn"),
    ({"messages": CHAT, "tools": "x"}, {}, "'tools' is a text that is no JSON"),
    ({"messages": CHAT, "tools": {"a": 1}}, {}, "'tools' must be a list"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, {}, "turn 1 is from 'alien'"),
    ({"conversations": {}}, {}, "'conversations' must be a list"),
    ({"prompt": "Q", "completion": " "}, {}, "'completion' is empty"),
    ({"prompt": None, "completion": "A"}, {}, "have no known shape"),
    ({"instruction": "Q", "output": 5}, {}, "'output' must be a text, not int"),
    ({"question": "Q", "answer": "A"}, {}, "have no shape that is known for sure"),
    ({"foo": 1}, {}, "the columns (foo) have no known shape"),
    ({}, {}, "the columns (none) have no known shape"),
    ({"a": 1}, {"columns": {"prompt": "q", "completion": "a"}}, "has no column 'q'"),
    ({"q": [1], "a": "A"}, {"columns": {"prompt": "q", "completion": "a"}}, "'q' holds list, not text"),
    ({"q": "", "a": "A"}, {"columns": {"prompt": "q", "completion": "a"}}, "'q' is empty"),
    ({"q": "Q"}, {"columns": {"prompt": "q"}}, "columns lack completion"),
    ({"messages": [{"role": "user", "content": "\ud800"}, CHAT[1]]}, {}, "half of a surrogate pair"),
]


@pytest.mark.parametrize(("record", "options", "message"), BAD_RECORDS)
def test_a_bad_record_is_refused_with_its_place(record: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord) as caught:
        to_row(record, "rows.jsonl:17", Source(path="f", **options))
    assert message in str(caught.value) and str(caught.value).startswith("rows.jsonl:17: ")


def good_lines(count: int = 30) -> list[bytes]:
    return [json.dumps({"messages": r["messages"]}).encode() for r in colour_rows(count)]


BAD_FILES: list[tuple[str, bytes, str, str]] = [
    ("input.jsonl", b"", "", "holds no rows"),
    ("input.jsonl", b"\n \n", "", "holds no rows"),
    ("input.jsonl", b"\n".join([*good_lines()[:16], b'{"messages": [}']), ":17:15", "not valid JSON"),
    ("input.jsonl", good_lines()[0] + b"\n[1, 2]", ":2", "is a JSON list, not an object"),
    ("input.jsonl", good_lines()[0] + b"\n\x89PNG\r\n\x1a\n", ":2", "is not UTF-8 text"),
    ("input.jsonl", good_lines()[0][:-9], ":1:", "is not valid JSON"),
    ("input.jsonl", b"[" * 100_000, ":1", "is nested too deeply"),
    ("input.jsonl", b'{"text": "only text"}', ":1", "set method.on: text"),
    ("input.jsonl", b'{"prompt": "a", "completion": "b", "prompt": "c"}', ":1", "the key 'prompt' stands twice"),
    ("input.jsonl", b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', ":1", "key 'content' stands"),
    ("input.json", b'[{"prompt": "a", "completion": "b", "prompt": "c"}]', "", "the key 'prompt' stands twice"),
    ("input.csv", b"prompt,prompt,completion\na,b,c\n", ":1", "names the column 'prompt' twice"),
    ("input.csv", b'prompt,completion\n"a\nb","c"\n"d\ne\nf"," "\n', ":4", "'completion' is empty"),
    ("input.json", b"{}", "", "is no list of rows"),
    ("input.json", b'[{"a": 1}]\n[{"a": 2}]', ":2:1", "is not valid JSON: Extra data"),
    ("input.json", b'[{"messages": 1}, 5]', "[1]", "must be a list"),
    ("input.csv", b"prompt,completion\na,b,c\n", ":2", "has not the 2 columns"),
    ("input.csv", b'prompt,completion\n"a,b\n', "", "is not valid CSV"),
    ("input.csv", b"prompt,completion\n\xff,b\n", "", "is not UTF-8 text"),
    ("input.csv", b"prompt,completion\n", "", "holds no rows"),
    ("input.parquet", b"PAR1 not really", "", "is not valid Parquet"),
    ("input.jsonl.gz", b"not gzip", "", "cannot be read"),
    ("input.xlsx", b"PK", "", "unknown ending '.xlsx'"),
]


@pytest.mark.parametrize(("name", "content", "place", "message"), BAD_FILES)
def test_a_bad_file_ends_in_exit_code_4_before_any_model(
    name: str, content: bytes, place: str, message: str, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    recipe = load_recipe(make_recipe(data={"train": [{"path": str(path)}]}))
    with pytest.raises(DataError) as caught:
        prepare(recipe, tmp_path / "run")
    text = str(caught.value)
    assert caught.value.exit_code == 4 and "\n" not in text
    assert text.startswith(f"{path}{place}") and message in text, text
    assert not (tmp_path / "run" / "data").exists()


def test_the_same_rows_from_every_file_kind(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f'Q{i}, "x"\nü', "completion": f"A{i}"} for i in range(5)]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "data.json").write_text(json.dumps({"data": rows}))
    quoted = "".join('"{}","{}"\r\n'.format(r["prompt"].replace('"', '""'), r["completion"]) for r in rows)
    (tmp_path / "t.csv").write_text("prompt,completion\r\n" + quoted, newline="")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = {}
    for name in ("bom.jsonl", "z.jsonl.gz", "list.json", "data.json", "t.csv", "t.parquet"):
        source = Source(path=str(tmp_path / name))
        records = [record for piece in scan(source).pieces for record in read_piece(piece)]
        found[name] = [to_row(record, place, source).id for place, record in records]  # type: ignore[arg-type]
    assert len(set(found["bom.jsonl"])) == 5
    assert all(ids == found["bom.jsonl"] for ids in found.values()), found


def test_files_that_are_not_read_are_named(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    write_rows(folder / "a.jsonl", colour_rows(6))
    for name in ("b.xlsx", "c.jsonl.bz2", "more/d.jsonl.xz", "e.txt", ".hidden"):
        (folder / name).write_bytes(b"x")
    source = {"path": str(folder)}
    done = run_cli("prepare", str(make_recipe(data={"train": [source]})), cwd=tmp_path, env=WIDE)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "run" / "data")
    unread = ["b.xlsx", "c.jsonl.bz2", "e.txt", "more/d.jsonl.xz"]
    assert manifest is not None and manifest["inputs"][0]["unread"] == unread
    assert f"files not read in {folder}: {', '.join(unread)}" in done.stdout and "rows in" in done.stdout
    (folder / "a.jsonl").unlink()
    (folder / "e.txt").unlink()
    with pytest.raises(DataError, match=r"the folder holds no \.jsonl, .* file"):
        prepare(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "other")


def test_overlaps_are_shown_by_item(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    question = "Bob drives seven miles to see his old aunt in town {} times a year; how many miles does he drive then?"
    held = [{"prompt": question.format(n), "completion": str(n)} for n in (10, 20)]
    write_rows(tmp_path / "held.jsonl", held)
    rows = [
        {"prompt": f"{say}: {held[n]['prompt']}", "completion": "x"} for n, say in ((0, "Hm"), (1, "Oh"), (1, "So"))
    ]
    write_rows(tmp_path / "r.jsonl", [*rows, {"prompt": "What is red?", "completion": "A door."}])
    step = {"decontaminate": {"against": [{"path": "held.jsonl"}], "similarity": None}}
    recipe = make_recipe(data={"train": [{"path": "r.jsonl"}], "steps": [step]})
    done = run_cli("prepare", str(recipe), cwd=tmp_path, env=WIDE)
    assert done.returncode == 0, done.stderr
    assert "rows were dropped that overlap with 2 held-out or benchmark items:\n  held.jsonl:2: 2\n" in done.stdout
    statistics = json.loads((tmp_path / "run" / "data" / "statistics.json").read_text())
    most = [{"item": "held.jsonl:2", "rows": 2}, {"item": "held.jsonl:1", "rows": 1}]
    assert statistics["overlaps"] == {"items": 2, "most": most}


def test_prompts_for_a_teacher_are_drawn_where_prepare_says(tmp_path: Path) -> None:
    less = "data.train=[{embedded: legal, split: train, limit: 40}]"
    options = ("--set", f"output={tmp_path / 'run'}", "--set", less)
    done = run_cli("prepare", str(ROOT / "recipes" / "legal-distill.yaml"), *options, cwd=tmp_path, env=WIDE)
    assert done.returncode == 0 and f"retort data {tmp_path / 'run'} draws" in done.stdout, done.stderr
    done = run_cli("data", str(tmp_path / "run"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run' / 'data.html'}\n"), done.stderr


def test_counts_reasons_and_leakage(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    rows = colour_rows(20)
    held_out = write_rows(tmp_path / "eval.jsonl", rows[:4])
    long = {"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "x"}]}
    train = write_rows(tmp_path / "train.jsonl", [*rows, rows[10], long, {"messages": []}])
    data = {
        "train": [{"path": str(train)}],
        "eval": [{"path": str(held_out)}],
        "steps": ["exact_dedup"],
        "on_bad_row": "drop",
    }
    prepared = prepare(load_recipe(make_recipe(data=data)), tmp_path / "run")
    counts = prepared.counts
    assert counts["rows_in"] == 27 and counts["rows_out"] == 20
    assert counts["dropped"] == {"bad_row": 1, "exact_duplicate": 1, "in_eval": 4, "too_long": 1}
    assert (counts["train_rows"], counts["eval_rows"]) == (16, 4)
    dropped = [json.loads(line) for line in (prepared.folder / "dropped.jsonl").read_text().splitlines()]
    assert [d["_source"] for d in dropped if d["reason"] == "bad_row"] == [f"{train}:23"]
    assert next(d for d in dropped if d["reason"] == "too_long")["_source"] == f"{train}:22"
    stored = read_rows(prepared.folder, "train")
    assert stored[0]["messages"] == rows[4]["messages"] and stored[0]["extra"] == {"number": 4}
    assert counts["train_tokens"] == sum(len(r["input_ids"]) for r in stored)
    assert counts["trained_tokens"] == sum(sum(r["loss_mask"]) for r in stored)
    tokenizer = prepared.tokenizer.backend
    for row in stored:
        trained = [t for t, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        assert tokenizer.decode(trained) == row["messages"][-1]["content"] + "<|im_end|>"


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_rows_that_are_too_long(policy: str, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    rows = colour_rows(15)
    tail = {"role": "assistant", "content": "violet " * 60}
    rows.append({"messages": [{"role": "user", "content": "Say red."}, tail]})
    path = write_rows(tmp_path / "train.jsonl", rows)
    sections = {"data": {"train": [{"path": str(path)}], "too_long": policy}}
    prepared = prepare(load_recipe(make_recipe(**sections)), tmp_path / "run")
    counts = prepared.counts
    if policy == "drop":
        assert (counts["train_rows"], counts["truncated_rows"], counts["dropped"]) == (15, 0, {"too_long": 1})
    else:
        last = read_rows(prepared.folder, "train")[-1]
        assert (counts["train_rows"], counts["truncated_rows"]) == (16, 1)
        assert len(last["input_ids"]) == 128 and counts["lost_tokens"] == last["cut_tokens"] > 0
    with pytest.raises(DataError, match=r"train\.jsonl:16: has 443 tokens, more than train\.seq_len 128"):
        prepare(load_recipe(tmp_path / "recipe.yaml", ["data.too_long=stop"]), tmp_path / "other")


def test_prepared_rows_are_reused_until_something_changes(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe())
    first = prepare(recipe, tmp_path / "run")
    bytes_before = (first.folder / "train-00000.parquet").read_bytes()
    assert not first.reused and prepare(recipe, tmp_path / "run").reused
    again = prepare(recipe, tmp_path / "elsewhere")
    assert (again.folder / "train-00000.parquet").read_bytes() == bytes_before, "same input, same bytes"
    (first.folder / "train-00000.parquet").write_bytes(bytes_before[:-1] + b"X")
    with pytest.raises(DataError, match=r"was changed after it was prepared: train-00000\.parquet"):
        prepare(recipe, tmp_path / "run")
    write_rows(tmp_path / "rows.jsonl", colour_rows(32))
    changed = prepare(recipe, tmp_path / "run")
    assert not changed.reused and changed.counts["rows_in"] == 32
    manifest = read_manifest(changed.folder)
    assert manifest is not None and set(manifest["files"]) == {
        "train-00000.parquet",
        "eval-00000.parquet",
        "dropped.jsonl",
        "statistics.json",
    }


def test_show_masks_prints_the_trained_tokens(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe()
    done = run_cli("prepare", str(recipe), "--show-masks", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stored = read_rows(tmp_path / "run" / "data", "train")
    for row in stored[:2]:
        assert f"[[{row['messages'][-1]['content']}<|im_end|>]]" in done.stdout
    assert done.stdout.count("[[") == 3  # two rows and the legend
    assert "in the loss" in done.stdout and "64" in done.stdout


def test_packs_are_counted_as_they_will_be_made() -> None:
    from finetune.trainers import pack

    rng = random.Random(4)
    for seq_len, count in ((1000, 300), (64, 900), (8, 50)):
        lengths = [rng.randint(1, seq_len) for _ in range(count)]
        data = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
        assert count_packs(lengths, seq_len) == len(pack(data, seq_len))
    assert count_packs([600] * 1000, 1000) == 1000


def test_a_share_held_out_shares_no_row_with_training(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    rows = colour_rows(40)
    doubled = [{**row, "group": f"{copy}-{i}"} for copy in "ab" for i, row in enumerate(rows)]
    data = write_rows(tmp_path / "doubled.jsonl", doubled)
    recipe = load_recipe(make_recipe(data={"train": [{"path": str(data)}], "eval": {"fraction": 0.2}}))
    prepared = prepare(recipe, tmp_path / "run")
    ids = [{row["_id"] for row in read_rows(prepared.folder, part)} for part in ("train", "eval")]
    assert not ids[0] & ids[1] and prepared.counts["dropped"] == {}
    assert len(ids[0]) == 32 and len(ids[1]) == 8, "equal rows share a side, whatever their groups say"


def test_held_out_rows_that_all_drop_out_stop_the_run(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "red"}]}
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "eval": [{"path": str(tmp_path / "long.jsonl")}]}
    write_rows(tmp_path / "long.jsonl", [long])
    with pytest.raises(DataError, match="no held-out row is left"):
        prepare(load_recipe(make_recipe(data=data)), tmp_path / "run")


def test_files_of_others_are_left_alone(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    theirs = tmp_path / "run" / "data" / "contracts.jsonl"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("{}")
    done = run_cli("prepare", str(make_recipe()), cwd=tmp_path)
    assert done.returncode == 4 and "holds files that Retort did not write" in done.stderr
    assert theirs.read_text() == "{}"
