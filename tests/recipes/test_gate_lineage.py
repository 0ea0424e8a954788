"""What a model was made from, wherever its folder says it: judged in the role that the model is asked for."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from test_gate_evasions import COMMERCIAL, asked, gguf, model

from recipes.errors import RetortError
from recipes.evidence import to_record
from recipes.gate import judge
from recipes.lineage import SEAL, sealed, sha256_files
from recipes.sources import asset_named

LLAMA_2 = "meta-llama/Llama-2-7b-hf"
HUB = "https://huggingface.co/"
QWEN = {"general__base_model__0__repo_url": f"{HUB}Qwen/Qwen3-8B"}


def student(folder: Path, *made_of: tuple[str, str], files: tuple[str, ...] = ()) -> Path:
    """A finished artefact of Retort with its lineage."""
    model(folder, "license: mit")
    lineage = [to_record(asset_named(name, role)) for name, role in made_of]  # type: ignore[arg-type]
    names = files or tuple(path.name for path in folder.iterdir() if path.is_file())
    manifest = {"kind": "run", "retort_version": "0", "files": sha256_files(folder, names), "lineage": lineage}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return folder


@pytest.mark.parametrize(
    "base", [LLAMA_2, "databricks/dbrx-base", "tencent/Hunyuan-A13B-Instruct", "Qwen/Qwen2-72B"], ids=str
)
def test_a_student_teaches_under_what_its_base_is_under(tmp_path: Path, base: str) -> None:
    made = student(tmp_path / "s", (base, "base"))
    assert asked(made, "base").verdict in {"allow", "allow-with-obligations"}
    for asset in (made, model(tmp_path / "lora", "license: mit", "../s"), made):
        verdict = asked(asset, "teacher")
        assert verdict.verdict == "block" and any(r.asset == base and r.effect == "block" for r in verdict.reasons)
        assert asked(asset, "judge").verdict == "block"


def test_a_student_of_a_student_of_a_forbidden_teacher(tmp_path: Path) -> None:
    first = student(tmp_path / "a", ("Qwen/Qwen3-8B", "base"), (LLAMA_2, "teacher"))
    second = student(tmp_path / "b", (str(first), "base"))
    for role in ("base", "teacher"):
        assert asked(second, role).verdict == "block", role


@pytest.mark.parametrize("part", ["model", "adapter", "checkpoints/checkpoint-5"])
def test_a_part_of_a_run_descends_from_what_the_run_does(tmp_path: Path, part: str) -> None:
    run = student(tmp_path / "run", ("Qwen/Qwen3-8B", "base"), (LLAMA_2, "teacher"))
    folder = model(run / part, "license: apache-2.0\nbase_model: Qwen/Qwen3-8B")
    assert any(r.asset == LLAMA_2 and r.effect == "block" for r in asked(folder, "base").reasons)
    (run / "data").mkdir()
    (run / "manifest.json").rename(run / "data" / "manifest.json")  # a run that has not ended
    assert any(r.asset == LLAMA_2 and r.effect == "block" for r in asked(folder, "base").reasons)


def test_a_manifest_that_lost_its_marks_still_says_what_it_was_made_of(tmp_path: Path) -> None:
    made = student(tmp_path / "s", (LLAMA_2, "teacher"), ("Qwen/Qwen3-8B", "base"))
    whole = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps({k: v for k, v in whole.items() if k != "retort_version"}))
    with pytest.raises(RetortError, match="changed after it was written"):
        asked(made, "base")
    bare = {k: v for k, v in whole.items() if k not in {"retort_version", SEAL}}
    (made / "manifest.json").write_text(json.dumps(bare))
    assert any(r.license == "llama-2" and r.effect == "block" for r in asked(made, "base").reasons)


def test_weights_that_an_artefact_was_not_finished_with(tmp_path: Path) -> None:
    made = student(tmp_path / "s", ("Qwen/Qwen3-8B", "base"))
    assert asked(made, "base").verdict == "allow"
    (made / "model.safetensors").write_bytes(b"other")
    verdict = asked(made, "base")
    assert verdict.verdict == "block" and "model.safetensors" in verdict.reasons[0].says


def test_an_export_in_the_cache_of_the_hub_keeps_its_lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def upload(name: str, folder: Path) -> None:
        cache = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("a" * 40)
        shutil.copytree(folder, cache / "snapshots" / ("a" * 40))

    upload("acme/legal-7b", student(tmp_path / "s", ("Qwen/Qwen3-8B", "base"), (LLAMA_2, "teacher")))
    assert any(r.asset == LLAMA_2 and r.effect == "block" for r in asked("acme/legal-7b", "base").reasons)
    upload("acme/x", model(tmp_path / "x", "license: mit", config={"_name_or_path": LLAMA_2}))
    assert asked("acme/x").verdict == "block"
    upload("acme/y", model(tmp_path / "y", "license: mit", config={"_name_or_path": "acme/y"}))
    assert asked("acme/y").verdict == "allow"  # saved from itself
    upload("Qwen/Qwen3-8B", model(tmp_path / "q", "license: apache-2.0", config={"_name_or_path": "Qwen/Qwen3-8B"}))
    assert asked("Qwen/Qwen3-8B").verdict == "allow"
    adapter = model(tmp_path / "lora", "license: mit", "Qwen/Qwen3-8B")
    assert asked(adapter, "base").verdict == "allow" and not asked(adapter, "base").provisional


@pytest.mark.parametrize(
    "origin",
    [
        "/home/me/Llama-2-7b-hf",
        "Llama-2-7b-hf",
        f"{LLAMA_2}/",
        "./Llama-2-7b-hf",
        "C:\\models\\Llama-2-7b-hf",
        f"models/{LLAMA_2}",
        "/runs/Llama-2-7b-hf/checkpoint-500",
        "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-2-7b-hf/snapshots/abc",
    ],
)
def test_paths_that_a_configuration_was_saved_from(tmp_path: Path, origin: str) -> None:
    verdict = asked(model(tmp_path / "m", "license: apache-2.0", config={"_name_or_path": origin}))
    assert any(r.license == "llama-2" and r.effect == "block" for r in verdict.reasons)


@pytest.mark.parametrize("origin", ["Qwen/Qwen3-8B", "/data/Qwen3-8B", "/home/me/out/checkpoint-100", "", "my-model"])
def test_a_path_denies_and_hinders_nothing_else(tmp_path: Path, origin: str) -> None:
    assert asked(model(tmp_path / "m", "license: apache-2.0", config={"_name_or_path": origin})).verdict == "allow"
    assert asked(model(tmp_path / "bare", config={"_name_or_path": origin})).verdict == "block"


def test_an_adapter_configuration_hides_no_other(tmp_path: Path) -> None:
    hidden = {"model_type": "gemma2", "_name_or_path": LLAMA_2}
    licences = {r.license for r in asked(model(tmp_path / "m", "license: mit", "Qwen/Qwen3-8B", hidden)).reasons}
    assert {"llama-2", "gemma-terms"} <= licences


@pytest.mark.parametrize(
    ("name", "plan", "verdict"),
    [
        ("mergekit_moe_config.yml", f"experts:\n- source_model: {LLAMA_2}\n", "block"),
        ("mergekit_config.yml", f"experts:\n- source_model: {LLAMA_2}\n", "block"),
        ("mergekit_config.yml", f"models:\n- model: Qwen/Qwen3-4B+{LLAMA_2}\n", "block"),
        ("mergekit_config.yml", f"models:\n- model: {{model: {{path: {LLAMA_2}, revision: main}}}}\n", "block"),
        ("mergekit_config.yml", "models:\n- model: {model: {path: Qwen/Qwen3-4B, revision: main}}\n", "allow"),
        ("mergekit_config.yml", "models:\n- model: {model: {path: Qwen/Qwen3-4B}, lora: null}\n", "allow"),
    ],
)
def test_merges(tmp_path: Path, name: str, plan: str, verdict: str) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    (folder / name).write_text(f"base_model: Qwen/Qwen3-8B\n{plan}")
    assert asked(folder).verdict == verdict


@pytest.mark.parametrize(
    "card",
    [
        f"base_model: Qwen/Qwen3-8B\nbase_models: [{LLAMA_2}]",
        f"Base_Model: {LLAMA_2}",
        f"tags: ['base_model:{LLAMA_2}']",
        f"tags: ['base_model:quantized:{LLAMA_2}']",
        "tags: ['license:llama2']",
        "datasets: [tatsu-lab/alpaca@main]",
        "datasets: [alpaca]",
        "tags: ['dataset:tatsu-lab/alpaca']",
    ],
)
def test_everything_that_a_card_names_counts(tmp_path: Path, card: str) -> None:
    assert asked(model(tmp_path / "m", f"license: apache-2.0\n{card}")).verdict == "block"


def test_a_card_counts_whatever_case_its_name_is_in(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    (folder / "readme.md").write_text(f"---\nlicense: llama2\nbase_model: {LLAMA_2}\n---\n")
    assert asked(folder).verdict == "block"


@pytest.mark.parametrize(
    "strings",
    [
        {"general__license": "llama2", "general__license__name": "apache-2.0"},
        {"general__license": "apache-2.0", "general__architecture": "gemma2"},
        {"general__license": "apache-2.0", "general__architecture": "command-r"},
        {"general__license": "apache-2.0", "general__name": "Llama 2 7B Chat"},
        {"general__license": "apache-2.0", "general__basename": "Llama-2"},
        {"general__license": "apache-2.0", "general__base_model__0__name": "Llama 2 7B"},
        {"general__license": "apache-2.0", "general__dataset__0__repo_url": f"{HUB}datasets/tatsu-lab/alpaca"},
        {"general__license": "apache-2.0", "general__license__link": f"{HUB}{LLAMA_2}/blob/main/LICENSE.txt"},
    ],
    ids=str,
)
def test_all_metadata_of_a_gguf_counts(tmp_path: Path, strings: dict[str, str]) -> None:
    assert asked(gguf(tmp_path / "m.gguf", **strings, **QWEN)).verdict in {"block", "review"}
    fair = {"general__license": "apache-2.0", "general__name": "Qwen3 8B", "general__architecture": "qwen3"}
    assert asked(gguf(tmp_path / "fair.gguf", **fair, **QWEN)).verdict == "allow"


@pytest.mark.parametrize("name", ["m.GGUF", "Q4_K_M/m.gguf", "m-00002-of-00003.gguf"])
def test_a_gguf_is_found_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    (folder / name).parent.mkdir(exist_ok=True)
    url = {"general__base_model__0__repo_url": f"{HUB}{LLAMA_2}"}
    gguf(folder / name, general__license="apache-2.0", **url)
    assert asked(folder).verdict == "block"


def test_the_later_parts_of_a_split_gguf_say_nothing(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    gguf(folder / "m-00001-of-00002.gguf", general__license="apache-2.0", **QWEN)
    gguf(folder / "m-00002-of-00002.gguf", split__no="1")
    assert asked(folder).verdict == "allow"


def test_the_verdict_on_a_gguf_does_not_read_its_weights(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", general__license="apache-2.0", **QWEN)
    with path.open("r+b") as stream:
        stream.truncate(8 << 30)  # sparse: 8 GB take far longer than this to read
    begin = time.perf_counter()
    assert asked(path).verdict == "allow"
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    "name",
    ["LICENSES/llama2.txt", "LICENSE/LICENSE.txt", "TERMS_OF_USE.md", "EULA.txt", "AGREEMENT.md", "original/LICENSE"],
)
def test_licence_texts_are_found_where_people_put_them(tmp_path: Path, realdata: Path, name: str) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(realdata / "gate" / "licence_texts" / "llama-2-license-2023.txt", folder / name)
    assert any(r.license == "llama-2" and r.effect == "block" for r in asked(folder).reasons)


@pytest.mark.parametrize(
    ("name", "text", "verdict"),
    [
        ("Notice.txt", "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta.", "block"),
        ("USE_POLICY.md", "# Llama 2 Acceptable Use Policy\n\nMeta is committed to safe use.", "block"),
        ("NOTICE", "Gemma is provided under and subject to the Gemma Terms of Use.", "review"),
        (
            "NOTICE",
            "Acme Models\nCopyright 2026 Acme\nThis product includes software of the Apache Foundation.",
            "allow",
        ),
        ("USAGE_POLICY", "By using this model you agree to comply with all applicable law.", "allow"),
    ],
)
def test_notices_and_policies_count_where_they_name_a_licence(
    tmp_path: Path, name: str, text: str, verdict: str
) -> None:
    folder = model(tmp_path / "m", "license: apache-2.0")
    (folder / name).write_text(text)
    assert asked(folder).verdict == verdict


def chain(folder: Path, length: int, end: str) -> Path:
    for number in range(length):
        base = f"../{number + 1}" if number + 1 < length else end
        model(folder / str(number), f"license: mit\nbase_model: {base}")
    return folder / "0"


def test_long_chains_of_folders(tmp_path: Path) -> None:
    assert asked(chain(tmp_path / "good", 15, "Qwen/Qwen3-8B")).verdict == "allow"
    assert any(r.license == "llama-2" for r in asked(chain(tmp_path / "bad", 15, LLAMA_2)).reasons)
    endless = asked(chain(tmp_path / "long", 60, "Qwen/Qwen3-8B"))
    assert endless.verdict == "block" and any("generations" in r.says for r in endless.reasons)


def test_what_is_known_by_name_alone_stays_provisional(tmp_path: Path) -> None:
    assert asked(model(tmp_path / "a", "license: mit", "Qwen/Qwen3-8B"), "base").provisional
    assert asked(model(tmp_path / "b", "license: mit\nbase_model: Qwen/Qwen3-8B"), "base").provisional
    assert asked(gguf(tmp_path / "m.gguf", general__license="apache-2.0", **QWEN)).provisional
    assert not asked(model(tmp_path / "c", "license: mit"), "base").provisional


@pytest.mark.parametrize(
    ("ref", "verdict"),
    [
        ("unsloth/Kimi-K2-Instruct-GGUF", "allow"),
        ("unsloth/granite-4.0-h-tiny-GGUF", "allow"),
        ("bartowski/granite-3.3-8b-instruct-GGUF", "allow"),
        ("unsloth/gpt-oss-20b-BF16", "allow"),
        ("mlx-community/Qwen3-8B-4bit-DWQ", "allow"),
        ("Qwen/Qwen3-8B-MLX-bf16", "allow"),
        ("nvidia/Qwen3-8B-NVFP4", "allow"),
        ("nvidia/Llama-2-70b-chat-FP4", "block"),
        ("unsloth/granite-4.0-h-tiny-claude-GGUF", "block"),
        ("somebody/Qwen3-8B-BF16", "block"),
    ],
)
def test_quantised_copies_of_mirrors(ref: str, verdict: str) -> None:
    assert asked(ref, "teacher").verdict == verdict


@pytest.mark.parametrize(
    "ref",
    [
        "google/gemma-4-medical-27b",
        "Qwen/Qwen3.8-27B-Max",
        "Qwen/Qwen3-VL-Max-1T",
        "moonshotai/Kimi-K2-NC",
        "LGAI-EXAONE/K-EXAONE-2.0-750B-A37B-NC",
        "ibm-granite/granite-4.9-nc",
        "mistralai/Mistral-Small-4-119B-Research-2603",
    ],
)
def test_a_new_sibling_is_not_allowed_by_a_wide_pattern(tmp_path: Path, ref: str) -> None:
    assert asked(ref).verdict == "block" and asked(ref).unknown == (ref,)
    assert asked(model(tmp_path / "m", "license: mit", ref), "base").verdict == "block"


@pytest.mark.parametrize(
    "ref",
    [
        "google/gemma-4-26B-A4B-it",
        "google/gemma-4-E4B-it",
        "Qwen/Qwen3.8-27B",
        "Qwen/Qwen3-VL-30B-A3B-Thinking",
        "moonshotai/Kimi-K2-Instruct-0905",
        "LGAI-EXAONE/K-EXAONE-2.0-750B-A37B",
        "ibm-granite/granite-3.1-3b-a800m-instruct",
        "ibm-granite/granite-8b-code-instruct-128k",
        "allenai/OLMo-2-0325-32B-Instruct",
        "allenai/Olmo-3-7B-Think-SFT",
        "allenai/OLMoE-1B-7B-0125-Instruct",
        "mistralai/Mistral-Small-4-119B-2603",
        "unsloth/gemma-4-E4B-it-GGUF",
    ],
)
def test_the_releases_of_a_family_are_known(ref: str) -> None:
    assert asked(ref).verdict in {"allow", "allow-with-obligations"}


@pytest.mark.parametrize(
    ("ref", "verdict"),
    [
        ("deepseek:deepseek-chat", "allow-with-obligations"),
        ("deepseek:gpt-4o", "block"),
        ("mistral:claude-3-opus", "block"),
        ("deepseek:anything", "block"),
        ("deepseek:meta-llama/Llama-2-70b-hf", "block"),
        ("Muse-Glimmer-30B", "review"),
        ("Hermes-4.3-36B", "review"),
    ],
)
def test_a_prefix_vouches_for_its_own_models_and_a_bare_name_for_no_more_than_the_id(ref: str, verdict: str) -> None:
    assert judge((asset_named(ref, "teacher"),), COMMERCIAL).verdict == verdict


def test_the_old_shape_of_parents_is_cast_as_well(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: mit")
    parents: list[dict[str, Any]] = [{"role": "base", "ref": LLAMA_2, "license": "llama2"}]
    files = sha256_files(folder, [path.name for path in folder.iterdir()])
    manifest = {"kind": "run", "retort_version": "0", "files": files, "parents": parents}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert asked(folder, "base").verdict == "allow-with-obligations"
    assert asked(folder, "teacher").verdict == "block"
