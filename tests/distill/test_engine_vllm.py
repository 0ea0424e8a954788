"""vLLM in process, run by a Python of its own (real_teachers.py), against plain decoding and scoring here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from real_teachers import (
    MODEL,
    PROMPTS,
    WINDOW,
    Answers,
    K,
    distance,
    from_json,
    legal_requests,
    load_model,
    log_probs,
    plain_answers,
    recipe_for,
)
from servers import vllm_environment, vllm_python

from data_prep.identity import model_identity
from distill.engine_vllm import VllmTeacher
from recipes.errors import EngineError, RecipeError


@pytest.mark.parametrize(
    ("logits", "asked"),
    [({"kind": "sampled"}, "kind: sampled"), ({"temperature": 2.0}, "temperature: 2.0")],
)
def test_distributions_that_vllm_cannot_give_are_refused_before_it_starts(logits: dict[str, Any], asked: str) -> None:
    with pytest.raises(EngineError, match=f"not enough for {asked}; use teacher.engine: transformers"):
        VllmTeacher(recipe_for("vllm", logits=logits), None)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model": "org/other"}, "set teacher.model"),
        ({"logprobs_mode": "processed_logprobs"}, "set teacher.logits"),
        ({"trust_remote_code": True}, "runs no code"),
        ({"load_format": "pt"}, "safetensors only"),
    ],
)
def test_extra_arguments_do_not_undo_what_the_recipe_says(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        VllmTeacher(recipe_for({"vllm": {"extra": extra}}), None)


def test_a_missing_vllm_is_named() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    with pytest.raises(EngineError, match="vllm is not installed") as error:
        VllmTeacher(recipe_for("vllm"), None)
    assert error.value.exit_code == 6 and "run `vllm serve` and use engine: http" in str(error.value)


@pytest.fixture(scope="module")
def plain() -> Answers:
    return plain_answers()


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM answered."""
    out = tmp_path_factory.mktemp("vllm") / "found.json"
    command = [str(vllm_python()), str(ROOT / "tests" / "distill" / "real_teachers.py"), str(out)]
    done = subprocess.run(command, env=vllm_environment(), capture_output=True, text=True, timeout=500)
    # The exit code is left alone: this build sometimes aborts in its own destructors, when all is done.
    assert out.is_file(), done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


@pytest.mark.slow
def test_greedy_answers_are_those_of_plain_decoding(found: dict[str, Any], plain: Answers) -> None:
    answers = {one["key"]: one for one in found["greedy"]}
    assert len(answers) == len(found["greedy"]) == PROMPTS
    assert {key: tuple(one["token_ids"]) for key, one in answers.items()} == plain.ids
    assert {key: one["text"] for key, one in answers.items()} == plain.texts
    assert {key: one["finish"] for key, one in answers.items()} == plain.finishes
    assert {key: one["prompt_tokens"] for key, one in answers.items()} == plain.prompt_tokens
    assert all(one["completion_tokens"] == len(one["token_ids"]) for one in answers.values())
    assert {one["finish"] for one in answers.values()} == {"stop", "length"}


@pytest.mark.slow
def test_distributions_kept_while_generating_are_those_of_scoring_and_of_transformers(
    found: dict[str, Any], plain: Answers, model: Any
) -> None:
    prompts = {r.key: list(r.prompt_ids or ()) for r in legal_requests(plain.tokenizer)}
    scored = dict(zip(prompts, found["scored"], strict=False))
    for one in found["greedy"]:
        kept, again = from_json(one["sparse"]), from_json(scored[one["key"]])
        exact = log_probs(model, [*prompts[one["key"]], *one["token_ids"]])[-len(one["token_ids"]) :]
        assert distance(kept, exact, one["token_ids"], K) < 0.01
        assert distance(again, exact, one["token_ids"], K) < 0.01
        assert np.array_equal(kept.ids.reshape(-1, K)[:, 0], one["token_ids"])  # greedy: the likeliest stands there


@pytest.mark.slow
def test_the_first_token_is_never_scored_and_no_mark_is_no_score(found: dict[str, Any], model: Any) -> None:
    assert len(found["scored"]) == PROMPTS + 2
    assert distance(from_json(found["scored"][-2]), log_probs(model, [5, 6, 7])[1:], [7], K) < 0.01
    assert found["scored"][-1] == {"counts": [], "ids": [], "log_probs": [], "actual": [], "tail": []}


@pytest.mark.slow
def test_drawn_answers_follow_their_seed_and_keep_the_distribution_before_cuts(
    found: dict[str, Any], plain: Answers, model: Any
) -> None:
    drawn, again, otherwise = (
        {one["key"]: one["token_ids"] for one in found[name]} for name in ("drawn", "again", "otherwise")
    )
    assert drawn == again and drawn != otherwise and len(drawn) == 12
    assert any(tuple(ids) != plain.ids[key] for key, ids in drawn.items())
    prompts = {r.key: list(r.prompt_ids or ()) for r in legal_requests(plain.tokenizer)}
    for one in found["drawn"]:
        exact = log_probs(model, [*prompts[one["key"]], *one["token_ids"]])[-len(one["token_ids"]) :]
        assert distance(from_json(one["sparse"]), exact, one["token_ids"], K) < 0.01


@pytest.mark.slow
def test_a_bounded_number_is_in_flight_and_a_closed_stream_leaves_nothing(
    found: dict[str, Any], plain: Answers
) -> None:
    assert found["taken"] == 16  # four for each of the four that run side by side
    assert found["left"] == 0
    assert {one["key"]: one["text"] for one in found["after"]} == {
        key: plain.texts[key] for key in ("legal-00", "legal-01")
    }


@pytest.mark.slow
def test_answers_end_before_the_window_does(found: dict[str, Any]) -> None:
    empty, short = found["window"]
    assert (empty["key"], empty["finish"], empty["token_ids"], empty["text"]) == (str(WINDOW), "length", [], "")
    assert (short["finish"], short["completion_tokens"], short["max_tokens"]) == ("length", 3, 8)
    assert f"a sequence of {WINDOW} tokens is longer than vLLM's window" in found["too long"]


@pytest.mark.slow
def test_what_vllm_refuses_is_one_line(found: dict[str, Any]) -> None:
    assert found["no ids"].startswith("teacher.model: vLLM in this process needs prompts as token ids")
    assert found["bad sampling"].startswith("teacher.sampling: vLLM refuses the sampling: top_p must be in (0, 1]")


@pytest.mark.slow
def test_the_same_weights_are_the_same_teacher_under_another_engine(found: dict[str, Any]) -> None:
    assert found["identity"] == model_identity(recipe_for("transformers"))
    copy = recipe_for({"http": {"urls": ["http://127.0.0.1:1"]}}, model=str(MODEL))
    assert found["identity"] == model_identity(copy)
