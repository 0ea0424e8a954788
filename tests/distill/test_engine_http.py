"""What the HTTP engine sends, and what it makes of replies, against a real server (chaos_server.py)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chaos_server import (
    Changed,
    ChaosServer,
    Late,
    Status,
    distribution,
    expected,
    no_thread_left,
    requests,
    results,
    servers,
    shorten_pauses,
    some,
    summary,
    teacher_at,
)
from conftest import ROOT
from pydantic import SecretStr

from data_prep.completions import split_thinking
from distill.engine_http import HttpTeacher, is_hosted
from distill.http_errors import Key
from recipes.errors import EngineError, RecipeError
from recipes.evidence import served_name


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_pauses(monkeypatch)


@pytest.fixture
def serve() -> Iterator[Callable[..., ChaosServer]]:
    yield from servers()


SECRET = "sk-chaos-0123456789abcdef-WXYZ"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_every_request_is_answered_once(serve: Callable[..., ChaosServer], api: str) -> None:
    server, asked = serve(), requests()
    completions = results(teacher_at(server.url, api=api, parallel=8).generate(asked))
    assert summary(completions.values()) == expected(asked, api)
    assert {c.finish for c in completions.values()} == {"stop", "length"}
    assert all(c.truncated == (c.finish == "length") for c in completions.values())
    assert all(c.max_tokens == 16 and c.model == "org/teacher" for c in completions.values())
    assert all(c.completion_tokens == len(c.token_ids or ()) for c in completions.values())
    assert len(server.posts) == len(asked) and server.most_at_once <= 8
    assert no_thread_left()


def test_what_is_sent(serve: Callable[..., ChaosServer]) -> None:
    server = serve()
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20.0, "min_p": 0.05, "repetition_penalty": 1.1}
    [request] = requests(1, max_tokens=7, tools=(tool,))
    request = replace(request, sampling=sampling, seed=2**31 + 5)
    with_kwargs = {"template_kwargs": {"enable_thinking": False}}
    extra = {"priority": 3, "top_p": None}
    list(teacher_at(server.url, teacher=with_kwargs, extra_body=extra).generate([request]))
    list(teacher_at(server.url, api="completions").generate([replace(request, sampling={})]))
    chat, completion = server.posts
    assert chat.path == "/v1/chat/completions" and completion.path == "/v1/completions"
    assert chat.body == {
        "model": "org/teacher",
        "messages": list(request.messages),
        "tools": [tool],
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": 7,
        "seed": 5,
        "temperature": 0.6,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "priority": 3,
        "return_token_ids": True,
    }
    assert type(chat.body["top_k"]) is int  # vLLM refuses 20.0
    assert completion.body == {
        "model": "org/teacher",
        "prompt": [0],
        "max_tokens": 7,
        "seed": 5,
        "return_token_ids": True,
    }
    assert "Authorization" not in chat.headers


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (400, "bad temperature", "refuses request key0000: HTTP 400 .bad temperature"),
        (401, "no key", "HTTP 401 .no key.; name the environment variable .* teacher.engine.http.api_key_env"),
        (403, "not yours", "HTTP 403 .not yours.; see whether the key may use this model"),
        (404, "The model `x` does not exist.", "check teacher.engine.http.urls .* and served_as"),
        (422, "Unexpected fields in the request: {'min_p'}", "left out by .*extra_body: {NAME: null}"),
        (302, "", "check teacher.engine.http.urls"),
        (
            400,
            "This model's maximum context length is 64 tokens. However, ...",
            "request key0000 is too long .* HTTP 400",
        ),
        (429, "You exceeded your quota (insufficient_quota)", "see the account at the service"),
    ],
)
def test_fatal_at_once(serve: Callable[..., ChaosServer], status: int, said: str, message: str) -> None:
    server = serve(mischief=lambda *_: Status(status, json.dumps({"error": {"message": said, "type": "x"}})))
    with pytest.raises(EngineError, match=message) as caught:
        list(teacher_at(server.url, parallel=4).generate(requests(1)))
    assert len(server.posts) == 1 and server.url in str(caught.value) and "\n" not in str(caught.value)
    assert no_thread_left()


def test_a_long_message_is_shortened(serve: Callable[..., ChaosServer]) -> None:
    server = serve(mischief=lambda *_: Status(400, "<p>" + "long " * 1000))
    with pytest.raises(EngineError) as caught:
        list(teacher_at(server.url).generate(requests(1)))
    assert 200 < len(str(caught.value)) < 600


def test_a_field_that_the_server_refuses_is_left_out(serve: Callable[..., ChaosServer]) -> None:
    def strict(number: int, body: dict[str, Any]) -> Any:
        if "return_token_ids" in body:
            return Status(422, '{"detail": "Unexpected fields in the request: {\'return_token_ids\'}"}')
        return Status(400, "Use 'max_completion_tokens' instead of 'max_tokens'.") if "max_tokens" in body else None

    server, asked = serve(mischief=strict), requests(40)
    teacher = teacher_at(server.url, parallel=4, retries=0)
    found = results(teacher.generate(asked))
    assert {key: c.text for key, c in found.items()} == {key: text for key, (text, *_) in expected(asked).items()}
    assert all(c.token_ids is None for c in found.values())
    assert len(server.posts) <= 40 + 4 * 2  # refused once by each that was under way
    before = len(server.posts)
    list(teacher.generate(asked))
    assert len(server.posts) == before + 40


def test_the_key_is_hidden(
    serve: Callable[..., ChaosServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHAOS_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    quoted = json.dumps(
        {"error": {"message": f"Incorrect API key provided: {SECRET}, or sk-chaos****WXYZ. Bearer {SECRET}"}}
    )
    good, bad = serve(), serve(mischief=lambda *_: Status(401, quoted))
    ill = serve(mischief=lambda *_: Status(500, quoted))
    texts = []
    for server in (good, bad, ill):
        teacher = teacher_at(server.url, api_key_env="CHAOS_KEY", retries=1)
        try:
            texts.append(repr(list(teacher.generate(requests(3)))))
        except EngineError as error:
            texts += [str(error), repr(error), repr(error.__context__), repr(error.__cause__)]
        texts += [repr(teacher), repr(vars(teacher)), json.dumps(teacher.identity), repr(teacher.notes)]
        assert {p.headers["Authorization"] for p in server.posts} == {f"Bearer {SECRET}"}
    assert "set aside" in repr(texts) or "HTTP 500" in repr(texts)
    assert any("environment variable CHAOS_KEY" in text for text in texts)
    everything = "\n".join([*texts, caplog.text])
    assert SECRET not in everything and not re.search(r"sk-chaos|WXYZ", everything)
    assert not [r for r in caplog.records if r.name.startswith(("httpx", "httpcore"))]


def test_a_key_that_is_not_there(serve: Callable[..., ChaosServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAOS_KEY", " ")
    server = serve()
    with pytest.raises(RecipeError, match="environment variable CHAOS_KEY is not set"):
        teacher_at(server.url, api_key_env="CHAOS_KEY")
    assert not server.seen


def test_hiding_leaves_other_words_alone() -> None:
    assert Key("K", SecretStr("short")).hide("a short word, shortly") == "a *** word, ***ly"
    long = Key("K", SecretStr("abcdef0123456789wxyz"))
    assert long.hide("key abcdef...wxyz is wrong; wxyzzy abcde 'x-abcdef9'") == "key *** is wrong; wxyzzy abcde '***'"


@pytest.mark.parametrize("what", ["model", "system_fingerprint"])
def test_another_model_under_way(serve: Callable[..., ChaosServer], what: str) -> None:
    server = serve(mischief=lambda number, _: Changed(reply={what: "org/one" if number < 10 else "org/two"}))
    found = []
    with pytest.raises(EngineError, match=f"{what} was 'org/one' and is 'org/two'"):
        for completion in teacher_at(server.url, parallel=1).generate(requests(40)):
            found.append(completion)
    assert len(found) == 10  # what came before stays valid


def test_two_endpoints_with_different_models(serve: Callable[..., ChaosServer]) -> None:
    one = serve(mischief=lambda *_: Changed(reply={"model": "org/one", "system_fingerprint": "a"}))
    two = serve(mischief=lambda *_: Changed(reply={"model": "org/two", "system_fingerprint": "b"}))
    with pytest.raises(EngineError, match=r"model was 'org/(one|two)' and is 'org/(one|two)'"):
        list(teacher_at(one.url, two.url, parallel=1).generate(requests(40)))


def test_fingerprints_of_machines_and_services(serve: Callable[..., ChaosServer]) -> None:
    """Two machines have one each, which may differ; a service's change with the machine that answers."""
    one = serve(mischief=lambda *_: Changed(reply={"system_fingerprint": "a"}))
    two = serve(mischief=lambda *_: Changed(reply={"system_fingerprint": "b"}))
    assert len(list(teacher_at(one.url, two.url, parallel=1).generate(requests(20)))) == 20
    assert one.posts and two.posts
    service = serve("gpt-4o", mischief=lambda n, _: Changed(reply={"system_fingerprint": f"fp_{n}"}))
    teacher = teacher_at(service.url, model="openai:gpt-4o")
    assert len(list(teacher.generate(requests(20)))) == 20
    assert "return_token_ids" not in service.posts[0].body and service.posts[0].body["model"] == "gpt-4o"


