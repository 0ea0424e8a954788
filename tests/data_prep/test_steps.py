"""Row steps through the whole preparation, semantic dedup, and the errors of their options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from conftest import run_cli, write_rows
from test_pipeline import chat, run, texts

from data_prep.assemble import read_rows
from data_prep.embed import embed, join_close
from data_prep.near_dup import Forest
from data_prep.pii import ENTITIES
from data_prep.quality import DEFAULTS
from recipes.errors import RecipeError
from recipes.load import load_recipe
from recipes.schema_data import Entity, QualityRule

ENGLISH = "The tenant shall pay the rent on the first day of every month."
GERMAN = "Der Mieter zahlt die Miete am ersten Tag eines jeden Monats."


def kept(prepared: Any) -> list[str]:
    return [row["messages"][0]["content"] for row in read_rows(prepared.folder, "train")]


def test_names_in_the_schema_are_those_of_the_code() -> None:
    assert set(get_args(QualityRule)) == set(DEFAULTS)
    assert set(get_args(Entity)) == set(ENTITIES)


def test_language_length_and_quality(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    babble = "buy now " * 15
    path = write_rows(tmp_path / "r.jsonl", [chat(ENGLISH), chat(GERMAN), chat(ENGLISH + " Yes.", babble), chat("?")])
    source = {"train": [{"path": str(path)}]}
    prepared = run(make_recipe, tmp_path / "a", **source, steps=[{"language": {"keep": ["en"]}}])
    assert kept(prepared) == [ENGLISH, ENGLISH + " Yes."] and prepared.counts["dropped"] == {"language": 2}
    prepared = run(make_recipe, tmp_path / "b", **source, steps=["quality"])
    assert kept(prepared) == [ENGLISH, GERMAN, "?"]
    (line,) = map(json.loads, (prepared.folder / "dropped.jsonl").open())
    assert line["reason"] == "quality" and "max_top_2gram: 1.0, the limit is 0.2" in line["detail"]
    rules = {name: None for name in DEFAULTS if "gram" in name or "duplicate" in name}
    prepared = run(make_recipe, tmp_path / "c", **source, steps=[{"quality": {"rules": rules}}])
    assert len(kept(prepared)) == 4
    prepared = run(make_recipe, tmp_path / "d", **source, steps=[{"length": {"max_tokens": 30}}])
    assert kept(prepared) == ["?"] and prepared.counts["dropped"] == {"length": 3}
    tokenizer = prepared.tokenizer.backend
    details = [json.loads(line)["detail"] for line in (prepared.folder / "dropped.jsonl").open()]
    assert details[0] == f"{len(tokenizer(ENGLISH + chr(10) + 'red')['input_ids'])} tokens"


def test_personal_data_is_masked_or_dropped(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    call = {"function": {"name": "mail", "arguments": {"to": "ann@example.com", "cc": ["bob@example.com"]}}}
    said = {"role": "assistant", "content": "Sent to ANN@example.com.", "tool_calls": [call]}
    messages = [{"role": "user", "content": "Write to bob@example.com and ann@example.com."}, said]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": messages}, chat("Nobody here.")])
    source = {"train": [{"path": str(path)}], "too_long": "truncate"}
    with pytest.raises(RecipeError, match=r"no rule finds 'PERSON'"):
        run(make_recipe, tmp_path / "n", **source, steps=[{"pii": {"entities": ["PERSON"]}}])
    prepared = run(make_recipe, tmp_path / "d", **source, steps=[{"pii": {"action": "drop"}}])
    assert kept(prepared) == ["Nobody here."]
    (line,) = map(json.loads, (prepared.folder / "dropped.jsonl").open())
    assert (line["reason"], line["detail"]) == ("pii", "2 EMAIL")
    from data_prep.formats import to_row
    from data_prep.steps import row_step
    from recipes.schema import Model
    from recipes.schema_data import Source, Step

    step = row_step(Step.model_validate("pii"), Model(base="embedded:tiny"))
    masked = step(to_row({"messages": messages}, "f:1", Source(path="f")))
    assert masked.messages[0]["content"] == "Write to [EMAIL_1] and [EMAIL_2]."  # type: ignore[union-attr]
    answer = masked.messages[1]  # type: ignore[union-attr]
    assert answer["content"] == "Sent to [EMAIL_2]."
    assert answer["tool_calls"][0]["function"] == {
        "name": "mail",
        "arguments": {"to": "[EMAIL_2]", "cc": ["[EMAIL_1]"]},
    }


def test_semantic_dedup(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    rows = [chat(t) for t in texts(6, low=10, high=14)]
    same = chat(rows[2]["messages"][0]["content"], "blue")  # another row with the same prompt
    path = write_rows(tmp_path / "r.jsonl", [*rows, same])
    step = {"semantic_dedup": {"model": "embedded:tiny", "threshold": 0.999, "on": "prompt"}}
    prepared = run(make_recipe, tmp_path / "run", train=[{"path": str(path)}], steps=[step])
    assert prepared.counts["dropped"] == {"semantic_duplicate": 1}
    vectors = embed(["a contract", "a contract", "the sea"], "embedded:tiny")
    assert vectors.dtype == np.float16 and np.allclose(np.linalg.norm(vectors.astype(float), axis=1), 1, atol=2e-3)
    assert np.allclose(vectors[0], vectors[1]) and not np.allclose(vectors[0], vectors[2], atol=0.05)


def test_every_pair_is_compared_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.embed.BLOCK", 3)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 16))
    vectors[13], vectors[19], vectors[4] = vectors[2], vectors[7], vectors[5]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    forest = Forest(20)
    alive = np.ones(20, bool)
    alive[5] = False
    join_close(forest, [vectors[:9], vectors[9:]], alive, 0.99)
    expected = np.arange(20)
    expected[13], expected[19] = 2, 7
    assert forest.heads().tolist() == expected.tolist()


BAD_OPTIONS = [
    ("[cleen]", "there is no step 'cleen'; did you mean clean?"),
    ("[language]", "the step language needs options: {language: {keep: [en]}}"),
    ("[{near_dedup: {treshold: 0.8}}]", "did you mean 'data.steps[0].near_dedup.threshold'?"),
    ("[{near_dedup: {threshold: 2}}]", "less than or equal to 1"),
    ("[{clean: {}, pii: {}}]", "a step is one name"),
    ("[decontaminate, clean]", "decontaminate is the last step"),
    ("[{pii: {entities: [EMIAL]}}]", "EMAIL"),
    ("[{quality: {rules: {min_word: 3}}}]", "min_words"),
    ("[{length: {min_tokens: 9, max_tokens: 3}}]", "min_tokens 9 is more than max_tokens 3"),
    ("[3]", "data.steps[0]"),
]


@pytest.mark.parametrize(("steps", "message"), BAD_OPTIONS)
def test_wrong_options_are_named(steps: str, message: str, make_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(make_recipe(), [f"data.steps={steps}"])
    assert message in str(caught.value), str(caught.value)


def test_the_command_says_what_happened(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "r.jsonl", [chat(t) for t in texts(9, low=5, high=9)] + [chat(texts(1, low=5, high=9)[0])]
    )
    data = {"train": [{"path": str(path)}], "steps": ["exact_dedup"]}
    done = run_cli("prepare", str(make_recipe(data=data)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exact_duplicate" in done.stdout and "1 (10.0%)" in done.stdout and "dropped.jsonl" in done.stdout
    done = run_cli("prepare", str(tmp_path / "recipe.yaml"), "--executor", "sluurm", cwd=tmp_path)
    assert done.returncode == 2 and "there is no executor 'sluurm'" in done.stderr
