"""The shapes people have beyond plain chats: preference pairs, labels, tools, reasoning, saved datasets, documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import colour_rows, write_rows

from data_prep.assemble import read_rows
from data_prep.formats import to_row
from data_prep.prepare import prepare
from data_prep.readers import read_piece, scan
from data_prep.rows import Row, decode, encode
from recipes.errors import DataError
from recipes.load import load_recipe
from recipes.schema_data import Source
from recipes.tables import BadRecord

USER = {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
SHARED = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Q\n\nAssistant: "

PAIRS: list[dict[str, Any]] = [
    {"prompt": "Q", "chosen": "A", "rejected": "B"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A".strip(), "rejected": "B"},
    {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
]


def row_of(record: dict[str, Any], **options: Any) -> Row:
    return to_row(record, "f:1", Source(path="f", **options))


@pytest.mark.parametrize("record", PAIRS)
def test_every_kind_of_pair_becomes_the_same_row(record: dict[str, Any]) -> None:
    row = row_of(record)
    assert (row.kind, row.messages, row.chosen, row.rejected) == ("preference", (USER,), (GOOD,), (BAD,))
    assert row.id == row_of(PAIRS[0]).id and decode(encode(row)) == row


def test_a_shared_transcript_is_split_where_the_answers_part() -> None:
    row = row_of({"chosen": SHARED + "A", "rejected": SHARED + "B"})
    assert [m["content"] for m in row.messages] == ["Hi", "Hello", "Q"]
    # An answer that says nothing is an answer; later turns belong to the side that has them.
    row = row_of({"chosen": SHARED, "rejected": SHARED + "B\n\nHuman: And?\n\nAssistant: C"})
    assert row.chosen[0]["content"] == "" and [m["content"] for m in row.rejected] == ["B", "And?", "C"]
    mapped = row_of({"q": "Q", "a": "A", "b": "B"}, columns={"prompt": "q", "chosen": "a", "rejected": "b"})
    assert mapped.chosen == (GOOD,) and mapped.messages == (USER,)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "are equal"),
        ({"chosen": "A", "rejected": "B"}, "share no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "share no prompt"),
        ({"prompt": "Q", "chosen": [USER], "rejected": "B"}, "'chosen' holds no answer"),
        ({"prompt": "Q", "chosen": 3, "rejected": "B"}, "'chosen' must be a list"),
        ({"prompt": "Q", "completion": "A", "label": "yes"}, None),
        ({"prompt": [GOOD]}, "ends with a assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "has no name"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}]}, "kind 'image'"),
        ({"messages": [USER, {**GOOD, "tool_calls": [{"name": "f", "arguments": "[1"}]}]}, "is no JSON"),
    ],
)
def test_what_is_no_pair_is_refused(record: dict[str, Any], message: str | None) -> None:
    if message is None:  # a text label is a column like any other
        assert row_of(record).kind == "chat"
        return
    with pytest.raises(BadRecord) as caught:
        row_of(record)
    assert message in str(caught.value)


def test_labels_of_kto() -> None:
    for record in ({"prompt": "Q", "completion": "A", "label": True}, {"messages": [USER, GOOD], "kto_tag": True}):
        row = row_of(record)
        assert (row.kind, row.label, row.messages) == ("labelled", True, (USER, GOOD))
    assert row_of({"prompt": "Q", "completion": "A", "label": False}).id != row.id
    assert (
        row_of({"q": "Q", "a": "A", "ok": False}, columns={"prompt": "q", "completion": "a", "label": "ok"}).label
        is False
    )


def test_tool_calls_and_reasoning_come_into_one_form() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    openai = {
        "messages": [USER, called, {"role": "tool", "content": "3"}, {**GOOD, "reasoning": "because"}],
        "tools": "[]",
    }
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "A"},
        ]
    }
    one, other = row_of(openai), row_of(sharegpt)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert one.messages[1]["tool_calls"] == other.messages[1]["tool_calls"] == [call]
    assert one.messages[3] == {**GOOD, "reasoning_content": "because"} and one.tools is None
    parts = [{"type": "reasoning", "value": "why"}, {"type": "text", "value": "A"}]
    assert row_of({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1] == {
        **GOOD,
        "reasoning_content": "why",
    }


def test_rows_of_another_kind_say_what_to_do(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    for record, hint in ((PAIRS[0], "completion: chosen"), ({"prompt": "Q"}, "must be the assistant's")):
        path = write_rows(tmp_path / "r.jsonl", [record])
        with pytest.raises(BadRecord, match=hint):
            prepare(load_recipe(make_recipe(data={"train": [{"path": str(path)}]})), tmp_path / "run")


def test_saved_datasets_and_compressed_files(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    import pyarrow as pa

    rows = [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(40)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": whole, "test": whole.select(range(3))}).save_to_disk(tmp_path / "dict")
    with pa.output_stream(tmp_path / "r.jsonl.zst", compression="zstd") as stream:
        stream.write("".join(json.dumps(r) + "\n" for r in rows).encode())

    def read(**options: Any) -> list[str]:
        source = Source(**options)
        pieces = scan(source).pieces
        return [to_row(r, place, source).id for piece in pieces for place, r in read_piece(piece)]  # type: ignore[arg-type]

    expected = read(path=str(tmp_path / "saved"))
    assert len(set(expected)) == 40
    assert read(path=str(tmp_path / "r.jsonl.zst")) == expected
    assert read(path=str(tmp_path / "dict"), split="train") == expected
    assert read(path=str(tmp_path / "dict"), split="test", limit=2) == expected[:2]
    with pytest.raises(DataError, match="has no split 'None'; it has train, test"):
        read(path=str(tmp_path / "dict"))
    data = {"train": [{"path": str(tmp_path / "dict"), "split": "train"}]}
    prepared = prepare(load_recipe(make_recipe(data=data)), tmp_path / "run")
    assert read_rows(prepared.folder, "train")[0]["_source"] == f"{tmp_path / 'dict'}:train[1]"


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_columns_of_a_dataset_are_mapped(
    kind: str, make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list([{"question": f"Q{i}", "answer": f"A{i}"} for i in range(6)])
    rows.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(tmp_path / "saved"))
    source = {"path": str(tmp_path / "saved")} if kind == "saved" else {"hub": "org/rows@main"}
    source |= {"columns": {"prompt": "question", "completion": "answer"}}
    prepared = prepare(load_recipe(make_recipe(data={"train": [source]})), tmp_path / "run")
    stored = read_rows(prepared.folder, "train")
    assert [row["messages"][0]["content"] for row in stored] == [f"Q{i}" for i in range(6)]
    assert stored[5]["_source"].endswith("[6]") and stored[5]["messages"][1]["content"] == "A5"


def test_rows_of_a_named_benchmark_are_dropped(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's download is led to a set on this disk; all else is as it is with the hub."""
    question = "Bob drives seven miles to see his aunt in town three times a year; how many miles is that?"
    saved = datasets.Dataset.from_list([{"question": question, "answer": "7 * 2 * 3 = 42"}])
    asked = []

    def load(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options["split"]))
        return saved

    monkeypatch.setattr(datasets, "load_dataset", load)
    messages = [{"role": "user", "content": f"Please: {question}"}, {"role": "assistant", "content": "42"}]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": messages}, *colour_rows(4)])
    data = {"train": [{"path": str(path)}], "steps": [{"decontaminate": {"against": ["gsm8k"]}}]}
    prepared = prepare(load_recipe(make_recipe(data=data)), tmp_path / "run")
    assert prepared.counts["dropped"] == {"contaminated": 1}
    assert set(asked) == {("openai/gsm8k", "main", "test")}
    (line,) = map(json.loads, (prepared.folder / "dropped.jsonl").open())
    assert line["detail"].startswith("n-gram of openai/gsm8k:main:test[1], 64%: bob drives seven miles")