def test_the_served_name(serve: Callable[..., ChaosServer]) -> None:
    server = serve("legal-70b", listing={"data": [{"id": "legal-70b"}, {"id": "base-7b"}]})
    with pytest.raises(EngineError, match=r"does not serve 'legal-7Ob' .did you mean legal-70b.*served_as"):
        teacher_at(server.url, served_as="legal-7Ob")
    with pytest.raises(EngineError, match="it serves base-7b, legal-70b"):
        teacher_at(server.url, model="embedded:tiny-teacher")
    teacher = teacher_at(server.url, model="org/legal@abc123", served_as="legal-70b", extra_body={"effort": "high"})
    assert teacher.identity == {
        "model": "org/legal@abc123",
        "served_as": "legal-70b",
        "extra_body": {"effort": "high"},
    }
    assert server.url not in json.dumps(teacher.identity)


@pytest.mark.parametrize(
    "listing",
    [
        Status(404),
        Status(403),
        {"data": []},
        {"models": "?"},
        [{"id": "org/teacher"}],
        {"data": [{"id": "org/teacher:latest"}]},
        {"data": [{"id": "other/cached", "owned_by": "other"}, {"id": "gpt2", "owned_by": ""}]},  # transformers serve
    ],
)
def test_lists_of_models_that_tell_nothing(serve: Callable[..., ChaosServer], listing: Any) -> None:
    assert len(list(teacher_at(serve(listing=listing).url).generate(requests(2)))) == 2


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("openai:gpt-4o", "gpt-4o"),
        ("llama3:8b", "llama3:8b"),
        ("Qwen/Qwen3-32B@9216db5781bf21249d130ec9da846c4624c16137", "Qwen/Qwen3-32B"),
        ("embedded:tiny-teacher", "embedded:tiny-teacher"),
        ("./models/teacher", "./models/teacher"),
    ],
)
def test_served_name(model: str, name: str) -> None:
    assert served_name(model) == name


