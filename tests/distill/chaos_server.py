"""A real HTTP server that speaks as OpenAI-compatible ones do, and misbehaves on request.

What it answers is a pure function of the prompt, so a disturbed run can be compared with an undisturbed one. What it
does instead of answering is decided by `mischief`, a function of the request's number (from 0, in order of arrival) and
its body, which returns one of the replies below, or None for a plain answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from distill import http_stream
from distill.engine_http import HttpTeacher
from distill.teachers import Completion, Request, open_teacher
from recipes.schema import Recipe

WORDS = ["the", "court", "finds", "that", "no", "party", "may", "rely", "on", "such", "a", "clause", "where", "notice"]
LONGEST_HANG = 30.0  # seconds


@dataclass(frozen=True)
class Status:
    """An error instead of an answer."""

    code: int
    text: str = '{"error": {"message": "chaos"}}'
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """These bytes instead of an answer; `missing` more are promised, and the connection is closed."""

    body: bytes
    missing: int = 0


@dataclass(frozen=True)
class Late:
    """The answer, after a while."""

    seconds: float


@dataclass(frozen=True)
class Changed:
    """The answer, with other fields: of the reply, of its choice, of its message; None takes one away."""

    reply: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)


class Hang:
    """Nothing at all, until the client gives up."""


Mischief = Callable[[int, dict[str, Any]], Any]


def some(share: float, *replies: Any, seed: int = 0) -> Mischief:
    """That share of the requests gets one of the replies; which ones is decided by their numbers alone."""

    def mischief(number: int, body: dict[str, Any]) -> Any:
        draw = random.Random(f"{seed} {number}")
        return draw.choice(replies) if draw.random() < share else None

    return mischief


_LIMITS = {"Retry-After": "0.1"}
# What may befall requests, and options of the engine with it: the result is the undisturbed one all the same.
DISTURBANCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "errors": (some(0.3, Status(500), Status(502, "<html>Bad gateway</html>"), Status(503)), {}),
    "refusals": (some(0.3, Status(429), Status(408), Status(409), Status(425)), {}),
    "no reply": (some(0.15, Hang()), {"seconds": 0.4}),
    "no JSON": (some(0.3, Raw(b"{"), Raw(b""), Raw(b"\xff\xfe"), Raw(b"[1]"), Raw(b'"text"')), {}),
    "half a body": (some(0.3, Raw(b'{"choices": [{"mess', missing=40)), {}),
    "no choices": (some(0.3, Changed({"choices": []}), Changed({"choices": 1}), Changed({}, {"message": None})), {}),
    "errors in replies": (some(0.3, Changed({"error": {"message": "overloaded"}, "model": "gateway"})), {}),
    "broken off": (some(0.3, Changed({}, {"finish_reason": "abort"}, {"content": "the co"})), {}),
    "out of order": (some(1.0, *(Late(x / 100) for x in range(12))), {}),
    "asked to wait": (some(0.1, Status(429, headers=_LIMITS), Status(503, headers=_LIMITS)), {}),
    "late twins": (some(0.1, Late(0.8)), {"seconds": 0.4}),  # the server answers twice, the first time to nobody
    "everything": (
        some(
            0.4, Status(500), Status(429), Raw(b"{"), Raw(b"{", missing=9), Hang(), Late(0.1), Changed({"choices": 1})
        ),
        {"seconds": 0.4},
    ),
}


def answer_to(prompt: Any, most: int) -> tuple[list[int], str, str]:
    """Token ids, text and finish reason: 1 to 24 words that follow from the prompt, cut after `most`."""
    draw = random.Random(hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest())
    ids = [draw.randrange(len(WORDS)) for _ in range(draw.randint(1, 24))]
    cut = ids[:most]
    return cut, " ".join(WORDS[i] for i in cut), "length" if len(ids) > most else "stop"


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class ChaosServer(ThreadingHTTPServer):
    """Serves `model` at `url`. Use as a context manager, or through `serving`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(
        self, model: str = "org/teacher", mischief: Mischief | None = None, port: int = 0, listing: Any = None
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.mischief = model, mischief or (lambda number, body: None)
        self.listing = {"object": "list", "data": [{"id": model, "root": "/weights"}]} if listing is None else listing
        self.seen: list[Seen] = []
        self.answered = self.now = self.most_at_once = 0
        self.lock, self.released = threading.Lock(), threading.Event()
        self.connections: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def posts(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.body]

    def get_request(self) -> Any:
        connection, address = super().get_request()
        with self.lock:
            self.connections.add(connection)
        return connection, address

    def handle_error(self, *_: Any) -> None:  # a client that waited no longer, or a server that was killed
        pass

    def kill(self) -> None:
        """As after kill -9: nobody listens, and every connection is reset."""
        self.shutdown()
        self.server_close()
        self.released.set()
        with self.lock:
            for connection in self.connections:
                try:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # closed already

    def reborn(self, **changes: Any) -> ChaosServer:
        """Another server at the same address."""
        settings = {"model": self.model, "mischief": self.mischief, "listing": self.listing, **changes}
        return ChaosServer(port=self.server_port, **settings)

    def reply_to(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        chat = path.endswith("/chat/completions")
        prompt = body["messages"] if chat else body["prompt"]
        ids, text, finish = answer_to(prompt, body.get("max_tokens") or body["max_completion_tokens"])
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
        if k := body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [scores_at(body["prompt"], t, k) for t in range(len(body["prompt"]))]
        usage = {"prompt_tokens": len(json.dumps(prompt)) // 4, "completion_tokens": len(ids)}
        return {"id": "1", "model": self.model, "choices": [choice], "usage": usage}


def scores_at(prompt: list[int], t: int, k: int) -> dict[str, Any] | None:
    """vLLM's entry for a position: the k likeliest of ten tokens, and the one that stands there, under the
    distribution that `distribution` gives."""
    if t == 0:
        return None
    logs = distribution(prompt, t)
    order = sorted(range(len(logs)), key=lambda i: -logs[i])
    shown = order[:k] + [i for i in [prompt[t]] if i not in order[:k]]
    return {str(i): {"logprob": logs[i], "rank": order.index(i) + 1, "decoded_token": str(i)} for i in shown}


def distribution(prompt: list[int], t: int) -> list[float]:
    """Log-probabilities of ten tokens, which follow from what stands before position t."""
    draw = random.Random(str(prompt[:t]))
    logits = [draw.uniform(-3, 3) for _ in range(10)]
    whole = math.log(sum(math.exp(x) for x in logits))
    return [x - whole for x in logits]


class _Handler(BaseHTTPRequestHandler):
    server: ChaosServer
    protocol_version = "HTTP/1.1"  # connections are kept, as real servers do

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.seen.append(Seen(time.monotonic(), self.path, dict(self.headers), {}))
        if isinstance(self.server.listing, Status):
            self._send(self.server.listing.code, self.server.listing.text.encode(), self.server.listing.headers)
        else:
            self._send(200, json.dumps(self.server.listing).encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.posts)
            server.seen.append(Seen(time.monotonic(), self.path, dict(self.headers), body))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        try:
            self._answer(server.mischief(number, body), body)
        finally:
            with server.lock:
                server.now -= 1

    def _answer(self, what: Any, body: dict[str, Any]) -> None:
        if isinstance(what, Hang):
            self.server.released.wait(LONGEST_HANG)
            self.close_connection = True
        elif isinstance(what, Status):
            self._send(what.code, what.text.encode(), what.headers)
        elif isinstance(what, Raw):
            self._send(200, what.body, {"Content-Length": str(len(what.body) + what.missing)})
            self.close_connection = True
        else:
            if isinstance(what, Late):
                self.server.released.wait(what.seconds)
            reply = self.server.reply_to(self.path, body)
            if isinstance(what, Changed):
                choice = reply["choices"][0] | what.choice
                if "message" in choice:
                    choice["message"] = choice["message"] | what.message
                reply = {k: v for k, v in ({**reply, "choices": [choice]} | what.reply).items() if v is not None}
            with self.server.lock:
                self.server.answered += 1
            self._send(200, json.dumps(reply).encode())

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(*arguments: Any, **keywords: Any) -> Iterator[ChaosServer]:
    server = ChaosServer(*arguments, **keywords)
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def shorten_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's behaviour in less time."""
    monkeypatch.setattr(http_stream, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(http_stream, "FIRST_ASIDE", 0.05)
    monkeypatch.setattr(http_stream, "LONGEST_ASIDE", 0.3)


def servers() -> Iterator[Callable[..., ChaosServer]]:
    """A function that starts servers, which end with the test: the body of a fixture."""
    with ExitStack() as stack:
        yield lambda *arguments, **keywords: stack.enter_context(serving(*arguments, **keywords))


def recipe(*urls: str, model: str = "org/teacher", teacher: dict[str, Any] | None = None, **options: Any) -> Recipe:
    engine = {"http": {"urls": list(urls), "seconds": 20, **options}}
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"base": "embedded:tiny"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "method": {"type": "distill", "mode": "sequence"},
            "teacher": {"model": model, "engine": engine, **(teacher or {})},
        }
    )


def teacher_at(*urls: str, tokenizer: Any = None, **options: Any) -> HttpTeacher:
    teacher = open_teacher(recipe(*urls, **options), tokenizer)
    assert isinstance(teacher, HttpTeacher)
    return teacher


def requests(count: int = 60, max_tokens: int = 16, **changes: Any) -> list[Request]:
    return [
        Request(
            key=f"key{i:04d}",
            messages=({"role": "user", "content": f"Question {i}: is clause {i * 7} valid? ⚖\u2028"},),
            prompt_ids=tuple(range(i + 1)),
            sampling={"temperature": 0.0},
            seed=i,
            max_tokens=max_tokens,
            **changes,
        )
        for i in range(count)
    ]


def results(completions: Any) -> dict[str, Completion]:
    """By key, without what time decides. A key that comes twice is an error."""
    found: dict[str, Completion] = {}
    for completion in completions:
        assert completion.key not in found
        found[completion.key] = replace(completion, seconds=0.0)
    return found


def expected(asked: list[Request], api: str = "chat") -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Text, finish reason and token ids that the server's answers must become, worked out here."""
    found = {}
    for request in asked:
        prompt = list(request.messages) if api == "chat" else list(request.prompt_ids or ())
        ids, text, finish = answer_to(prompt, request.max_tokens)
        found[request.key] = (text, finish, tuple(ids))
    return found


def summary(completions: Any) -> dict[str, tuple[str, str, tuple[int, ...] | None]]:
    return {key: (c.text, c.finish, c.token_ids) for key, c in results(completions).items()}


def no_thread_left() -> bool:
    return not [t for t in threading.enumerate() if t.name == "teacher-http"]
