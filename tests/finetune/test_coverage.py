"""What an adapter covers, on real models of many families: by what the modules are; gaps are refused with a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import build_model

from finetune.coverage import coverage, frozen, skeleton
from finetune.models import adapter_config
from recipes.errors import RecipeError
from recipes.load import load_recipe
from recipes.schema import Recipe

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def recipe(quantization: str = "none", **adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": "a/b", "quantization": quantization},
            "adapter": {"r": 4, **adapter},
            "data": {"train": [{"path": "x.jsonl"}]},
        }
    )


def adapted(model: Any, asked: Recipe) -> Any:
    from peft import get_peft_model

    assert asked.adapter is not None
    return get_peft_model(model, adapter_config(asked))


def made(family: str, **config: Any) -> Any:
    """A model of a family of transformers, two layers deep, with random weights."""
    torch.manual_seed(0)
    sizes = {} if family == "JetMoe" else SMALL
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes, **config))


def deepseek() -> Any:
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    return made("DeepseekV3", **heads, **experts, topk_group=1, first_k_dense_replace=1)


def qwen3_next() -> Any:
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    widths = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
    layers = ["linear_attention", "full_attention"]
    return made("Qwen3Next", num_experts_per_tok=2, layer_types=layers, **experts, **linear, **widths)


def jetmoe() -> Any:
    sizes = {key: value for key, value in SMALL.items() if key != "num_attention_heads"}
    return made("JetMoe", **sizes, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)


def granite() -> Any:
    return made("GraniteMoe", num_local_experts=4, num_experts_per_tok=2)


def gpt_oss() -> Any:
    return made("GptOss", head_dim=16, num_local_experts=4, num_experts_per_tok=2)


def mixture() -> Any:
    return made("Qwen3Moe", moe_intermediate_size=16, head_dim=16, num_experts=4, num_experts_per_tok=2)


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
        assert found["experts.down_proj"] == (2, 2) and found["q_proj"] == (2, 2)
        assert found["experts.gate_up_proj"] == ((2, 2) if reached.adapter == recipe().adapter else (0, 2))


def test_a_module_to_save_that_is_not_there_is_refused() -> None:
    asked = recipe(targets=["q_proj"], target_parameters=["mlp.experts.down_proj"], modules_to_save=["lm_hed"])
    with pytest.raises(RecipeError, match=r"\['lm_hed'\] match no module"):
        coverage(adapted(mixture(), recipe(targets=["q_proj"], target_parameters=["mlp.experts.down_proj"])), asked)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            jetmoe,
            "covers none of them; name their weights in adapter.target_parameters: [experts.input_",
        ),
        (
            granite,
            "covers none of them; name their weights in adapter.target_parameters: [experts.down_proj, ",
        ),
        (gpt_oss, "covers none of them; name their weights in adapter.target_parameters: [experts.down_proj, "),
        (qwen3_next, "all-linear leaves out 6 linear layers (shared_expert.down_proj, shared_expert.gate_proj, "),
        (deepseek, "all-linear leaves out 6 linear layers (mlp.down_proj, mlp.gate_proj, mlp.up_proj, shared_experts."),
    ],
)
def test_all_linear_that_leaves_out_experts_or_layers_is_refused_with_what_covers_them(
    build: Callable[[], Any], says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        coverage(adapted(build(), recipe()), recipe())
    assert says in str(caught.value)
    names = re.findall(r"target_parameters: \[(.*?)\]", str(caught.value))[0].split(", ")
    asked = recipe(target_parameters=names)
    model = adapted(build(), asked)
    rows = coverage(model, asked)
    left = {row["type"] for row in rows if row["adapted"] < row["total"]}
    assert not {kind for kind in left if "proj" in kind or kind.endswith("_linear")}, rows
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    idle = [n for n, p in model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert not [name for name in idle if "router" not in name and ".gate." not in name], idle


def test_a_quantised_base_is_told_to_do_without_them() -> None:
    asked = recipe("nf4")
    with pytest.raises(RecipeError, match="4-bit weights peft cannot adapt by name; do without them") as caught:
        coverage(adapted(deepseek(), asked), asked)
    lists = [found.split(", ") for found in re.findall(r"\[(.*?)\]", str(caught.value))]
    without = recipe("nf4", targets=lists[0], target_parameters=lists[1])
    found = {row["type"]: row for row in coverage(adapted(deepseek(), without), without)}
    assert found["experts.gate_up_proj"]["adapted"] == 1 and found["q_a_proj"]["adapted"] == 2
    assert found["shared_experts.up_proj"] == {
        "type": "shared_experts.up_proj",
        "total": 1,
        "adapted": 0,
        "why": "not among adapter.targets",
    }


def test_the_reason_is_what_the_module_is() -> None:
    """A convolution, a router, a vector of numbers, an embedding: none is a linear layer, and each is named."""
    asked = recipe(targets=["out_proj", "o_proj"], target_parameters=["experts.down_proj"])
    rows = coverage(adapted(qwen3_next(), asked), asked)
    why = {row["type"]: row["why"].partition(";")[0] for row in rows}
    assert why["conv1d"] == "convolution" and why["linear_attn"] == "no matrix" and why["gate"] == "no linear layer"
    assert why["shared_expert.up_proj"] == why["in_proj_qkvz"] == "not among adapter.targets"
    assert why["embed_tokens"] == "embedding" and by_type(rows)["linear_attn"] == (0, 1)
    line = frozen(rows)
    assert "conv1d (convolution)" in line and "embed_tokens (embedding)" in line and "out_proj" not in line


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"targets": ["q_proj", "nosuch"]}, "target 'nosuch' adapts no module"),
        ({"targets": ["nosuch"]}, "nosuch"),
        ({"target_parameters": ["mlp.nosuch"]}, "'mlp.nosuch' adapts no weight"),
        ({"modules_to_save": ["nosuch"]}, "['nosuch'] match no module"),
    ],
)
def test_a_name_that_means_nothing_is_refused_on_the_shapes_alone(
    adapter: dict[str, Any], says: str, tmp_path: Path
) -> None:
    base = build_model(tmp_path / "base")
    plain = {"name": "x", "model": {"base": str(base)}, "data": {"train": [{"path": "x.jsonl"}]}}
    asked = Recipe.model_validate({**plain, "adapter": {"r": 4, **adapter}})
    with pytest.raises(RecipeError) as caught:
        coverage(skeleton(asked), asked)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "adapter", "head"),
    [
        ("sft", "{}", (0, 1)),
        ("sft", "{dora: true, modules_to_save: [lm_head]}", (1, 1)),
        ("sft", "{init: pissa, r: 4}", (0, 1)),
        ("sft", "null", (1, 1)),
        ("reward", "{}", (1, 1)),
        ("reward", "null", (1, 1)),
    ],
)
def test_the_skeleton_has_the_sizes_of_the_model(
    method: str, adapter: str, head: tuple[int, int], tmp_path: Path
) -> None:
    """Counted without weights as it is counted with them."""
    build_model(tmp_path / "base")
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: x\nmodel: {{base: {tmp_path}/base}}\nmethod: {method}\nadapter: {adapter}\n"
        "data: {train: [{path: x.jsonl}]}\ntrain: {seq_len: 64}\n"
    )
    asked = load_recipe(path)
    shapes = skeleton(asked)
    assert shapes is not None and {p.device.type for p in shapes.parameters()} == {"meta"}
    rows = by_type(coverage(shapes, asked))
    assert rows["q_proj"] == (2, 2)
    assert rows["score" if method == "reward" else "lm_head"] == head
