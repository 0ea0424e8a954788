"""A key in a recipe would stand in every manifest: it is refused, and the refusal does not repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import RecipeError
from recipes.load import load_recipe

SECRET = "sk-live-hunter2SECRET0123456789"
URL = "http://127.0.0.1:8000/v1"


def recipe_with(folder: Path, teacher: dict[str, Any] | None = None, **sections: Any) -> Path:
    content = {
        "name": "t",
        "model": {"base": "embedded:tiny"},
        "data": {"train": [{"embedded": "legal"}]},
        "method": {"type": "distill"},
        "teacher": {"model": "org/teacher", **(teacher or {"engine": {"http": {"urls": [URL]}}})},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def http(**options: Any) -> dict[str, Any]:
    return {"teacher": {"engine": {"http": {"urls": [URL], **options}}}}


def judged(**options: Any) -> dict[str, Any]:
    return {"teacher": {"verify": [{"judge": {"model": "org/judge", "url": URL, **options}}]}}


GRPO = {"type": "grpo", "rewards": ["exact"]}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "user and password": (http(urls=[f"http://bob:{SECRET}@host/v1"]), "urls[0]", "user name or a password"),
    "with a slash": (http(urls=[URL, f"https://bob:a/{SECRET}@host"]), "urls[1]", "user name or a password"),
    "in an address that is none": (http(urls=[f"bob:{SECRET}@host"]), "urls[0]", "user name or a password"),
    "in the query": (http(urls=[f"{URL}?api_key={SECRET}"]), "urls[0]", "what follows ?"),
    "a judge's": (judged(url=f"http://bob:{SECRET}@host/v1"), "verify[0].judge.url", "user name or a password"),
    "trl vllm-serve's": (
        {"method": {**GRPO, "vllm": {"mode": "server", "url": f"http://bob:{SECRET}@host"}}},
        "method.vllm.url",
        "user name or a password",
    ),
    "for its variable": (http(api_key_env=SECRET), "api_key_env", "name of an environment variable"),
    "that could be a name": (http(api_key_env="hf_hunter2SECRETabcdefghijklm"), "api_key_env", "never the key itself"),
    "the judge's": (judged(api_key_env=SECRET), "judge.api_key_env", "name of an environment variable"),
    "hub_token": ({"train": {"extra": {"hub_token": SECRET}}}, "train.extra", "'hub_token' holds a key"),
    "hf_token": ({"teacher": {"engine": {"vllm": {"extra": {"hf_token": SECRET}}}}}, "vllm.extra", "'hf_token'"),
    **{
        name: (http(extra_body={name: SECRET}), "extra_body", f"'{name}' holds a key")
        for name in ("api_key", "apiKey", "X-Api-Key", "authorization", "token", "client_secret", "password")
    },
    "deep inside": (http(extra_body={"x": [{"headers": {"Authorization": SECRET}}]}), "extra_body", "'Authorization'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_is_refused_and_not_repeated(tmp_path: Path, name: str) -> None:
    sections, where, words = REFUSED[name]
    with pytest.raises(RecipeError) as found:
        load_recipe(recipe_with(tmp_path, **sections))
    assert where in str(found.value) and words in str(found.value)
    assert "hunter2" not in str(found.value) and "\n" not in str(found.value)


def test_a_key_on_the_command_line_is_not_repeated_either(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'api_key' holds a key") as found:
        load_recipe(recipe_with(tmp_path), [f"teacher.engine.http.extra_body.api_key={SECRET}"])
    assert SECRET not in str(found.value)


def test_what_only_looks_like_one_is_taken(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"password": {"type": "string"}}, "required": ["password"]}
    body = {
        "guided_json": schema,
        "stop_token_ids": [1],
        "skip_special_tokens": False,
        "prompt_cache_key": "a",
        "stop_token": "</s>",
        "api_key": None,
    }
    given = http(urls=[URL + "/", "https://[::1]:8000"], extra_body=body, api_key_env="Key_2")
    teacher = load_recipe(recipe_with(tmp_path, **given)).teacher
    assert teacher is not None
    engine = teacher.engine.http
    assert engine is not None and engine.extra_body == body and engine.api_key_env == "Key_2"
    assert engine.urls == (URL, "https://[::1]:8000")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8000", "http://", "http://[", "http://a b/v1"])
def test_an_address_that_is_none(tmp_path: Path, url: str) -> None:
    for sections in (http(urls=[url]), judged(url=url)):
        with pytest.raises(RecipeError, match="is no address of an endpoint; such as http://"):
            load_recipe(recipe_with(tmp_path, **sections))
