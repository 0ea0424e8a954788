"""What a licence grants only by agreement, and what no name of a service can be."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.facts import MAY_ALLOW, facts
from recipes.gate import judge
from recipes.schema import Use
from recipes.sources import asset_named
from recipes.verdict import Verdict

SEED = "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B"
ABOUT = {"monthly_active_users": 10, "annual_revenue_usd": 1000.0, "territories": ("KR",)}


def asked(model: str, role: str = "base", purpose: str = "commercial", distribute: bool = False, **use: Any) -> Verdict:
    stated = Use(purpose=purpose, distribute=distribute, **{**ABOUT, **use})  # type: ignore[arg-type]
    return judge((asset_named(model, role),), stated)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["base", "teacher"])
@pytest.mark.parametrize("purpose", ["commercial", "internal", "research"])
def test_whether_it_competes_is_asked_and_decides(role: str, purpose: str) -> None:
    unsaid = asked(SEED, role, purpose)
    assert (unsaid.verdict, unsaid.unknown) == ("review", ("use.competes_with",))
    assert unsaid.reasons[0].clause == "4" and "[] for none" in str(unsaid.reasons[0].remedy)
    rival = asked(SEED, role, purpose, competes_with=("Naver Search",))
    assert (rival.verdict, rival.reasons[0].clause) == ("block", "4")
    assert asked(SEED, role, purpose, competes_with=("papago",)).verdict == "review"  # who owns it nobody wrote down
    assert asked(SEED, role, purpose, competes_with=()).verdict == "allow-with-obligations"


@pytest.mark.parametrize(
    ("name", "purpose", "distribute", "verdict", "clause"),
    [
        ("LGAI-EXAONE/K-EXAONE-236B-A23B", "commercial", True, "block", "2.2"),
        ("LGAI-EXAONE/K-EXAONE-236B-A23B", "internal", True, "block", "2.2"),
        ("LGAI-EXAONE/K-EXAONE-236B-A23B", "research", True, "allow-with-obligations", "2.1, 2.2"),
        ("LGAI-EXAONE/K-EXAONE-236B-A23B", "commercial", False, "allow", "2.1, 2.2"),
        ("LGAI-EXAONE/EXAONE-Deep-7.8B", "research", True, "block", "2.2"),
        ("LGAI-EXAONE/EXAONE-Deep-7.8B", "research", False, "allow-with-obligations", "2.1, 3.1"),
    ],
)
def test_handing_on_by_agreement(name: str, purpose: str, distribute: bool, verdict: str, clause: str) -> None:
    found = asked(name, "base", purpose, distribute, name="K-EXAONE-acme")
    assert found.verdict == verdict and found.reasons[0].clause == clause, found.reasons
    if verdict == "block":
        assert found.reasons[0].forbidden and "agreement with LG" in str(found.reasons[0].remedy)


@pytest.mark.parametrize(
    "name", ["openai:gpt-4o", "openai/gpt-4o", "mistralai/mistral-large-2411", "deepseek:deepseek-chat"]
)
@pytest.mark.parametrize("purpose", ["commercial", "research"])
def test_a_service_is_no_base(name: str, purpose: str) -> None:
    found = asked(name, "base", purpose)
    assert found.verdict == "block" and "hosted model is no base" in found.reasons[0].says
    assert found.reasons[0].remedy == "name a model whose weights you have: a hub id or a folder"


def test_every_rule_that_can_allow_names_its_clause() -> None:
    silent = [
        f"{licence.id} {rule.clause!r}"
        for licence in facts().licences.values()
        for rule in ([licence.commercial] if licence.kind != "service" else []) + [licence.outputs]
        if licence.depth(rule) in MAY_ALLOW
        and rule.rule not in {"forbidden", "silent", "competing"}
        and not rule.clause
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("role", "name", "verdict", "clause"),
    [
        ("teacher", "meta-llama/Llama-2-7b-hf", "block", "1.b.v"),
        (
            "teacher",
            "anthropic:claude-sonnet-4",
            "block",
            "Usage Policy, Do Not Abuse our Platform; Commercial Terms D.4",
        ),
        ("teacher", "openai:gpt-4o", "block", None),
        ("base", "openai:gpt-4o", "block", None),
        ("base", "Qwen/Qwen2.5-3B", "block", "1.i, 2"),
        ("base", "Qwen/Qwen3-8B", "not judged", None),
        ("base", "meta-llama/Llama-3.1-8B", "not judged", None),  # its questions are of a hand-over
        ("data", "nobody/knows-these-rows", "not judged", None),
    ],
)
def test_without_use_a_plain_ban_blocks(role: str, name: str, verdict: str, clause: str | None) -> None:
    found = judge((asset_named(name, role),), None)  # type: ignore[arg-type]
    assert found.verdict == verdict and found.obligations == ()
    if verdict == "block":
        assert clause is None or found.reasons[0].clause == clause
        asks = str(found.reasons[0].remedy).endswith("or say in `use` what the model is for")
        assert asks == (found.reasons[0].license is not None)
    elif role == "data":
        assert found.unknown == (name,)
