"""Sampling presets: the right family by name and mode, the recipe's fields over it, and nothing without a source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from recipes.errors import RecipeError, RetortError
from recipes.load import load_recipe
from recipes.presets import FIELDS, PATH, Preset, preset_of, presets, read_presets, resolve
from recipes.schema import Recipe
from recipes.schema_teacher import Sampling

TINY = "embedded:tiny-teacher"
QWEN3 = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}


def taught(model: str = TINY, sampling: dict[str, Any] | None = None, **teacher: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "taught",
            "model": {"base": "embedded:tiny"},
            "data": {"train": [{"embedded": "legal", "split": "train"}]},
            "method": "distill",
            "teacher": {"model": model, "sampling": sampling or {}, **teacher},
        }
    )


# Values as the vendors publish them, written down here a second time: a slip in presets.yaml shows.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "Qwen/Qwen3-32B": ({}, QWEN3),
    "Qwen/Qwen3-8B": ({"enable_thinking": False}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}),
    "Qwen/Qwen3-235B-A22B-Thinking-2507": ({}, QWEN3),
    "Qwen/Qwen2.5-72B-Instruct": (
        {},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    ),
    "deepseek-ai/DeepSeek-R1-0528": ({}, {"temperature": 0.6, "top_p": 0.95}),
    "deepseek-ai/DeepSeek-V3-0324": ({}, {"temperature": 0.3}),
    "deepseek-ai/DeepSeek-V3.2": ({}, {"temperature": 1.0, "top_p": 0.95}),
    "mistralai/Magistral-Small-2509": ({}, {"temperature": 0.7, "top_p": 0.95}),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ({}, {"temperature": 1.0, "top_p": 1.0}),
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1_5": ({"enable_thinking": False}, {"temperature": 0.0}),
    "openai/gpt-oss-120b": ({}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}),
    "meta-llama/Llama-3.3-70B-Instruct": ({}, {"temperature": 0.6, "top_p": 0.9}),
    "google/gemma-3-27b-it": ({}, {"temperature": 1.0, "top_p": 0.95, "top_k": 64}),
    "microsoft/Phi-4-reasoning-plus": ({}, {"temperature": 0.8, "top_p": 0.95, "top_k": 50}),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_family_is_drawn_as_its_vendor_publishes(model: str) -> None:
    template, published = PUBLISHED[model]
    values, says = resolve(taught(model, template_kwargs=template))
    assert values == published
    found = preset_of(model, template)
    assert found is not None and says == found.says and f"preset {found.id} (" in says


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen/Qwen3-8B@b968826d9c46dd6066d109eabc6255188de91218", "qwen3-thinking"),
        ("unsloth/Qwen3-8B-bnb-4bit", "qwen3-thinking"),
        ("bartowski/Qwen_Qwen3-235B-A22B-Thinking-2507-GGUF", "qwen3-thinking-2507"),
        ("qwen/qwen3-30b-a3b-instruct-2507-fp8", "qwen3-instruct-2507"),
        ("/data/models/DeepSeek-R1-Distill-Qwen-7B/", "deepseek-r1-distill"),
        ("ollama:gpt-oss-20b", "gpt-oss"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseek-v3.2-exp"),
        ("mistralai/Mistral-Large-3-675B-Instruct-2512-NVFP4", "mistral-large-3"),
        ("Qwen/Qwen3-8B-Base", None),
        ("google/gemma-3-27b-pt", None),
        ("mistralai/Mistral-Large-3-675B-Base-2512", None),
        ("Qwen/Qwen2.5-Math-72B-Instruct", None),
        ("nvidia/Llama-3.1-Nemotron-70B-Instruct-HF", None),
        ("acme/legal-qwen3-8b", None),
        (TINY, None),
        ("openai:gpt-4o", None),
    ],
)
def test_names_are_told_by_their_beginning(name: str, wanted: str | None) -> None:
    found = preset_of(name)
    assert (found.id if found is not None else None) == wanted


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [({}, "qwen3-thinking"), ({"enable_thinking": True}, "qwen3-thinking"),
     ({"enable_thinking": False}, "qwen3-non-thinking"), ({"enable_thinking": 0}, "qwen3-non-thinking"),
     ({"enable_thinking": "yes"}, "qwen3-thinking")],
)  # fmt: skip
def test_the_template_chooses_between_the_modes_of_a_family(asked: dict[str, Any], wanted: str) -> None:
    found = preset_of("Qwen/Qwen3-14B", asked)
    assert found is not None and found.id == wanted


def test_a_family_with_one_mode_keeps_it_whatever_the_template_is_told() -> None:
    for thinking in (True, False):
        values, _ = resolve(taught("Qwen/Qwen3-4B-Thinking-2507", template_kwargs={"enable_thinking": thinking}))
        assert values == QWEN3


def test_the_recipe_goes_over_the_preset_field_by_field() -> None:
    values, says = resolve(taught("Qwen/Qwen3-32B", {"temperature": 0.9, "presence_penalty": 1}))
    assert values == {**QWEN3, "temperature": 0.9, "presence_penalty": 1.0}
    assert says.endswith("; temperature, presence_penalty from the recipe")
    assert resolve(taught("Qwen/Qwen3-32B", {"top_p": 0.95}))[0] == QWEN3


def test_equal_settings_are_equal_to_the_letter() -> None:
    """They become part of request keys: 1 and 1.0, or 20 and 20.0, must not be two."""
    whole = resolve(taught(sampling={"temperature": 1, "top_k": 20, "min_p": 0}))[0]
    broken = resolve(taught(sampling={"temperature": 1.0, "top_k": 20, "min_p": 0.0}))[0]
    assert repr(whole) == repr(broken) == "{'temperature': 1.0, 'top_k': 20, 'min_p': 0.0}"
    assert list(resolve(taught(sampling={"min_p": 0.1, "top_p": 0.5}))[0]) == ["temperature", "top_p", "min_p"]


def test_preset_by_name_and_none() -> None:
    values, says = resolve(taught(sampling={"preset": "deepseek-r1"}))
    assert values == {"temperature": 0.6, "top_p": 0.95} and says.startswith("preset deepseek-r1 (")
    assert resolve(taught("Qwen/Qwen3-32B", {"preset": "none"})) == (
        {"temperature": 0.0},
        "greedy: no preset is asked for",
    )
    own = {"preset": "none", "temperature": 0.5}
    assert resolve(taught("Qwen/Qwen3-32B", own)) == (
        {"temperature": 0.5},
        "temperature from the recipe; no preset is asked for",
    )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("qwen3-thinkng", "did you mean qwen3-thinking?"), ("DeepSeek-R1", "did you mean deepseek-r1?"),
     ("zzz", "write auto, none, or a name of recipes/presets.yaml")],
)  # fmt: skip
def test_an_unknown_name_is_an_error_with_the_nearest_one(name: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(taught(sampling={"preset": name}))
    assert str(caught.value) == f"teacher.sampling.preset: there is no preset '{name}'; {remedy}"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("sampling", "samples", "values", "says"),
    [
        ({}, 1, {"temperature": 0.0}, f"greedy: no preset for {TINY}"),
        ({}, 4, {"temperature": 1.0}, f"temperature 1: no preset for {TINY}, and several samples must differ"),
        ({"temperature": 0}, 1, {"temperature": 0.0}, f"temperature from the recipe; no preset for {TINY}"),
        ({"top_p": 0.9}, 1, {"temperature": 1.0, "top_p": 0.9},
         f"top_p from the recipe; no preset for {TINY}, so the temperature is 1"),
        ({"top_k": 0, "top_p": 1.0}, 1, {"temperature": 0.0}, f"greedy: no preset for {TINY}"),
        ({"repetition_penalty": 1.1}, 1, {"temperature": 0.0, "repetition_penalty": 1.1},
         f"greedy; repetition_penalty from the recipe; no preset for {TINY}"),
        ({"temperature": 0, "top_p": 0.9, "presence_penalty": 0.5}, 1, {"temperature": 0.0, "presence_penalty": 0.5},
         f"temperature, presence_penalty from the recipe; no preset for {TINY}"),
    ],
)  # fmt: skip
def test_without_a_preset(sampling: dict[str, Any], samples: int, values: dict[str, float], says: str) -> None:
    assert resolve(taught(sampling=sampling, samples=samples)) == (values, says)


def test_greedy_leaves_what_only_a_draw_needs() -> None:
    values, says = resolve(taught("Qwen/Qwen3-32B", {"temperature": 0}))
    assert values == {"temperature": 0.0}
    assert says.endswith("; temperature from the recipe")


@pytest.mark.parametrize(
    ("model", "sampling", "teacher", "said"),
    [
        (TINY, {"temperature": 0}, {"samples": 2}, "teacher.sampling.temperature: 2 samples of a prompt are all the"),
        ("Qwen/Qwen3-32B", {"temperature": 0}, {"samples": 8}, "8 samples of a prompt are all the same"),
        (TINY, {"temperature": 0}, {"rounds": [{"samples": 3}]}, "3 samples"),
        (TINY, {"temperature": 0}, {"rounds": [{"write": "topic", "ask": "Topics?", "samples": 5}, {}]}, "5 samples"),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1_5", {}, {"samples": 2, "template_kwargs": {"enable_thinking": False}},
         "at temperature 0 of preset llama-nemotron (model card); set teacher.sampling.temperature above 0"),
    ],
)  # fmt: skip
def test_several_greedy_samples_are_refused(
    model: str, sampling: dict[str, Any], teacher: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(taught(model, sampling, **teacher))
    assert said in str(caught.value)


def test_samples_of_a_column_are_not_those_of_the_answer() -> None:
    rounds = [{"write": "topic", "ask": "A topic?"}, {"samples": 1}]
    assert resolve(taught(sampling={"temperature": 0}, samples=4, rounds=rounds))[0] == {"temperature": 0.0}


def test_no_teacher_no_sampling() -> None:
    recipe = taught().model_copy(update={"teacher": None})
    with pytest.raises(RecipeError, match="there is no teacher"):
        resolve(recipe)


# The file itself


def test_fields_are_those_of_the_schema() -> None:
    assert set(FIELDS) == set(Sampling.model_fields) - {"preset", "max_tokens"}
    assert set(FIELDS) == set(Preset.model_fields) - {"id", "models", "thinking", "source", "verified"}


def test_every_preset_can_be_met() -> None:
    """None stands behind a wider one, and one that nobody read says so."""
    for preset in presets():
        for pattern in preset.models:
            name = pattern.replace("[0-9]", "8").replace("[123]", "1").replace("[56]", "5")
            name = name.replace("?", "_").replace("*", "x")
            found = preset_of(name, {} if preset.thinking is None else {"enable_thinking": preset.thinking})
            assert found is preset, f"{preset.id}: {pattern} is {found.id if found else None}"
        assert len(preset.source) > 15 and ("memory" in preset.source) == (preset.verified == "memory")


def test_families_with_two_modes_have_both() -> None:
    modes: dict[tuple[str, ...], set[bool | None]] = {}
    for preset in presets():
        modes.setdefault(preset.models, set()).add(preset.thinking)
    assert all(found in ({None}, {True, False}) for found in modes.values())
    assert sum(found == {True, False} for found in modes.values()) >= 4


def test_the_teachers_of_the_shipped_recipes_are_drawn_as_they_say() -> None:
    """Each can be sampled, and the large ones by a preset of their family."""
    taught = [load_recipe(path) for path in sorted((ROOT / "recipes").glob("*.yaml")) if path != PATH]
    taught = [recipe for recipe in taught if recipe.teacher is not None]
    assert {"reasoning-distill-qwen3", "reasoning-qwen3-onpolicy"} <= {recipe.name for recipe in taught}
    for recipe in taught:
        values, says = resolve(recipe)
        assert recipe.teacher is not None and (values["temperature"] > 0 or recipe.teacher.samples == 1)
        large = not recipe.teacher.model.startswith("embedded:")
        assert says.startswith("preset ") == large, f"{recipe.name}: {says}"


def entry(**changes: Any) -> dict[str, Any]:
    whole = {"id": "a", "models": ["a-*"], "temperature": 0.5, "source": "https://example.org/card", "verified": "card"}
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry(source=None)], "source"),
        ([entry(source="  ")], "source"),
        ([entry(verified=None)], "verified"),
        ([entry(verified="surely")], "verified"),
        ([entry(temperature=None)], "temperature"),
        ([entry(temperature=-1)], "temperature"),
        ([entry(frequency_penalty=1)], "frequency_penalty"),
        ([entry(models=[])], "models"),
        ([entry(models=["A-*"])], "must be lower case"),
        ([entry(), entry()], "the preset a is there twice"),
        ([entry(id="none")], "no preset can be named none"),
        ([], "presets"),
    ],
)
def test_a_wrong_file_is_refused(entries: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text(yaml.safe_dump({"as_of": "2026-11-27", "presets": entries}), encoding="utf-8")
    with pytest.raises(RetortError) as caught:
        read_presets(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_right_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text(yaml.safe_dump({"as_of": "2026-11-27", "presets": [entry(top_k=3)]}), encoding="utf-8")
    assert read_presets(path).presets[0].top_k == 3
    with pytest.raises(RetortError, match="cannot be used"):
        read_presets(tmp_path / "missing.yaml")
    path.write_text("presets: !!python/object/apply:os.getcwd []", encoding="utf-8")
    with pytest.raises(RetortError, match="cannot be used"):
        read_presets(path)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, recipes.presets; print(sorted({'torch', 'transformers', 'trl'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert PATH.is_file() and PATH.parent == ROOT / "recipes"