def test_hosted() -> None:
    assert is_hosted("openai:gpt-4o", ["http://127.0.0.1:1/v1"])
    assert is_hosted("gpt-4o", ["https://api.openai.com/v1"])
    assert not is_hosted("org/teacher", ["http://127.0.0.1:1/v1", "http://node7:8000/v1"])


BOTH = "<think>\nHm.\n</think>\n\nYes."
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Yes."}]


@pytest.mark.parametrize(
    ("message", "choice", "thinking", "answer", "text"),
    [
        ({"reasoning_content": "Hm.", "content": "Yes."}, {}, "Hm.", "Yes.", BOTH),
        ({"reasoning": "Hm.\n", "content": "\nYes."}, {}, "Hm.", "Yes.", BOTH),
        ({"reasoning": "Hm", "content": None}, {"finish_reason": "length"}, "Hm", "", "<think>\nHm"),
        ({"reasoning": "", "content": " Yes. "}, {}, None, "Yes.", "Yes."),
        ({"reasoning": "Hm.", "content": BOTH}, {}, "Hm.", "Yes.", BOTH),
        ({"content": PARTS}, {}, "Hm.", "Yes.", BOTH),
    ],
)
def test_thinking_is_told_from_the_answer(
    serve: Callable[..., ChaosServer], message: Any, choice: Any, thinking: str | None, answer: str, text: str
) -> None:
    server = serve(mischief=lambda *_: Changed(message=message, choice=choice))
    [completion] = teacher_at(server.url).generate(requests(1))
    assert completion.text == text
    assert split_thinking(completion.text) == (thinking, answer)


