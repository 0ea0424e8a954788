"""The checks before the first step, on real models: coverage, experts, special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_train

from finetune.models import adapter_config
from finetune.preflight import coverage
from recipes.errors import RecipeError
from recipes.schema import Recipe


def recipe(**adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": "a/b"},
            "adapter": {"r": 4, **adapter} if adapter is not None else None,
            "data": {"train": [{"path": "x.jsonl"}]},
        }
    )


def adapted(model: Any, asked: Recipe) -> Any:
    from peft import get_peft_model

    assert asked.adapter is not None
    return get_peft_model(model, adapter_config(asked))


def mixture() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


def by_type(rows: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {r["type"]: (r["adapted"], r["total"]) for r in rows}


def test_coverage_counts_layers_and_says_why_the_rest_is_frozen() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, **small))
    asked = recipe(targets=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    rows = coverage(adapted(model, asked), asked)
    found = by_type(rows)
    assert found["q_proj"] == found["v_proj"] == (3, 3) and found["k_proj"] == (0, 3)
    assert found["lm_head"] == (1, 1) and found["embed_tokens"] == (0, 1)
    why = {r["type"]: r["why"] for r in rows}
    assert why["k_proj"] == "not among adapter.targets" and why["norm"].startswith("normalisation")
    assert why["embed_tokens"].startswith("embedding") and why["q_proj"] == ""


def test_an_adapter_that_misses_the_experts_is_refused() -> None:
    asked = recipe(targets=["q_proj", "v_proj"])
    with pytest.raises(RecipeError, match=r"experts and the adapter covers none of them; name .*target_parameters"):
        coverage(adapted(mixture(), asked), asked)
    for reached in (recipe(), recipe(targets=["q_proj"], target_parameters=["mlp.experts.down_proj"])):
        found = by_type(coverage(adapted(mixture(), reached), reached))
        assert found["experts"] == (2, 2) and found["q_proj"] == (2, 2)


def test_a_module_to_save_that_is_not_there_is_refused() -> None:
    asked = recipe(targets=["q_proj"], target_parameters=["mlp.experts.down_proj"], modules_to_save=["lm_hed"])
    with pytest.raises(RecipeError, match=r"\['lm_hed'\] match no module"):
        coverage(adapted(mixture(), recipe(targets=["q_proj"], target_parameters=["mlp.experts.down_proj"])), asked)


@pytest.mark.slow
def test_preflight_is_printed_kept_and_finds_bad_targets(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe_path = make_recipe(train={"tokens_per_step": 512, "seq_len": 128, "max_steps": 2, "device": "cpu"})
    wrong = run_train(recipe_path, "--set", "adapter.targets=[q_proj, w_qkv]")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert "w_qkv" in wrong.stderr
    none = run_train(recipe_path, "--set", "adapter.targets=[w_qkv]")
    assert none.returncode == 2 and "Traceback" not in none.stderr and "w_qkv" in none.stderr
    done = run_train(recipe_path)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert by_type(kept["coverage"])["q_proj"] == (2, 2)
    # r * (in + out) per layer: q 96, o 96, k 72, v 72, gate 144, up 144, down 144 -> 768 * r=4 * 2 layers
    assert kept["trainable_parameters"] == 4 * 768 * 2
    assert 0.05 < kept["trained_token_share"] < 0.15 and all(item["ok"] for item in kept["special_tokens"])
    assert kept["probe"]["peak_memory_bytes"] > 10**8 and kept["disk"]["free_bytes"] > kept["disk"]["needed_bytes"]
    assert kept["adapter_check"]["reloads"] is True and kept["adapter_check"]["max_abs_change"] > 0
    assert "trains: down_proj 2/2" in done.stdout and "ok: padding is not the end token" in done.stdout
