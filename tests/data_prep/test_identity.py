"""What tells one teacher from another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.identity import model_identity
from recipes.errors import RecipeError
from recipes.refs import EMBEDDED
from recipes.schema import Recipe

MODEL = EMBEDDED / "tiny-teacher"
SERVER = {"http": {"urls": ["http://127.0.0.1:1/v1"]}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def recipe_for(engine: Any, model: str = "embedded:tiny-teacher") -> Recipe:
    content = {
        "name": "t",
        "model": {"base": "embedded:tiny"},
        "data": {"train": [{"embedded": "legal"}]},
        "method": "distill",
        "teacher": {"model": model, "engine": engine},
    }
    return Recipe.model_validate(content)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "elsewhere"))


def test_a_folder_is_its_weights_wherever_it_lies_and_whoever_runs_it(copy: Path) -> None:
    embedded = model_identity(recipe_for("transformers"))
    assert list(embedded) == ["sha256"] and len(embedded["sha256"]) == 64
    for engine in ("transformers", "vllm", SERVER):
        assert model_identity(recipe_for(engine, model=str(copy))) == embedded


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "chat_template.jinja"])
def test_what_decides_answers_decides_the_identity(copy: Path, name: str) -> None:
    before = model_identity(recipe_for("vllm", model=str(copy)))
    (copy / "README.md").write_text("about something else")
    assert model_identity(recipe_for("vllm", model=str(copy))) == before
    with (copy / name).open("ab") as stream:
        stream.write(b" ")
    assert model_identity(recipe_for("vllm", model=str(copy))) != before


def test_rounded_weights_and_further_fields_are_another_teacher() -> None:
    whole = model_identity(recipe_for("transformers"))
    assert model_identity(recipe_for({"transformers": {"quantization": "nf4"}})) == {**whole, "quantization": "nf4"}
    for extra in ({"quantization": "fp8"}, {"hf_overrides": {"rope_theta": 1e6}}):
        assert model_identity(recipe_for({"vllm": {"extra": {**extra, "enforce_eager": True}}})) == {**whole, **extra}
    asked = {"http": {**SERVER["http"], "extra_body": {"guided_regex": "a+"}}}
    assert model_identity(recipe_for(asked)) == {**whole, "extra_body": {"guided_regex": "a+"}}


def test_a_repository_is_its_commit_and_behind_a_server_what_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--big"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    known = {"model": "org/big", "commit": COMMIT}
    assert model_identity(recipe_for("vllm", model="org/big")) == known
    assert model_identity(recipe_for("transformers", model="org/big@main")) == known
    assert model_identity(recipe_for(SERVER, model=f"org/big@{COMMIT}")) == known
    assert model_identity(recipe_for(SERVER, model="org/big@main")) == {"model": "org/big@main"}


def test_a_service_and_a_folder_at_the_server_are_their_names(tmp_path: Path) -> None:
    assert model_identity(recipe_for(SERVER, model="openai:gpt-4o")) == {"model": "openai:gpt-4o"}
    away = str(tmp_path / "weights")
    assert model_identity(recipe_for(SERVER, model=away)) == {"model": away}
    with pytest.raises(RecipeError, match="does not exist"):
        model_identity(recipe_for("vllm", model=away))