def test_tool_calls_and_silent_servers(serve: Callable[..., ChaosServer]) -> None:
    """Finish reason, counts and token ids may be missing; what stands in for them is said."""
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"a": 1}'}}
    message = {"content": None, "tool_calls": [call]}
    server = serve(mischief=lambda *_: Changed(message=message, choice={"finish_reason": "tool_calls"}))
    [completion] = teacher_at(server.url).generate(requests(1))
    assert completion.tool_calls == (call,) and completion.text == "" and not completion.truncated
    silent = Changed(
        reply={"usage": None, "model": None},
        choice={"finish_reason": None, "token_ids": None},
        message={"content": "x" * 40},
    )
    teacher = teacher_at(serve(mischief=lambda *_: silent).url)
    [completion] = teacher.generate(requests(1, max_tokens=10))
    assert (completion.finish, completion.completion_tokens, completion.prompt_tokens) == ("unknown", 10, 1)
    assert completion.truncated and teacher.estimated == 1 and completion.model == "org/teacher"
    [completion] = teacher.generate([replace(requests(1)[0], prompt_ids=None)])
    assert completion.prompt_tokens == len(json.dumps([requests(1)[0].messages, []], ensure_ascii=False)) // 4


@pytest.mark.parametrize(
    ("finish", "tokens", "ids", "cut"),
    [
        ("stop", 64, False, True),  # whatever the server says
        ("stop", 64, True, True),
        ("tool_calls", 64, False, True),
        ("stop", 32, False, True),  # as some say of every answer
        ("stop", 32, True, False),  # the end token was the last that found room
        ("length", 32, True, True),
        ("length", 5, False, True),
        ("stop", 31, False, False),
        (None, 31, False, False),
        (None, 32, True, True),
        ("stop", None, False, False),  # not counted: some 40 by the characters, which proves nothing
        (None, None, False, True),
    ],
)
def test_an_answer_that_is_cut(
    serve: Callable[..., ChaosServer], finish: str | None, tokens: int | None, ids: bool, cut: bool
) -> None:
    choice = {"finish_reason": finish, "token_ids": list(range(tokens or 0)) if ids else None}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens}
    said = Changed(reply={"usage": usage}, choice=choice, message={"content": "word " * 32})
    [completion] = teacher_at(serve(mischief=lambda *_: said).url).generate(requests(1, max_tokens=32))
    assert completion.truncated == cut


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "recipes" / "embedded" / "tiny-teacher")


