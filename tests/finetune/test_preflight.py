"""The checks before the first step: what is printed and kept, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_train


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
    assert kept["probe"]["peak_memory_bytes"] > 10**8 and kept["disk"]["free_bytes"] > kept["disk"]["needed_bytes"]
    assert kept["adapter_check"]["reloads"] is True and kept["adapter_check"]["max_abs_change"] > 0
    assert (
        "frozen: embed_tokens (embedding); input_layernorm, norm, post_attention_layernorm (normalisation); "
        "lm_head (output head)"
    ) in done.stdout
    assert "trains: down_proj 2/2" in done.stdout and "ok: padding is not the end token" in done.stdout
