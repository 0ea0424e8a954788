"""Evasions and honest mistakes: each must get the verdict that a careful lawyer would give."""

from __future__ import annotations

import json
import struct
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import GateError, RecipeError
from recipes.facts import facts
from recipes.gate import judge
from recipes.load import load_recipe
from recipes.papers import local_data
from recipes.schema import Attest, Use
from recipes.sources import asset_named, recipe_assets
from recipes.verdict import Verdict

FULL = {"monthly_active_users": 10_000, "annual_revenue_usd": 500_000.0, "territories": ("US",)}
COMMERCIAL = Use(purpose="commercial", distribute=False, **FULL)  # type: ignore[arg-type]
MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    'documentation files (the "Software"), to deal in the Software without restriction, including without limitation '
    "the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and "
    "to permit persons to whom the Software is furnished to do so, subject to the following conditions:\n\n"
    "The above copyright notice and this permission notice shall be included in all copies or substantial portions of "
    'the Software.\n\nTHE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING '
    "BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO "
    "EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN "
    "ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR "
    "OTHER DEALINGS IN THE SOFTWARE.\n"
)


def asked(ref: str | Path, role: Any = "teacher", use: Use = COMMERCIAL) -> Verdict:
    return judge((asset_named(str(ref), role),), use)


def model(folder: Path, card: str | None = None, base: str | None = None, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# Model\n")
    if base is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def gguf(path: Path, **strings: str) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    body = b"".join(text(k.replace("__", ".")) + struct.pack("<I", 8) + text(v) for k, v in strings.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(strings)) + body)
    return path