def test_with_the_teachers_tokenizer(serve: Callable[..., ChaosServer], tokenizer: Any) -> None:
    """The text of a completion is read from its token ids; a tag that the template opened is put back."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    wrote = ids("The door is red.</think> red<|im_end|>")
    asked = [replace(requests(1)[0], prompt_ids=tuple(ids("<|im_start|>assistant\n<think>\n")))]
    reply = Changed(choice={"token_ids": wrote, "text": "The door is red.</think> red"})
    server = serve(mischief=lambda *_: reply)
    [completion] = teacher_at(server.url, tokenizer=tokenizer, api="completions").generate(asked)
    assert completion.text == "<think>The door is red.</think> red" and completion.token_ids == tuple(wrote)
    for message, finish, text in [
        ({"content": "Hm.</think> red"}, "stop", "<think>Hm.</think> red"),
        ({"content": "Hm, the door"}, "length", "<think>Hm, the door"),  # cut while thinking: no answer
        ({"content": "red"}, "stop", "red"),  # the server took the thinking away
        ({"content": "red", "reasoning": "Hm."}, "length", "<think>\nHm.\n</think>\n\nred"),
    ]:
        chat = serve(mischief=lambda *_, m=message, f=finish: Changed(message=m, choice={"finish_reason": f}))
        [completion] = teacher_at(chat.url, tokenizer=tokenizer).generate(asked)
        assert completion.text == text
    uncounted = serve(
        mischief=lambda *_: Changed(reply={"usage": None}, choice={"token_ids": None}, message={"content": "red door"})
    )
    [completion] = teacher_at(uncounted.url, tokenizer=tokenizer).generate(asked)
    assert completion.completion_tokens == len(ids("red door"))


def scorer(url: str, k: int = 3, **changes: Any) -> HttpTeacher:
    logits = {"kind": "topk", "k": k, **changes.pop("logits", {})}
    method = {"logits": logits}
    return teacher_at(url, teacher=method, **{"api": "completions", "parallel": 4, **changes})


SEQUENCES = [([i % 10 for i in range(n, 2 * n + 1)], [i % 3 != 1 for i in range(n + 1)]) for n in range(12)]


def test_scores(serve: Callable[..., ChaosServer]) -> None:
    server = serve(mischief=some(0.3, Status(500), Late(0.1), Changed(choice={"prompt_logprobs": [None]})))
    found = list(scorer(server.url).score(SEQUENCES))
    assert len(found) == len(SEQUENCES)
    for (ids, marked), sparse in zip(SEQUENCES, found, strict=True):
        at = [t for t in range(1, len(ids)) if marked[t]]
        assert sparse.counts.tolist() == [3] * len(at)
        for row, t in enumerate(at):
            logs = np.array(distribution(ids, t))
            order = np.argsort(-logs)[:3]
            assert sparse.ids[3 * row : 3 * row + 3].tolist() == order.tolist()
            assert np.allclose(sparse.log_probs[3 * row : 3 * row + 3], logs[order], atol=2e-3)
            assert sparse.actual[row] == pytest.approx(logs[ids[t]], abs=2e-3)
            assert np.exp(float(sparse.tail[row])) == pytest.approx(1 - np.exp(logs[order]).sum(), abs=2e-3)
    body = server.posts[0].body
    assert (body["max_tokens"], body["prompt_logprobs"], body["temperature"]) == (1, 3, 1.0)
    assert all(any(marked[1:]) for ids, marked in SEQUENCES if ids in [p.body["prompt"] for p in server.posts])


def test_what_cannot_be_scored(serve: Callable[..., ChaosServer]) -> None:
    for changes in ({"api": "chat"}, {"logits": {"kind": "sampled"}}, {"logits": {"temperature": 2.0}}):
        with pytest.raises(EngineError, match="engine transformers"):
            scorer(serve().url, **changes).score(SEQUENCES)
    silent = serve(mischief=lambda *_: Changed(choice={"prompt_logprobs": None}))
    with pytest.raises(EngineError, match="no log-probabilities of a prompt"):
        list(scorer(silent.url).score(SEQUENCES))
    said = "Requested prompt logprobs of 32, which is greater than max allowed: 20"
    capped = serve(mischief=lambda *_: Status(400, json.dumps({"error": {"message": said}})))
    with pytest.raises(EngineError, match=r"max allowed: 20.*--max-logprobs of at least"):
        list(scorer(capped.url, k=32).score(SEQUENCES))


def test_token_ids_that_are_not_at_hand(serve: Callable[..., ChaosServer]) -> None:
    with pytest.raises(EngineError, match=r"name it in teacher.tokenizer, or set api: chat"):
        list(teacher_at(serve().url, api="completions").generate([replace(requests(1)[0], prompt_ids=None)]))
    said = json.dumps({"detail": "prompt must be a string."})  # transformers serve
    server = serve(mischief=lambda *_: Status(400, said))
    with pytest.raises(EngineError, match=r"takes no token ids: set teacher.engine.http.api: chat"):
        list(teacher_at(server.url, api="completions").generate(requests(1)))


def test_extra_body_may_not_break_the_protocol() -> None:
    with pytest.raises(RecipeError, match="stream is set by Retort"):
        teacher_at("http://127.0.0.1:1/v1", extra_body={"stream": True})
