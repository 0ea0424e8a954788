"""The gate on real public material: outputs of named models, adapters, cards, licence texts as people upload them."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.gate import judge
from recipes.schema import Use
from recipes.sources import asset_named
from recipes.texts import identify
from recipes.verdict import Verdict

USE = Use(
    purpose="commercial",
    distribute=False,
    monthly_active_users=10,
    annual_revenue_usd=1000.0,
    territories=("US",),
)


def asked(path: Path, role: str, stated: str | None = None) -> Verdict:
    return judge((asset_named(str(path), role, stated),), USE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "label", "writer"),
    [("code_alpaca_2k.jsonl", "Apache-2.0", "openai"), ("gpteacher_roleplay.jsonl", "MIT", "openai")],
)
def test_rows_of_a_forbidden_teacher_under_a_permissive_label(
    realdata: Path, name: str, label: str, writer: str
) -> None:
    verdict = asked(realdata / "gate" / "outputs" / name, "data", label)
    assert verdict.verdict == "block"
    blocked = [r for r in verdict.reasons if r.effect == "block" and writer in str(r.license)]
    assert blocked and name in blocked[0].via[0]  # the way from the file to its teacher is named


@pytest.mark.parametrize(
    ("generator", "licence"),
    [
        ("gpt4_0613", "openai-services-agreement"),
        ("claude-2", "anthropic-commercial"),
        ("Meta-Llama-3-8B-Instruct", "llama-3"),
        ("OpenHermes-2.5-Mistral-7B", None),
        ("Mixtral-8x7B-Instruct-v0.1", "apache-2.0"),
    ],
)
def test_rows_are_judged_by_their_generator(realdata: Path, generator: str, licence: str | None) -> None:
    verdict = asked(realdata / "gate" / "outputs" / "alpaca_eval" / f"{generator}.jsonl", "data", "CC-BY-4.0")
    about = [r for r in verdict.reasons if r.asset == generator]
    if licence == "apache-2.0":
        assert verdict.verdict == "allow" and [r.effect for r in about] == ["allow"]
    else:
        assert verdict.verdict == "block" and any(r.effect == "block" for r in verdict.reasons if r.role != "data")
        assert licence is None or any(r.license == licence for r in about)


def test_adapters_whose_base_is_a_local_path_are_unknown(realdata: Path) -> None:
    for name in ("AnHuanAo__qwythos-9b-math-sft", "EDLlyc__kangya-glm4-lora", "Hmbown__shannon-control-unit__3b-scu"):
        verdict = asked(realdata / "gate" / "cards" / name, "base")
        assert verdict.verdict == "block"
        assert any("models/" in asset for asset in verdict.unknown), verdict.unknown


def test_real_licence_texts_are_told(realdata: Path) -> None:
    named = {
        "apache-2.0": "apache-2.0",
        "bigscience-open-rail-m": "bigscience-openrail-m",
        "cc-by-nc-4.0": "cc-by-nc-4.0",
        "deepseek-la-1.0": "deepseek-model-1.0",
        "gemma-tou-2024-04-01": "gemma-terms",
        "llama-2-license-2023": "llama-2",
        "llama-3.1-license-2024": "llama-3.1",
        "mit": "mit",
        "tongyi-qianwen-2023": "tongyi-qianwen-2023",
    }
    for stem, licence in named.items():
        text = (realdata / "gate" / "licence_texts" / f"{stem}.txt").read_text()
        assert identify(text).licence == licence
        assert identify(text[: len(text) // 2]).licence is None  # half a licence is none