def rows(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_renamed_copy_is_known_by_its_licence_text_and_else_unknown(tmp_path: Path) -> None:
    bare = model(tmp_path / "acme-7b")
    assert asked(bare).verdict == "block"
    assert asked(bare).unknown == (str(bare),)
    named = model(tmp_path / "named", config={"model_type": "llama", "_name_or_path": "meta-llama/Llama-2-7b-hf"})
    assert any(r.license == "llama-2" and r.effect == "block" for r in asked(named).reasons)


@pytest.mark.parametrize(
    ("card", "forbids"),
    [
        ("license: apache-2.0\nbase_model: meta-llama/Llama-2-13b-hf", "llama-2"),
        ("license: apache-2.0\nbase_model: mistralai/Pixtral-Large-Instruct-2411", "mrl-0.1"),
        ("license: apache-2.0\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct", "qwen-research-2024"),
        ("license: mit\nbase_model:\n- Qwen/Qwen3-8B\n- meta-llama/Meta-Llama-3-8B", "llama-3"),
        ("license: apache-2.0\nbase_model: Qwen/Qwen3-8B\ndatasets:\n- tatsu-lab/alpaca", "openai-consumer"),
        ("license: other\nlicense_name: exaone\nlicense_link: LICENSE", "exaone-1.1-nc"),
    ],
)
def test_a_permissive_label_does_not_free_what_it_was_made_from(tmp_path: Path, card: str, forbids: str) -> None:
    verdict = asked(model(tmp_path / "m", card))
    assert verdict.verdict == "block"
    assert any(r.license == forbids and r.effect == "block" for r in verdict.reasons), verdict.reasons


def test_adapters_follow_their_base(tmp_path: Path) -> None:
    assert asked(model(tmp_path / "a", "license: mit", "meta-llama/Llama-2-7b-hf")).verdict == "block"
    local = asked(model(tmp_path / "b", "license: mit", "/home/somebody/models/llama"), role="base")
    assert local.verdict == "block" and local.unknown == ("/home/somebody/models/llama",)
    assert asked(model(tmp_path / "c", "license: mit", "Qwen/Qwen3-8B"), role="base").verdict == "allow"
    assert asked(model(tmp_path / "d", None, "Qwen/Qwen3-8B"), role="base").verdict == "review"
    torn = model(tmp_path / "e", "license: mit\nbase_model: Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
    assert asked(torn, role="base").verdict == "review"


def test_gguf_files(tmp_path: Path) -> None:
    url = "general__base_model__0__repo_url"
    clean = gguf(tmp_path / "q.gguf", general__license="apache-2.0", **{url: "https://huggingface.co/Qwen/Qwen3-8B"})
    assert asked(clean).verdict == "allow"
    labelled = gguf(
        tmp_path / "l.gguf", general__license="apache-2.0", **{url: "https://huggingface.co/meta-llama/Llama-2-7b-hf"}
    )
    assert any(r.license == "llama-2" and r.effect == "block" for r in asked(labelled).reasons)
    assert asked(gguf(tmp_path / "n.gguf", general__license="apache-2.0")).verdict == "block"
    (tmp_path / "t.gguf").write_bytes(b"GGUF\x03\0\0")
    with pytest.raises(Exception, match="no readable GGUF"):
        asked(tmp_path / "t.gguf")


@pytest.mark.parametrize("licence", ["other", "unknown", "", "acme-1.0", "modified-mit"])
def test_an_unknown_licence_blocks(tmp_path: Path, licence: str) -> None:
    verdict = asked(model(tmp_path / "m", f"license: {licence}"), role="base")
    assert verdict.verdict == "block" and verdict.unknown


def test_a_licence_text_with_an_added_paragraph_is_another_licence(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: mit")
    (folder / "LICENSE").write_text(f"MIT License\n\nCopyright (c) 2026 Somebody\n\n{MIT}")
    assert asked(folder).verdict == "allow"
    added = (
        "\nOur only modification: whoever earns more than twenty million dollars a month shows our name on every page."
    )
    (folder / "LICENSE").write_text(MIT + added * 2)
    assert asked(folder).verdict == "block"


def test_a_tag_against_a_licence_text_needs_a_person(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    (folder / "LICENSE").write_text(MIT)
    assert asked(folder).verdict == "review"


@pytest.mark.parametrize(
    ("ref", "verdict"),
    [
        (" Qwen/QWEN3-8b ", "allow"),
        ("Ｑｗｅｎ/Qwen3-8B", "allow"),
        ("Qwеn/Qwen3-8B", "block"),
        ("meta-IIama/Llama-3.1-8B", "block"),
        ("https://huggingface.co/Qwen/Qwen3-8B", "allow"),
        ("unsloth/Qwen3-8B-bnb-4bit", "allow"),
        ("bartowski/Qwen_Qwen3-8B-GGUF", "allow"),
        ("TheBloke/Llama-2-7B-Chat-GGUF", "block"),
        ("TheBloke/Llama-2-13B-AWQ", "block"),
        ("somebody/Qwen3-8B-legal", "block"),
        ("somebody/brand-new-model", "block"),
        ("deepseek-ai/DeepSeek-V9", "block"),
    ],
)
def test_names(ref: str, verdict: str) -> None:
    assert asked(ref).verdict == verdict


def test_a_look_alike_is_told() -> None:
    assert any("meta-llama" in str(r.remedy) for r in asked("meta-IIama/Llama-3.1-8B").reasons)


def test_an_old_revision_of_a_relicensed_model_needs_its_text() -> None:
    assert asked("01-ai/Yi-34B", "base").verdict == "allow"
    assert asked("01-ai/Yi-34B@" + "a" * 40, "base").verdict == "review"


def test_rows_are_judged_by_who_wrote_them(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    own = {"prompt": "a", "completion": "b"}
    good, bad = {**own, "generator": "Qwen/Qwen3-32B"}, {**own, "generator": "gpt-4o"}
    assert asked(rows(tmp_path / "own.jsonl", own, own), "data").verdict == "allow"
    assert asked(rows(tmp_path / "good.jsonl", good), "data").verdict == "allow"
    assert asked(rows(tmp_path / "mix.jsonl", *[good] * 99, bad), "data").verdict == "block"
    assert asked(rows(tmp_path / "half.jsonl", good, own), "data").verdict == "block"
    assert asked(rows(tmp_path / "who.jsonl", {**own, "_teacher": "acme-secret"}), "data").verdict == "block"
    assert asked(rows(tmp_path / "phone.jsonl", {**own, "model": "Nokia 3310"}), "data").verdict == "allow"
    spoken = {**own, "completion": "I'm ChatGPT, a model by OpenAI."}
    assert asked(rows(tmp_path / "self.jsonl", own, spoken), "data").verdict == "review"
    mixed = {**own, "license": "[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/)"}
    assert asked(rows(tmp_path / "nc.jsonl", {**own, "license": "CC BY 4.0"}, mixed), "data").verdict == "block"


def test_published_sets_are_known_by_the_name_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    verdict = asked(rows(tmp_path / "ultrachat_200k.jsonl", {"prompt": "a", "completion": "b"}), "data")
    assert verdict.verdict == "block" and any("openai" in str(r.license) for r in verdict.reasons)


@pytest.mark.parametrize(
    ("ref", "verdict"),
    [
        ("stingning/ultrachat", "block"),
        ("Open-Orca/OpenOrca", "block"),
        ("tatsu-lab/alpaca", "block"),
        ("Magpie-Align/Magpie-Pro-300K", "block"),
        ("OpenAssistant/oasst1", "allow"),
        ("somebody/rows", "block"),
    ],
)
def test_published_sets(ref: str, verdict: str) -> None:
    assert asked(ref, "data").verdict == verdict


def recipe(
    tmp_path: Path, base: str, teacher: str, use: str = "purpose: commercial, distribute: true", more: str = ""
) -> Any:
    data = rows(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"})
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: r\nuse: {{{use}, monthly_active_users: 100, annual_revenue_usd: 1000.0, territories: [US]}}\n"
        f"model: {base if base.startswith('{') else '{base: ' + base + '}'}\nteacher: {{model: '{teacher}'}}\n"
        f"data: {{train: [{{path: {data}, license: CC0-1.0}}]}}\n{more}"
    )
    return load_recipe(path)


@pytest.mark.parametrize(
    ("base", "teacher", "name", "verdict"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf", "x", "allow-with-obligations"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3-70B", "Llama-x", "block"),
        ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-70B", "acme-med", "allow-with-obligations"),
        ("Qwen/Qwen3-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "Llama-x", "allow-with-obligations"),
        ("Qwen/Qwen3-8B", "tencent/Hunyuan-A13B-Instruct", "x", "block"),
        ("tencent/Hunyuan-A13B-Instruct", "tencent/Hunyuan-A13B-Instruct", "x", "allow-with-obligations"),
        ("naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B", "meta-llama/Llama-3.1-70B", "Llama-x", "block"),
        ("Qwen/Qwen3-8B", "anthropic:claude-sonnet-4", "x", "block"),
    ],
)
def test_pairs_of_teacher_and_student(tmp_path: Path, base: str, teacher: str, name: str, verdict: str) -> None:
    plan = recipe(tmp_path, base, teacher, f"purpose: commercial, distribute: true, name: {name}, competes_with: []")
    made = judge(recipe_assets(plan), plan.use, plan.attest)
    assert made.verdict == verdict, [r.sentence() for r in made.reasons]
    if name == "acme-med":  # trained it may be; given to others under this name not
        assert [d.met for d in made.obligations if d.type == "name_prefix"] == [False]


def test_what_a_licence_depends_on_is_asked_for_by_name() -> None:
    unsaid = Use(purpose="commercial", distribute=False)
    assert asked("meta-llama/Llama-3.1-8B", "base", unsaid).unknown == ("use.monthly_active_users",)
    assert "use.territories" in asked("meta-llama/Llama-4-Scout-17B-16E", "base", unsaid).unknown
    assert asked("mistralai/Devstral-2-123B", "base", unsaid).unknown == ("use.annual_revenue_usd",)
    assert asked("openai:gpt-4o", "teacher", unsaid).unknown == ("use.competes_with",)
    said = Use(purpose="commercial", distribute=False, **{**FULL, "monthly_active_users": 800_000_000})  # type: ignore[arg-type]
    assert asked("meta-llama/Llama-3.1-8B", "base", said).verdict == "block"
    here = Use(purpose="commercial", distribute=False, **{**FULL, "territories": ("FR",)})  # type: ignore[arg-type]
    assert asked("meta-llama/Llama-4-Scout-17B-16E", "base", here).verdict == "block"
    assert asked("meta-llama/Llama-3.1-8B", "base", here).verdict == "allow-with-obligations"


def test_attestations(tmp_path: Path) -> None:
    claude = (asset_named("anthropic:claude-sonnet-4", "teacher"),)
    unread = (asset_named("somebody/brand-new-model", "base"),)

    def decided(asset: str, **more: Any) -> Attest:
        return Attest(asset=asset, who="J. Roe", when=date(2026, 11, 1), why="agreement", **more)

    day = date(2026, 11, 24)
    plain = decided("anthropic:claude-sonnet-4")
    signed = decided("anthropic:claude-sonnet-4", sha256="a" * 64)
    assert judge(claude, COMMERCIAL, [plain], today=day).verdict == "block"
    assert judge(claude, COMMERCIAL, [signed], today=day).verdict == "allow-with-obligations"
    assert judge(claude, COMMERCIAL, [signed], today=date(2027, 11, 2)).verdict == "block"
    assert judge(unread, COMMERCIAL, [decided("somebody/brand-new-model")], today=day).verdict != "block"
    assert judge(unread, COMMERCIAL, [decided("somebody/else")], today=day).verdict == "block"
    with pytest.raises(RecipeError, match="command line"):
        load_recipe("recipes/legal.yaml", ["attest=[]"])


def test_stale_facts_allow_nothing() -> None:
    fresh, later = date(2026, 12, 1), date(2027, 12, 1)
    apache = (asset_named("Qwen/Qwen3-8B", "base"),)
    assert judge(apache, COMMERCIAL, today=fresh).verdict == "allow"
    assert judge(apache, COMMERCIAL, today=later).verdict == "review"
    assert judge((asset_named("openai:gpt-4o", "teacher"),), COMMERCIAL, today=later).verdict == "block"


def test_a_refusal_names_asset_licence_clause_source_and_remedy() -> None:
    with pytest.raises(GateError) as refused:
        asked("meta-llama/Llama-2-7b-hf").require()
    for part in ("meta-llama/Llama-2-7b-hf", "llama-2", "1.b.v", "LICENSE", "permission"):
        assert part in str(refused.value)


def test_every_fact_has_a_source_and_every_statement_says_something() -> None:
    for licence in facts().licences.values():
        for statement in (
            licence.outputs,
            licence.commercial,
            *licence.limits,
            *licence.territories,
            *licence.obligations,
        ):
            assert licence.origin(statement).strip() and statement.says.strip(), licence.id
        if licence.outputs.rule != "silent" and licence.depth(licence.outputs) == "full":
            assert licence.outputs.clause, licence.id
    assert all(f.source.strip() for f in facts().families.models)


def test_a_cached_repository_is_judged_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    folder = model(tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / commit, "license: apache-2.0")
    (tmp_path / "models--Qwen--Qwen3-8B" / "refs").mkdir()
    (tmp_path / "models--Qwen--Qwen3-8B" / "refs" / "main").write_text(commit)
    assert not asked("Qwen/Qwen3-8B", "base").provisional
    assert asked(f"Qwen/Qwen3-8B@{commit}", "base").verdict == "allow"
    assert asked("Qwen/Qwen3-8B@" + "b" * 40, "base").provisional
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\n---\n")
    assert asked("Qwen/Qwen3-8B", "teacher").verdict == "block"
    (folder / "README.md").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    assert asked("Qwen/Qwen3-8B", "base").verdict == "review"


def test_a_licence_stated_in_the_recipe_counts_until_the_files_speak(tmp_path: Path) -> None:
    plan = "purpose: commercial, distribute: false"
    stated = recipe(tmp_path, "{base: acme/house-model, license: Apache-2.0}", "Qwen/Qwen3-32B", plan)
    verdict = judge(recipe_assets(stated), stated.use)
    assert verdict.verdict == "allow" and verdict.provisional
    lied = recipe(tmp_path, "{base: meta-llama/Llama-2-7b-hf, license: Apache-2.0}", "Qwen/Qwen3-32B", plan)
    assert judge(recipe_assets(lied), lied.use).verdict == "review"


def test_own_rows_are_ours_where_the_recipe_says_so_and_never_by_a_card(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    stated = local_data(rows, "rows", "data", "own")
    assert [claim.licence for claim in stated.claims] == ["own"]
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(rows.read_bytes())
    (folder / "README.md").write_text("---\nlicense: own\n---\nRows.\n")
    carded = local_data(folder, "downloaded", "data")
    assert [claim.licence for claim in carded.claims] == [None]


def test_a_judge_that_pays_the_student_is_judged_like_a_teacher(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')

    def verdict(model: str) -> Verdict:
        recipe = tmp_path / "r.yaml"
        judge_options = {"model": model, "url": "http://127.0.0.1:8000/v1"}
        recipe.write_text(
            json.dumps(
                {
                    "name": "x",
                    "use": {"purpose": "commercial", "distribute": False, **FULL},
                    "model": {"base": "embedded:tiny"},
                    "data": {"train": [{"path": str(rows), "license": "own"}]},
                    "method": {"type": "grpo", "rewards": [{"judge": judge_options}]},
                }
            )
        )
        return judge(recipe_assets(load_recipe(recipe)), load_recipe(recipe).use or COMMERCIAL)

    blocked = verdict("openai:gpt-4o")
    assert blocked.verdict == "block"
    assert any(r.asset == "openai:gpt-4o" and r.role == "judge" for r in blocked.reasons)
    assert verdict("Qwen/Qwen3-32B").verdict in {"allow", "allow-with-obligations"}
