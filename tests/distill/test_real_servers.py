"""The HTTP engine against real servers, vLLM and `transformers serve`: same answers as plain greedy decoding here, also
when the server is killed under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from real_teachers import (
    LONGEST,
    MODEL,
    Answers,
    K,
    distance,
    legal_requests,
    load_model,
    log_probs,
    plain_answers,
    recipe_for,
)
from servers import Server, transformers_server, vllm_server

from distill.engine_http import HttpTeacher
from distill.teachers import Completion
from recipes.errors import EngineError

pytestmark = pytest.mark.slow
BEFORE = 10  # answers before the server is killed


@pytest.fixture(scope="module")
def plain() -> Answers:
    return plain_answers()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with vllm_server(MODEL, tmp_path_factory.mktemp("vllm"), max_logprobs=K) as server:
        yield server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with transformers_server(MODEL, tmp_path_factory.mktemp("transformers")) as server:
        yield server


def teacher_at(server: Server, tokenizer: Any, **options: Any) -> HttpTeacher:
    engine = {"urls": [server.url], "served_as": server.model, "parallel": 8, **options}
    return HttpTeacher(recipe_for({"http": engine}, k=K), tokenizer)


def check(completions: list[Completion], plain: Answers, vllm: bool) -> None:
    """Every prompt answered once, with the text, the counts and the finish reason of plain decoding.

    `transformers serve` shows no token ids, and takes the finish reason from the count alone: an answer whose end token
    is the last that was allowed looks cut, which is the safe side.
    """
    found = {c.key: c for c in completions}
    assert len(completions) == len(found) == len(plain.texts)
    assert {key: c.text for key, c in found.items()} == plain.texts
    by_count = {key: "length" if len(i) == LONGEST else "stop" for key, i in plain.ids.items()}
    assert by_count != plain.finishes
    assert {key: c.finish for key, c in found.items()} == (plain.finishes if vllm else by_count)
    assert {key: c.completion_tokens for key, c in found.items()} == {key: len(i) for key, i in plain.ids.items()}
    assert {key: c.prompt_tokens for key, c in found.items()} == plain.prompt_tokens
    assert {key: c.token_ids for key, c in found.items()} == (plain.ids if vllm else dict.fromkeys(found))
    assert {c.truncated for c in completions} == {True, False}


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_vllm_answers_as_plain_decoding(vllm: Server, plain: Answers, api: str) -> None:
    teacher = teacher_at(vllm, plain.tokenizer, api=api)
    check(list(teacher.generate(legal_requests(plain.tokenizer))), plain, vllm=True)


def test_vllm_scores_as_transformers(vllm: Server, plain: Answers) -> None:
    model, asked = load_model(), []
    for number, request in enumerate(legal_requests(plain.tokenizer)[:12]):
        prompt, answer = list(request.prompt_ids or ()), list(plain.ids[request.key])
        asked.append((prompt + answer, [number % 3 == 0] * len(prompt) + [True] * len(answer)))
    found = list(teacher_at(vllm, plain.tokenizer, api="completions").score(asked))
    assert len(found) == len(asked)
    for (ids, marked), sparse in zip(asked, found, strict=True):
        places = [n for n in range(1, len(ids)) if marked[n]]
        exact = log_probs(model, ids)[[n - 1 for n in places]]
        assert distance(sparse, exact, [ids[n] for n in places], K) < 0.01


def test_transformers_serve_answers_as_plain_decoding(served: Server, plain: Answers) -> None:
    check(list(teacher_at(served, plain.tokenizer).generate(legal_requests(plain.tokenizer))), plain, vllm=False)


def test_transformers_serve_takes_no_token_ids(served: Server, plain: Answers) -> None:
    teacher = teacher_at(served, plain.tokenizer, api="completions")
    with pytest.raises(EngineError, match="prompt must be a string"):
        list(teacher.generate(legal_requests(plain.tokenizer)[:1]))


@pytest.mark.parametrize("which", ["served", "vllm"])
def test_a_server_that_is_killed_under_load_changes_nothing(
    which: str, plain: Answers, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(which)
    stream = teacher_at(server, plain.tokenizer).generate(legal_requests(plain.tokenizer))
    completions = list(islice(stream, BEFORE))
    server.kill()
    again = threading.Thread(target=server.start)
    again.start()
    completions += stream
    again.join()
    check(completions, plain, vllm=which == "vllm")
