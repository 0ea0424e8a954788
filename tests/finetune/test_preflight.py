"""The checks before the first step: what is printed and kept, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_train

from data_prep.assemble import read_rows
from data_prep.tokens import load_tokenizer
from finetune.preflight import special_tokens
from recipes.errors import DataError
from recipes.schema import Recipe


@pytest.mark.slow
def test_preflight_is_printed_kept_and_finds_bad_targets(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe_path = make_recipe(train={"tokens_per_step": 512, "seq_len": 128, "max_steps": 2, "device": "cpu"})
    wrong = run_train(recipe_path, "--set", "adapter.targets=[q_proj, w_qkv]")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert "target 'w_qkv' adapts no module" in wrong.stderr and "loading" not in wrong.stdout
    none = run_train(recipe_path, "--set", "adapter.targets=[w_qkv]")
    assert none.returncode == 2 and "Traceback" not in none.stderr and "w_qkv" in none.stderr
    assert "loading" not in none.stdout
    done = run_train(recipe_path)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert next(c for c in kept["coverage"] if c["type"] == "q_proj")["adapted"] == 2
    # r * (in + out) per layer: q 96, o 96, k 72, v 72, gate 144, up 144, down 144 -> 768 * r=4 * 2 layers
    assert kept["trainable_parameters"] == 4 * 768 * 2
    assert 0.05 < kept["trained_token_share"] < 0.15 and all(item["ok"] for item in kept["special_tokens"])
    lengths = [row["input_ids"] for row in read_rows(tmp_path / "run" / "data", "eval")]
    probe = kept["probe"]  # 12 rows are held out, 8 of them measured, all of which fit into one batch
    assert probe["eval_rows"] == 8 and probe["eval_answer_tokens"] == 6
    assert probe["eval_tokens"] % 8 == 0 and probe["eval_tokens"] // 8 in map(len, lengths)
    assert f"longest measurement: 8 held-out rows, {probe['eval_tokens']:,} tokens, and answers of 6 in" in done.stdout
    assert kept["probe"]["peak_memory_bytes"] > 10**8 and kept["disk"]["free_bytes"] > kept["disk"]["needed_bytes"]
    assert kept["adapter_check"]["reloads"] is True and kept["adapter_check"]["max_abs_change"] > 0
    assert (
        "frozen: embed_tokens (embedding); input_layernorm, norm, post_attention_layernorm (normalisation); "
        "lm_head (output head)"
    ) in done.stdout
    assert "trains: down_proj 2/2" in done.stdout and "ok: padding is not the end token" in done.stdout


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("<|im_end|>", ["ok", "ok"]),
        ("<|eot|>", ["ok", "LOOK"]),  # ends the turn, and the base stops elsewhere
        ("</think>", "the loss ends with '</think>', which ends no turn"),
        (
            "red",
            "which ends no turn, so the model would not learn to stop; look at it with retort prepare --show-masks",
        ),
    ],
)
def test_the_loss_ends_with_what_ends_a_turn(end: str, says: Any, tiny_model: Path) -> None:
    asked = Recipe.model_validate(
        {"name": "x", "model": {"base": str(tiny_model)}, "data": {"train": [{"path": "x.jsonl"}]}}
    )
    tokenizer = load_tokenizer(asked.model)
    tokenizer.backend.add_tokens(["</think>"])
    tokenizer.backend.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    ids = tokenizer.backend("<|im_start|>assistant\nblue" + end, add_special_tokens=False)["input_ids"]
    row = {"_id": "1", "_source": "r.jsonl:1", "text": None, "input_ids": ids, "cut_tokens": 0}
    row["loss_mask"] = [i > 2 for i in range(len(ids))]
    cut, plain = {**row, "cut_tokens": 3, "loss_mask": [False] * len(ids)}, {**row, "text": "red", "input_ids": [9] * 9}
    rows = [row, cut, plain]
    if isinstance(says, str):
        with pytest.raises(DataError) as caught:
            special_tokens(tokenizer, rows, asked)
        assert str(caught.value).startswith("r.jsonl:1 (row 1): the loss ends with") and says in str(caught.value)
    else:
        found = special_tokens(tokenizer, rows, asked)[:2]
        assert ["ok" if item["ok"] else "LOOK" for item in found] == says
        assert found[0]["detail"] == f"1 rows end with '{end}'"
