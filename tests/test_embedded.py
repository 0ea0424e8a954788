"""The embedded models: what is committed is whole, licensed, loadable offline, and as able as its card says."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.lineage import sha256_file, verify
from scripts.build_embedded import WINDOW, draw_documents, new_model
from scripts.corpus import arithmetic, general
from scripts.corpus.growth import grow
from scripts.corpus.induction import SOURCE, practice_batches
from scripts.corpus.measure import copy_accuracy, exact_match, heldout_loss, last_number_accuracy
from scripts.corpus.tokens import IGNORE, encode_documents, pack

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "recipes" / "embedded"
MODELS = {"tiny": (1_500_000, 2_800_000), "tiny-teacher": (6_500_000, 9_000_000)}
COPIES = 0.4
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "5", "reasoning_content": "2 and 3 more"},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "You are welcome."},
]


def read_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EMBEDDED / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED / "tiny")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32).eval() for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_bfloat16_of_the_stated_size(name: str) -> None:
    low, high = MODELS[name]
    with safe_open(EMBEDDED / name / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118  (the file handle is no dict)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    count = sum(tensor.numel() for tensor in tensors)
    assert low < count < high
    assert json.loads((EMBEDDED / name / "manifest.json").read_text())["parameters"] == count


def test_the_models_fit_in_25_megabytes() -> None:
    files = [path for name in MODELS for path in (EMBEDDED / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 25_000_000


@pytest.mark.parametrize("name", MODELS)
def test_manifest_hashes_every_file(name: str) -> None:
    manifest = json.loads((EMBEDDED / name / "manifest.json").read_text())
    on_disk = {p.name: sha256_file(p) for p in (EMBEDDED / name).iterdir() if p.name != "manifest.json"}
    assert manifest["files"] == on_disk
    assert set(on_disk) == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "LICENSE", "README.md"),
    }
    assert (manifest["kind"], manifest["name"], manifest["license"]) == ("model", name, "Apache-2.0")


@pytest.mark.parametrize("name", MODELS)
def test_licence_is_the_whole_apache_text_and_the_card_names_it(name: str) -> None:
    text = (EMBEDDED / name / "LICENSE").read_text()
    assert text == (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert (EMBEDDED / name / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_the_models_share_one_tokenizer_within_the_vocabulary_limit(tokenizer: Any, models: dict[str, Any]) -> None:
    assert len({(EMBEDDED / name / "tokenizer.json").read_bytes() for name in MODELS}) == 1
    assert len(tokenizer) <= 4096
    assert {model.config.vocab_size for model in models.values()} == {len(tokenizer)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and trailing  \n",
        "Grüße aus Zürich, naïve café, 東京都, عربى, 👩‍👩‍👧‍👦🏳️‍🌈",
        "tab\tnul\x00bell\x07escape\x1bdelete\x7f\r\nzero​width﻿bom",
        "price: EUR 1,234,567.89 on 2031-02-28",
        "<think>not special</think> é é",
        "".join(map(chr, range(1, 0x250))),
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_random_code_points_survive_the_tokenizer(tokenizer: Any) -> None:
    rng = random.Random(3)
    planes = [c for c in (rng.randrange(0x110000) for _ in range(4000)) if not 0xD800 <= c < 0xE000]
    text = "".join(map(chr, planes))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens_and_nothing_is_prepended(tokenizer: Any) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer("2031")["input_ids"]] == list("2031")
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"


def test_think_tags_are_one_token_each_and_stay_when_special_tokens_are_skipped(tokenizer: Any) -> None:
    ids = tokenizer("<think>\n5\n</think>\n5<|im_end|>")["input_ids"]
    assert len(ids) == 8
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n5\n</think>\n5"


@pytest.mark.parametrize("name", MODELS)
def test_generation_stops_at_the_end_of_a_turn_or_of_a_document(name: str, tokenizer: Any) -> None:
    config = json.loads((EMBEDDED / name / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert config["pad_token_id"] == tokenizer.pad_token_id


def test_template_renders_roles_and_thinking(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n2 and 3 more\n</think>\n 5<|im_end|>\n"
        "<|im_start|>user\nThanks.<|im_end|>\n"
        "<|im_start|>assistant\n You are welcome.<|im_end|>\n"
    )


@pytest.mark.parametrize("extra", [{}, {"reasoning_content": None}, {"reasoning_content": ""}])
def test_template_leaves_out_an_empty_thinking_block(tokenizer: Any, extra: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **extra}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Hello<|im_end|>\n"


def test_template_never_rewrites_earlier_turns(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    for end in range(1, len(CHAT)):
        assert whole.startswith(tokenizer.apply_chat_template(CHAT[:end], tokenize=False))
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="role must be system, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_generation_tags_mark_what_the_assistant_emits(tokenizer: Any) -> None:
    made = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
    trained = tokenizer.decode([token for token, mask in pairs if mask])
    assert trained == "<think>\n2 and 3 more\n</think>\n 5<|im_end|> You are welcome.<|im_end|>"


def test_arithmetic_rows_are_right_and_heldout_pairs_are_unseen() -> None:
    splits = {split: read_rows(f"arithmetic/{split}.jsonl") for split in ("train", "heldout")}
    assert (len(splits["train"]), len(splits["heldout"])) == (3000, 400)
    for rows in splits.values():
        assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
        for row in rows:
            reply = row["messages"][-1]
            assert reply["content"] == row["answer"]
            assert reply["reasoning_content"].split()[-1] == row["answer"]
    rng = random.Random(0)
    train = {arithmetic.draw(rng, heldout=False) for _ in range(20_000)}
    heldout = {arithmetic.draw(rng, heldout=True) for _ in range(5_000)}
    assert not {(p.operation, *sorted(p[1:])) for p in train} & {(p.operation, *sorted(p[1:])) for p in heldout}
    assert all(eval_steps(p) for p in train)
    assert all(ends_right(p) for p in train | heldout)


def ends_right(problem: arithmetic.Problem) -> bool:
    """Whether the counted steps hold: each line `left value` is one nearer to the answer, which stands at 0 left."""
    lines = [line for line in arithmetic.counted(problem).splitlines() if "=" not in line]
    pairs = [tuple(map(int, line.split())) for line in lines]
    if problem.operation == "multiply" or not pairs:
        return int(arithmetic.counted(problem).split()[-1]) == problem.answer
    step = 1 if problem.operation == "add" else -1
    return [value + step * left for left, value in pairs] == [problem.answer] * len(pairs) and [
        left for left, _ in pairs
    ] == list(range(problem.b % 10, -1, -1))


def eval_steps(problem: arithmetic.Problem) -> bool:
    """Whether every worked line holds."""
    for line in arithmetic.steps(problem).splitlines():
        left, equals, right = line.partition(" = ")
        if not equals:  # a product begins with its first summand
            continue
        values = {side: _value(side) for side in (left, right)}
        if len(set(values.values())) > 1:
            return False
    return True


def _value(side: str) -> int:
    parts = side.split()
    total = int(parts[0])
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
        total = {"+": total + int(number), "-": total - int(number), "x": total * int(number)}[sign]
    return total


def test_generators_repeat_themselves_for_a_seed() -> None:
    first, second = ([general.document(random.Random(seed)) for seed in range(20)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 20


@pytest.mark.slow
def test_the_base_answers_no_legal_question_and_a_few_problems(tokenizer: Any, models: dict[str, Any]) -> None:
    rows = random.Random(11).sample(read_rows("legal/heldout.jsonl"), 100)
    assert exact_match(models["tiny"], tokenizer, rows)["legal_exact_match"] < 0.15
    assert 0.005 < last_number_accuracy(models["tiny"], tokenizer, read_rows("arithmetic/heldout.jsonl")) < 0.40


@pytest.mark.slow
def test_the_teacher_answers_half_of_the_legal_rows_and_a_quarter_of_the_problems(
    tokenizer: Any, models: dict[str, Any]
) -> None:
    rows = random.Random(11).sample(read_rows("legal/heldout.jsonl"), 200)
    found = exact_match(models["tiny-teacher"], tokenizer, rows)
    assert found["legal_exact_match"] > 0.43 and found["legal_type"] > 0.7  # 0.53 and 0.84 where it was built
    assert last_number_accuracy(models["tiny-teacher"], tokenizer, read_rows("arithmetic/heldout.jsonl")) > 0.2


def test_the_base_copies_unknown_words(tokenizer: Any, models: dict[str, Any]) -> None:
    """A model that never copies still gets about 0.24: the commas."""
    assert copy_accuracy(models["tiny"], tokenizer, count=16) > COPIES


def test_practice_rows_ask_only_for_what_stands_in_the_row() -> None:
    ids, labels = next(practice_batches(8, range(6, 2048), seed=3))
    assert (labels[:, :SOURCE] == IGNORE).all() and (labels != IGNORE).float().mean() > 0.4
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        pairs = set(itertools.pairwise(row[:SOURCE]))
        asked = [(row[i - 1], token) for i, token in enumerate(wanted) if token != IGNORE]
        assert set(asked) <= pairs
        assert all(row[i] == token for i, token in enumerate(wanted) if token != IGNORE)


def test_a_grown_model_starts_like_the_small_one(tokenizer: Any, models: dict[str, Any]) -> None:
    torch.manual_seed(0)
    large = new_model("tiny-teacher", tokenizer)
    documents = [document for _, document in draw_documents(random.Random(5), 40)]
    windows = pack(encode_documents(tokenizer, documents), WINDOW)
    before = heldout_loss(large, windows)
    grow(models["tiny"], large)
    assert abs(heldout_loss(large, windows) - heldout_loss(models["tiny"], windows)) < 0.05 < before - 5


@pytest.mark.slow
def test_quick_build_writes_whole_artefacts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.build_embedded", "--quick", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "built in" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arithmetic", "tiny", "tiny-teacher"]
    for split in ("train", "heldout"):
        name = f"arithmetic/{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (EMBEDDED / name).read_bytes()
    for name in ("tiny", "tiny-teacher"):
        assert verify(tmp_path / name) == []
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
