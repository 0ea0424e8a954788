"""The HTTP engine against real servers, vLLM and `transformers serve`: same answers as plain greedy decoding here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_teachers import MODEL, PLAIN, Answers, legal_requests, recipe_for, reference, sequences
from servers import Server, transformers_server, vllm_server

from distill.engine_http import HttpTeacher
from distill.teachers import Completion

pytestmark = pytest.mark.slow
K = 16


@pytest.fixture(scope="module")
def expected() -> Answers:
    return reference()


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


def check(completions: list[Completion], expected: Answers, ids: bool) -> None:
    found = {c.key: c for c in completions}
    assert len(completions) == len(found) == len(expected.texts)
    assert {key: c.text for key, c in found.items()} == expected.texts
    assert {key: c.finish for key, c in found.items()} == expected.finishes
    assert {key: c.completion_tokens for key, c in found.items()} == {k: len(v) for k, v in expected.ids.items()}
    assert {key: c.prompt_tokens for key, c in found.items()} == expected.prompt_tokens
    assert {key: c.token_ids for key, c in found.items()} == (expected.ids if ids else dict.fromkeys(found))


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_vllm_answers_as_plain_decoding(vllm: Server, expected: Answers, api: str) -> None:
    teacher = teacher_at(vllm, expected.tokenizer, api=api)
    check(list(teacher.generate(legal_requests(expected.tokenizer))), expected, ids=True)
