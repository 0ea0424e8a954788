"""The verdict for every family that people use: role x purpose x licence, each with the clause that it rests on.

The expected verdicts were written down from the licences, not from the gate's answers.
"""

from __future__ import annotations

import pytest

from recipes.gate import judge
from recipes.schema import Use
from recipes.sources import asset_named

WORD = {"A": "allow", "O": "allow-with-obligations", "R": "review", "B": "block"}
ABOUT = {"monthly_active_users": 10_000, "annual_revenue_usd": 500_000.0, "territories": ("US",), "name": "Llama-acme"}

# id: verdicts as base for business, teacher for business, base for research, teacher for research; a clause.
# A allow, O allow with obligations, R a person decides, B block. The model is distributed.
FAMILIES = {
    "huggyllama/llama-7b": ("BBBB", None),  # the mirror was never checked, so it may only deny
    "meta-llama/Llama-2-7b-hf": ("OBOB", "1.b.v"),
    "codellama/CodeLlama-7b-hf": ("BBBB", "1.b.v"),  # family from memory
    "meta-llama/Meta-Llama-3-8B-Instruct": ("OBOB", "1.b.v"),
    "meta-llama/Meta-Llama-3.1-8B-Instruct": ("OOOO", "1.b.i"),
    "meta-llama/Llama-3.1-70B-Instruct": ("OOOO", "1.b.i"),
    "meta-llama/Llama-3.2-3B": ("OOOO", "1.b.i"),
    "meta-llama/Llama-3.3-70B-Instruct": ("OOOO", "1.b.i"),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": ("OOOO", "1.b.i"),
    "Qwen/Qwen-7B-Chat": ("OBOB", "5.b"),
    "Qwen/Qwen-1_8B-Chat": ("BBOB", "4.b"),
    "Qwen/Qwen1.5-72B-Chat": ("BBBB", None),
    "Qwen/Qwen2-72B-Instruct": ("OBOB", "5.b"),
    "Qwen/Qwen2.5-72B-Instruct": ("OOOO", "5.b"),
    "Qwen/Qwen2.5-3B-Instruct": ("BBOO", None),
    "Qwen/Qwen2.5-Coder-3B-Instruct": ("BBOO", None),
    "Qwen/Qwen2.5-7B-Instruct": ("OAOA", None),
    "Qwen/Qwen3-8B": ("OAOA", None),
    "Qwen/Qwen3-235B-A22B": ("OAOA", None),
    "Qwen/Qwen3.5-27B": ("OAOA", None),
    "deepseek-ai/DeepSeek-V2-Chat": ("OOOO", None),
    "deepseek-ai/DeepSeek-V3": ("OOOO", None),
    "deepseek-ai/DeepSeek-V3-0324": ("OAOA", None),
    "deepseek-ai/DeepSeek-V3.2": ("OAOA", None),
    "deepseek-ai/DeepSeek-R1": ("OAOA", None),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("OOOO", "1.b.i"),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": ("OOOO", "1.b.i"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("OAOA", None),
    "google/gemma-2-9b-it": ("OOOO", "3.1"),
    "google/gemma-3-27b-it": ("OOOO", "3.1"),
    "google/medgemma-4b-it": ("BBBB", None),
    "mistralai/Mistral-7B-Instruct-v0.3": ("OAOA", None),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("OAOA", None),
    "mistralai/Mistral-Nemo-Instruct-2407": ("OAOA", None),
    "mistralai/Mistral-Large-Instruct-2411": ("BBOO", None),
    "mistralai/Ministral-8B-Instruct-2410": ("BBOO", None),
    "mistralai/Codestral-22B-v0.1": ("BBOO", "3.2"),
    "microsoft/phi-4": ("OAOA", None),
    "moonshotai/Kimi-K2-Instruct": ("OAOA", None),
    "moonshotai/Kimi-Dev-72B": ("BBBB", None),
    "zai-org/GLM-4.5": ("OAOA", None),
    "zai-org/GLM-5.9": ("BBBB", None),  # a release that nobody has read
    "MiniMaxAI/MiniMax-M2.7": ("BBOO", None),
    "01-ai/Yi-34B": ("OAOA", None),
    "allenai/OLMo-2-1124-7B": ("OAOA", None),
    "EleutherAI/pythia-1.4b": ("OAOA", None),
    "openai/gpt-oss-20b": ("OAOA", None),
    "CohereForAI/c4ai-command-r-v01": ("BBOO", None),
    "databricks/dbrx-instruct": ("OBOB", "2.3"),
    "tiiuae/falcon-11B": ("OOOO", None),
    "bigscience/bloom-560m": ("OOOO", None),
    "bigcode/starcoder2-7b": ("OOOO", None),
    "ibm-granite/granite-3.3-8b-instruct": ("OAOA", None),
    "HuggingFaceTB/SmolLM2-1.7B": ("OAOA", None),
    "tencent/Hunyuan-A13B-Instruct": ("OBOB", "5"),
    "LGAI-EXAONE/EXAONE-4.0-32B": ("BBOB", None),
    "LGAI-EXAONE/EXAONE-Deep-7.8B": ("BBBB", None),
    "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B": ("RRRR", None),  # what it competes with is unsaid
    "ByteDance-Seed/Seed-OSS-36B-Instruct": ("OAOA", None),
    "xai-org/grok-1": ("OAOA", None),
}
CASES = [
    (name, role, purpose, code, clause)
    for name, (codes, clause) in FAMILIES.items()
    for (role, purpose), code in zip(
        [("base", "commercial"), ("teacher", "commercial"), ("base", "research"), ("teacher", "research")],
        codes,
        strict=True,
    )
]
SERVICES = {
    "openai:gpt-4o": "B",
    "openai/gpt-4o-mini": "B",
    "anthropic:claude-sonnet-4": "B",
    "gemini:gemini-2.5-pro": "B",
    "mistral:mistral-large-latest": "O",
    "xai:grok-4": "B",
    "deepseek:deepseek-chat": "O",
    "moonshot:kimi-latest": "B",
    "dashscope:qwen-max": "B",
    "cohere:command-a": "B",
    "azure:gpt-4o": "B",
    "bedrock:anthropic.claude-3": "B",
    "ollama:qwen3-coder:480b-cloud": "B",
    "myproxy:llama-3.3": "B",
    "https://api.openai.com/v1": "B",
    "http://localhost:8000/v1": "B",
}


@pytest.mark.parametrize(("name", "role", "purpose", "code", "clause"), CASES, ids=lambda v: str(v))
def test_model_families(name: str, role: str, purpose: str, code: str, clause: str | None) -> None:
    verdict = judge((asset_named(name, role),), Use(purpose=purpose, distribute=True, **ABOUT))  # type: ignore[arg-type]
    assert verdict.verdict == WORD[code], [r.sentence() for r in verdict.reasons]
    assert verdict.provisional
    if clause is not None and role == "teacher" and code in "BO":
        said = [str(r.clause) for r in verdict.reasons] + [str(d.clause) for d in verdict.obligations]
        assert any(clause in c for c in said), said


@pytest.mark.parametrize(("name", "code"), SERVICES.items())
@pytest.mark.parametrize("purpose", ["commercial", "research"])
def test_hosted_models(name: str, code: str, purpose: str) -> None:
    verdict = judge((asset_named(name, "teacher"),), Use(purpose=purpose, distribute=False, **ABOUT))  # type: ignore[arg-type]
    assert verdict.verdict == WORD[code], [r.sentence() for r in verdict.reasons]


def test_the_table_has_two_hundred_cases() -> None:
    assert len(CASES) + 2 * len(SERVICES) >= 200
