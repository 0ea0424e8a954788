"""Whose server a recipe asks: a service's terms bind whatever the recipe calls the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.endpoints import is_own
from recipes.gate import judge
from recipes.load import load_recipe
from recipes.sources import recipe_assets
from recipes.verdict import Verdict

OWN = "http://127.0.0.1:8000/v1"
USE = {"purpose": "commercial", "distribute": False, "competes_with": ["nobody"]}


def verdict(tmp_path: Path, attest: list[dict[str, Any]] | None = None, **parts: Any) -> Verdict:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    plan = {
        "name": "r",
        "use": USE,
        "model": {"base": "embedded:tiny"},
        "data": {"train": [{"path": str(tmp_path / "p.jsonl"), "license": "own"}]},
        **parts,
    }
    if attest:
        plan["attest"] = attest
    (tmp_path / "r.yaml").write_text(json.dumps(plan))
    recipe = load_recipe(tmp_path / "r.yaml")
    return judge(recipe_assets(recipe), recipe.use, recipe.attest)


def taught(
    tmp_path: Path, url: str, served_as: str | None = None, model: str = "Qwen/Qwen3-32B", **more: Any
) -> Verdict:
    http = {"urls": [OWN, url], **({"served_as": served_as} if served_as else {})}
    teacher = {"model": model, "engine": {"http": http}}
    return verdict(tmp_path, teacher=teacher, method={"type": "distill", "mode": "sequence"}, **more)


@pytest.mark.parametrize(
    ("url", "served_as", "licence"),
    [
        ("https://api.openai.com/v1", "gpt-4o", "openai-services-agreement"),
        ("https://api.openai.com/v1", None, "openai-services-agreement"),
        ("https://API.OpenAI.com./v1", None, "openai-services-agreement"),
        ("https://api.anthropic.com/v1", None, "anthropic-commercial"),
        ("https://x.openai.azure.com/v1", None, "azure-openai"),
        (OWN, "gpt-4o", "openai-services-agreement"),
        (OWN, "openrouter/anthropic/claude-3-opus", "anthropic-commercial"),
        (OWN, "meta-llama/Llama-2-70b-chat-hf", "llama-2"),
        (OWN, "Llama-2-70b-chat-hf", "llama-2"),
    ],
)
def test_a_service_and_another_models_name_count(tmp_path: Path, url: str, served_as: str | None, licence: str) -> None:
    found = taught(tmp_path, url, served_as)
    assert found.verdict in {"block", "review"}
    assert any(r.license == licence and r.role == "teacher" and r.effect == found.verdict for r in found.reasons)


@pytest.mark.parametrize(
    "url",
    [OWN, "http://10.0.0.5/v1", "http://[::1]:8000/v1", "http://gpu-01:8000/v1", "https://vllm.acme.internal/v1"],
)
@pytest.mark.parametrize("served_as", [None, "teacher", "qwen3-32b", "Qwen/Qwen3-32B"])
def test_a_server_of_ones_own_adds_nothing(tmp_path: Path, url: str, served_as: str | None) -> None:
    found = taught(tmp_path, url, served_as)
    assert found.verdict == "allow" and [r.asset for r in found.reasons if r.role == "teacher"] == ["Qwen/Qwen3-32B"]


def test_a_public_server_of_nobody_known_waits_for_a_person(tmp_path: Path) -> None:
    url = "https://llm.example.com/v1"
    found = taught(tmp_path, url)
    assert found.verdict == "review" and found.reasons[0].asset == "llm.example.com"
    assert "attest to 'llm.example.com'" in str(found.reasons[0].remedy)
    decided = {"asset": "llm.example.com", "who": "J. Roe", "when": "2026-11-01", "why": "our own cluster"}
    assert taught(tmp_path, url, attest=[decided]).verdict == "allow-with-obligations"


def test_a_service_that_the_recipe_names_is_judged_once(tmp_path: Path) -> None:
    found = taught(tmp_path, "https://api.deepseek.com/v1", model="deepseek:deepseek-chat")
    assert found.verdict == "allow-with-obligations"
    assert [r.asset for r in found.reasons if r.role == "teacher"] == ["deepseek:deepseek-chat"]


def test_the_server_of_a_judge_counts_as_well(tmp_path: Path) -> None:
    def marked(url: str) -> Verdict:
        reward = {"judge": {"model": "Qwen/Qwen3-32B", "url": url}}
        return verdict(tmp_path, method={"type": "grpo", "rewards": [reward]})

    assert marked(OWN).verdict == "allow"
    found = marked("https://api.openai.com/v1")
    assert found.verdict == "review"
    assert any(r.role == "judge" and r.license == "openai-services-agreement" for r in found.reasons)


def test_which_addresses_are_ones_own() -> None:
    own = ["localhost", "127.0.0.1", "::1", "192.168.1.4", "fd00::2", "fe80::1%eth0", "gpu", "a.b.svc.cluster.local"]
    assert all(map(is_own, own)) and not any(map(is_own, ["8.8.8.8", "acme.com", "a.local.example.org", ""]))