def test_documents_become_passages_that_stay_together(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    for n in range(12):
        paragraphs = [
            f"Paper {n} part {k}: " + " ".join(r["messages"][0]["content"] for r in colour_rows(3)) for k in range(4)
        ]
        (folder / f"{n:02}.md").write_text(f"# Paper {n}\n\n" + "\n\n".join(paragraphs))
    sources = [{"path": str(folder), "passages": {"characters": 300}}]
    method = {"type": "sft", "on": "text"}
    data = {"train": sources, "eval": {"fraction": 0.25, "near": None}}
    recipe = load_recipe(make_recipe(data=data, method=method))
    prepared = prepare(recipe, tmp_path / "run")
    sides = [{row["extra"]["document"] for row in read_rows(prepared.folder, part)} for part in ("train", "eval")]
    assert len(sides[0]) == 9 and len(sides[1]) == 3 and not sides[0] & sides[1]
    row = read_rows(prepared.folder, "train")[0]
    assert row["_source"].startswith(f"{row['extra']['document']}, ") and row["extra"]["position"]
    # Beside rows a README is no document.
    write_rows(folder / "rows.jsonl", [{"text": "alone"}])
    assert len(list(read_piece(scan(Source(path=str(folder))).pieces[0]))) == 1


def test_requests_for_a_teacher(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    records = [{"text": f"The {n} rent is due.", "question": "When?", "answer": "now"} for n in ("first", "last")]
    path = write_rows(tmp_path / "r.jsonl", records)
    own = {"task": "critiques", "instruction": "{passage} {answer}!"}
    tasks = [{"task": "questions", "count": 2}, {"task": "answers"}, own]
    data = {"train": [{"path": str(path), "format": "text"}], "requests": tasks}
    recipe = make_recipe(data=data, teacher={"model": "embedded:tiny-teacher"})
    prepared = prepare(load_recipe(recipe), tmp_path / "run")
    counts = prepared.counts
    assert (counts["requests"], counts["rows_out"], counts["train_rows"]) == (6, 2, 0)
    asked = read_rows(prepared.folder, "requests")
    assert [row["extra"]["task"] for row in asked] == ["questions", "answers", "critiques"] * 2
    assert "Write 2 questions" in asked[0]["messages"][1]["content"]
    assert asked[1]["messages"][1]["content"].endswith("Passage:\nThe first rent is due.\n\nQuestion: When?")
    assert asked[2]["messages"][1]["content"] == "The first rent is due. now!"
    assert {row["extra"]["passage"] for row in asked} == {record["text"] for record in records}
    write_rows(path, [{"text": "No question here."}])
    with pytest.raises(DataError, match=r"r\.jsonl:1: has no column 'question'; the task answers reads it"):
        prepare(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "other")


def test_hh_rlhf_keeps_every_shared_prompt(realdata: Path) -> None:
    path = realdata / "data/preference/hh_rlhf_harmless_a.jsonl"
    for number, line in enumerate(path.open(), 1):
        record = json.loads(line)
        row = row_of(record)
        rebuilt = "".join(
            f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
            for m in (*row.messages, *row.chosen)
        )
        assert rebuilt.split() == record["chosen"].split(), number
        assert row.messages[-1]["role"] == "user" and row.chosen != row.rejected
    assert number == 1156


def test_real_splits_never_straddle(realdata: Path, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """PubMedQA repeats contexts under other questions, MedQuAD asks 885 questions more than once."""
    lines = [json.loads(line) for line in (realdata / "data/medical/pubmedqa_pqal.jsonl").open()]
    rows = []
    for line in lines:
        context = "\n".join(line["CONTEXTS"])
        rows.append({"prompt": f"{context}\n{line['QUESTION']}", "completion": line["final_decision"]})
        rows.append({"prompt": f"{context}\nWhat was found?", "completion": line["LONG_ANSWER"]})
    pubmed = write_rows(tmp_path / "pubmed.jsonl", rows)
    medquad = {
        "path": str(realdata / "data/medical/medquad_nih.jsonl"),
        "columns": {"prompt": "question", "completion": "answer"},
    }
    for name, source in (("pubmed", {"path": str(pubmed)}), ("medquad", medquad)):
        data = {"train": [source], "eval": {"fraction": 0.2}, "too_long": "truncate", "on_bad_row": "drop"}
        train = {"seq_len": 4096, "tokens_per_step": 4096, "max_steps": 1, "device": "cpu"}
        recipe = load_recipe(make_recipe(data=data, train=train, model={"base": "embedded:tiny"}))
        prepared = prepare(recipe, tmp_path / name)
        sides = [read_rows(prepared.folder, part) for part in ("train", "eval")]
        assert 0.15 < len(sides[1]) / sum(map(len, sides)) < 0.21
        prompts = [{row["messages"][0]["content"].rsplit("\n", 1)[0] for row in side} for side in sides]
        assert not prompts[0] & prompts[1]
