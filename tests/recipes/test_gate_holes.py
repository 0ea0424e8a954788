"""Ways past the gate that were found once, and odd inputs that must end in a verdict or in one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_gate_evasions import COMMERCIAL, MIT, asked, gguf, model, rows

from recipes.errors import RecipeError, RetortError
from recipes.evidence import Asset
from recipes.gate import judge
from recipes.lineage import sealed
from recipes.schema import Use
from recipes.sources import asset_named

LLAMA = "https://huggingface.co/meta-llama/Llama-2-7b-hf"
OWN = {"prompt": "a", "completion": "b"}


def test_a_gguf_beside_a_card_is_read_too(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    gguf(folder / "m.gguf", general__license="apache-2.0", general__base_model__0__repo_url=LLAMA)
    assert asked(folder).verdict == "block"
    two = gguf(
        tmp_path / "two.gguf",
        general__license="apache-2.0",
        general__base_model__0__repo_url="https://huggingface.co/Qwen/Qwen3-8B",
        general__base_model__1__repo_url="https://example.org/secret",
    )
    assert asked(two).verdict == "block"


@pytest.mark.parametrize(
    "row",
    [
        {"model": "text-davinci-003"},
        {"model": "grok-4"},
        {"generator": ["gpt-4"]},
        {"generator": {"name": "claude-2"}},
        {"generator": 4},
        {"Generator": "gpt-4"},
        {"_teacher": "Qwen/Qwen3-8B", "generator": "gpt-4"},
        {"metadata": {"model": "gpt-4"}},
        {"license": ["cc-by-nc-4.0"]},
        {"generator": "~gpt"},
        {"generator": "x" * 5000},
    ],
    ids=str,
)
def test_every_statement_of_a_row_counts(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert asked(rows(tmp_path / "d.jsonl", {**OWN, **row}), "data").verdict == "block"


def test_rows_by_people_and_rows_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert asked(rows(tmp_path / "p.jsonl", {**OWN, "generator": "human"}), "data").verdict == "allow"
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00torn")
    assert asked(tmp_path / "a.jsonl.gz", "data").verdict == "block"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    assert asked(tmp_path / "b.parquet", "data").verdict == "block"
    (tmp_path / "c.json").write_text(json.dumps({"train": [OWN], "test": [{**OWN, "generator": "gpt-4"}]}))
    assert asked(tmp_path / "c.json", "data").verdict == "block"
    rows(tmp_path / "lines.json", {**OWN, "generator": "gpt-4"})
    assert asked(tmp_path / "lines.json", "data").verdict == "block"


@pytest.mark.parametrize(
    "added", ["Commercial use is prohibited.", "for noncommercial use only", "Outputs may train no other model."]
)
def test_a_sentence_of_restriction_makes_another_licence(tmp_path: Path, added: str) -> None:
    folder = model(tmp_path / "m", "license: mit")
    for text in (f"{MIT}\n{added}\n", f"Copyright notice: {added}\n{MIT}", f"---\n{added}\n---\n{MIT}"):
        (folder / "LICENSE").write_text(text)
        assert asked(folder).verdict == "block", text


@pytest.mark.parametrize(
    "card",
    [
        "license: apache-2.0\nbase_model: {name: meta-llama/Llama-2-7b-hf}",
        "license: apache-2.0\nbase_model: [{name: meta-llama/Llama-2-7b-hf}]",
        "license: apache-2.0\nbase_model: ../elsewhere",
        "license: apache-2.0\ndatasets: [https://huggingface.co/datasets/tatsu-lab/alpaca]",
        "license: [apache-2.0, other]",
        "license: apache-2.0\nlicense_name: my-noncommercial",
        "date: 2024-13-45\nlicense: apache-2.0",
        "- a list",
        f"license: apache-2.0\nbase_model: {'x' * 5000}",
    ],
)
def test_odd_cards_allow_nothing(tmp_path: Path, card: str) -> None:
    assert asked(model(tmp_path / "m", card)).verdict in {"block", "review"}


def test_architectures_that_only_restricted_models_have(tmp_path: Path) -> None:
    for number, config in enumerate(
        [{"model_type": "gemma2"}, {"model_type": "llava", "text_config": {"model_type": "gemma3_text"}}]
    ):
        assert asked(model(tmp_path / f"{number}", "license: apache-2.0", config=config)).verdict == "review"


def test_folders_that_name_each_other(tmp_path: Path) -> None:
    a = model(tmp_path / "a", "license: mit\nbase_model: [../b, ../b, ../b]")
    model(tmp_path / "b", "license: mit\nbase_model: [../a, ../a, ../a]")
    assert any("circle" in r.says for r in asked(a).reasons)


@pytest.mark.parametrize("ref", ["embedded:../licenses", "embedded:/etc", "http://[::1", "~nosuch/x", "a/b/c", ""])
def test_references_that_are_none(ref: str) -> None:
    with pytest.raises(RecipeError):
        asset_named(ref, "data")


def test_an_asset_of_which_nothing_is_known_is_not_allowed(tmp_path: Path) -> None:
    assert judge([Asset("x", "base", "model")], COMMERCIAL).verdict == "block"
    with pytest.raises(ValueError, match="nothing to judge"):
        judge([], COMMERCIAL)
    for number, lineage in enumerate(([{}], 5, [{"name": "x"}])):
        folder = model(tmp_path / f"m{number}")
        content = {"kind": "run", "retort_version": "0", "files": {}, "lineage": lineage, "parents": [{}]}
        (folder / "manifest.json").write_text(json.dumps(sealed(content)))
        try:
            assert asked(folder).verdict == "block"
        except RetortError as error:
            assert "lineage" in str(error)


def test_territories_are_countries() -> None:
    def hunyuan(*codes: str) -> str:
        use = Use(purpose="commercial", distribute=False, monthly_active_users=1, territories=codes)
        return asked("tencent/Hunyuan-A13B-Instruct", "base", use).verdict

    assert [hunyuan("UK"), hunyuan("de"), hunyuan("EEA"), hunyuan("US"), hunyuan()] == [
        *("block", "block", "block", "allow-with-obligations", "review")
    ]
    with pytest.raises(ValueError, match="no country"):
        hunyuan("Germany")


@pytest.mark.parametrize(
    "ref",
    [
        "mradermacher/gemma-4-12b-Claude-Opus-distill-GGUF",
        "bartowski/acme_Qwen3-8B-GGUF",
        "TheBloke/Mistral-7B-OpenOrca-GGUF",
    ],
)
def test_a_mirror_of_a_fine_tune_is_no_mirror_of_its_base(ref: str) -> None:
    assert asked(ref, "base").verdict == "block"


def test_deep_json_is_no_traceback(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: mit")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(RetortError):
        asked(folder)


def test_a_merge_follows_all_its_parts(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    plan = "merge_method: slerp\nbase_model: Qwen/Qwen3-8B\nslices:\n- sources:\n  - model: Qwen/Qwen3-8B\n"
    (folder / "mergekit_config.yml").write_text(plan)
    assert asked(folder).verdict == "allow"
    (folder / "mergekit_config.yml").write_text(f"{plan}  - model: meta-llama/Llama-2-7b-hf\n")
    assert asked(folder).verdict == "block"
