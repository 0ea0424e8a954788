"""Rows: who signed them, wherever it stands; what they say of themselves; which files are read at all."""

from __future__ import annotations

import bz2
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from test_gate_evasions import asked, rows

from recipes.signatures import signatures

OWN = {"prompt": "a", "completion": "b"}
GPT = {**OWN, "generator": "gpt-4"}
LINE = (json.dumps(GPT) + "\n").encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows under a card that permits everything."""
    made = tmp_path / "set"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    return made


NAMES = (
    *(
        "dbrx",
        "minimax-m2.7",
        "bard",
        "copilot",
        "hunyuan-large",
        "EXAONE-4.0",
        "jamba",
        "sonnet-4",
        "nova-pro",
        "opus",
    ),
    *(
        "orca-2",
        "tulu-2",
        "zephyr",
        "codestral",
        "text-bison-001",
        "ChatGPT",
        "ernie-4.0",
        "Llama 3 70B",
        "acme-7b-chat",
    ),
    *("somebody/unknown-model", "openai:anything"),
)


@pytest.mark.parametrize("name", NAMES)
def test_models_in_a_column_that_may_name_products(folder: Path, name: str) -> None:
    assert asked(rows(folder / "d.jsonl", {**OWN, "model": name}), "data").verdict == "block"


@pytest.mark.parametrize(
    "row",
    [
        {"model": "Corolla"},
        {"model": "Nokia 3310"},
        {"model": "Samsung 65B TV"},
        {"model": "Toyota Corolla instruct"},
        {"model": "Falcon", "make": "Ford", "year": 1964},
        {"model": "320i", "brand": "BMW"},
        {"model": 5},
        {"model_answer": "The llama is an animal; GPT stands for GUID partition table."},
        {"source": "wikipedia"},
        {"source": "https://example.org/gpt-4"},
        {"author": "Claude"},
        {"author": "Claude Monet"},
        {"source": "o1"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"tools": [{"function": {"parameters": {"model": "gpt-4"}}}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"model": "gpt-4"}}}]}]},
    ],
    ids=str,
)
def test_products_people_and_contents_are_no_models(folder: Path, row: dict[str, Any]) -> None:
    assert asked(rows(folder / "d.jsonl", {**OWN, **row}), "data").verdict == "allow"
    assert list(signatures({**OWN, **row})) in ([], [("loose", "human")])


@pytest.mark.parametrize(
    "row",
    [
        {"completions": [{"model": "gpt-4", "response": "x"}]},
        {"answers": [{"model": "gpt-4", "answer": "x"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "model": "gpt-4"}]},
        {"chosen_model": "gpt-4"},
        {"rejected-model": "gpt-4"},
        {"model_a": "Qwen/Qwen3-8B", "model_b": "gpt-4"},
        {"generation_models": ["Qwen/Qwen3-8B", "gpt-4"]},
        {"response": {"status_code": 200, "body": {"object": "chat.completion", "model": "gpt-4o-2024-08-06"}}},
        {"distilabel_metadata": {"raw_input": {"model_name": "gpt-4"}}},
        {"metadata": '{"model": "gpt-4"}'},
        {"modelName": "gpt-4"},
        {"generator ": "gpt-4"},
        {"_generator": "gpt-4"},
        {"teacherModel": "gpt-4"},
        {"generator": {"model": {"name": "gpt-4"}, "temperature": 0.7}},
        {"generator": "Qwen/Qwen3-8B; gpt-4"},
        {"source": "gpt-4"},
        {"conversations": [{"from": "chatgpt", "value": "a"}]},
        {"meta": {"info": {"deep": [{"llm": "gpt-4"}]}}},
        {"licenses": ["cc-by-nc-4.0"]},
        {"_license": "cc-by-nc-4.0"},
        {"metadata": {"license": "cc-by-nc-4.0"}},
    ],
    ids=str,
)
def test_layouts_in_which_real_sets_name_their_writers(folder: Path, row: dict[str, Any]) -> None:
    assert asked(rows(folder / "d.jsonl", {**OWN, **row}), "data").verdict == "block"


def test_options_beside_a_models_name_are_no_models(folder: Path) -> None:
    good = {**OWN, "generator": {"name": "Qwen/Qwen3-8B", "temperature": 0.7}, "chosen_model": "human"}
    assert asked(rows(folder / "d.jsonl", good), "data").verdict == "allow"


@pytest.mark.parametrize(
    ("conversation", "licence"),
    [
        ({"title": "x", "mapping": {"a": {"id": "a", "message": {"author": {"role": "user"}}}}}, "openai-consumer"),
        ({"uuid": "x", "chat_messages": [{"sender": "assistant", "text": "hi"}]}, "anthropic-consumer"),
        ({"header": "Gemini Apps", "title": "Prompted hello"}, "google-consumer-genai"),
    ],
)
def test_web_exports_are_outputs_of_the_service(folder: Path, conversation: dict[str, Any], licence: str) -> None:
    (folder / "conversations.json").write_text(json.dumps([conversation]))
    for ref in (folder, folder / "conversations.json"):
        verdict = asked(ref, "data")
        assert verdict.verdict == "block" and any(r.license == licence and r.effect == "block" for r in verdict.reasons)


SPOKEN = (
    *(
        "I was created by OpenAI.",
        "I'm an AI developed by OpenAI.",
        "As ChatGPT, I cannot do that.",
        "Ich bin ChatGPT.",
    ),
    *(
        "My name is Claude and I like books.",
        "我是ChatGPT",
        "Je suis ChatGPT, un modèle d'OpenAI",
        "我是一个由OpenAI训练的模型",
    ),
)


@pytest.mark.parametrize("said", SPOKEN)
def test_an_assistant_that_names_itself(folder: Path, said: str) -> None:
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": said}]}
    for row in ({**OWN, "completion": said}, chat, {"prompt": "a", "chosen": said, "rejected": "b"}, {"text": said}):
        assert asked(rows(folder / "d.jsonl", row), "data").verdict == "review"
    about = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "Is that so?"}]}
    for row in (about, {"prompt": said, "completion": "b"}, {"instruction": said, "output": "b"}):
        assert asked(rows(folder / "d.jsonl", row), "data").verdict == "allow"


@pytest.mark.parametrize(
    "said",
    [
        "ChatGPT was created by OpenAI.",
        "My name is Claude Monet.",
        "ChatGPT是由OpenAI开发的。",
        "Je suis Claude Martin.",
    ],
)
def test_speaking_about_an_assistant_is_not_speaking_as_one(folder: Path, said: str) -> None:
    assert asked(rows(folder / "d.jsonl", {**OWN, "completion": said}), "data").verdict == "allow"


def test_notes_beside_rows_are_no_rows(folder: Path) -> None:
    rows(folder / "train.jsonl", OWN)
    (folder / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    assert asked(folder, "data").verdict == "allow"


def test_prepared_data_can_be_asked_about(folder: Path) -> None:
    from recipes.evidence import to_record
    from recipes.lineage import write_manifest
    from recipes.sources import asset_named

    rows(folder / "train.jsonl", OWN)
    rows(folder / "dropped.jsonl", GPT)  # left out of training
    (folder / "statistics.json").write_text("{}")
    lineage = [to_record(asset_named("openai/gsm8k", "data"))]
    write_manifest(folder, {"kind": "data", "lineage": lineage})
    assert asked(folder, "data").verdict == "allow"
    rows(folder / "train.jsonl", OWN, {**OWN, "generator": "gpt-4"})
    assert asked(folder, "data").verdict == "block"


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for name, row, verdict in (("good", OWN, "allow"), ("bad", GPT, "block")):
        folder = tmp_path / name
        datasets.DatasetDict({"train": datasets.Dataset.from_list([row] * 3)}).save_to_disk(str(folder))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        assert asked(folder, "data").verdict == verdict
        assert asked(folder / "train", "data").verdict == "block"  # no card, and not one row without a licence


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", LINE),
        ("x.jsonl.bz2", bz2.compress(LINE)),
        ("x.jsonl.xz", lzma.compress(LINE)),
        ("x.jsonlines", LINE),
        ("x", LINE),
        ("x.jsonl", b'{"prompt": "a", "completion": "b", "generator": "gpt-4"\n'),
        ("x.csv", b"prompt;completion;model\na;b;gpt-4\n"),
        ("x.csv", b"prompt,completion,model\na,b,gpt-4,zzz\n"),
        ("x.arrow", b"ARROW1"),
    ],
)
def test_files_that_preparation_does_not_read_are_unknown(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    for ref in (folder / name, folder):
        verdict = asked(ref, "data")
        assert verdict.verdict == "block" and str(ref) in verdict.unknown, ref
        assert verdict.reasons[0].remedy


def test_documents_are_text_and_have_no_writers(folder: Path) -> None:
    (folder / "contract.txt").write_text("1. Definitions\n\nIn this contract ...")
    assert asked(folder, "data").verdict == "allow"


@pytest.mark.parametrize("name", ["OpenHermes2_5.jsonl", "ultrachat_200k.jsonl", "alpaca/train/x.jsonl"])
def test_published_sets_are_known_by_name_from_outside_and_from_inside(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows(path, OWN)
    assert asked(path, "data").verdict == "block" and asked(folder, "data").verdict == "block"


@pytest.mark.parametrize(
    ("sources", "verdict"),
    [
        ("[original]", "allow"),
        ("[extended|other-gpt4]", "block"),
        ("[someone/unknown]", "review"),
        ("[extended]", "review"),
        ("[extended|tatsu-lab/alpaca]", "block"),
        ("[original, openai/gsm8k]", "allow"),
    ],
)
def test_what_data_grew_from_may_not_stay_unknown(folder: Path, sources: str, verdict: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\nsource_datasets: {sources}\n---\n")
    rows(folder / "d.jsonl", OWN)
    assert asked(folder, "data").verdict == verdict


def test_published_sets_by_a_bare_name() -> None:
    assert asked("gsm8k", "data").verdict == "allow"
    assert asked("alpaca", "data").verdict == "block" and asked("nobody-knows", "data").verdict == "block"
