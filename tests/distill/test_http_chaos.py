"""The HTTP engine against a server that fails, dies, comes back: the finished result is the undisturbed one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from chaos_server import (
    DISTURBANCES,
    Changed,
    ChaosServer,
    Hang,
    Late,
    Status,
    expected,
    no_thread_left,
    requests,
    results,
    servers,
    shorten_pauses,
    summary,
    teacher_at,
)

from distill import http_stream
from distill.http_client import Bucket
from distill.teachers import Completion, Request
from recipes.errors import EngineError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_pauses(monkeypatch)


@pytest.fixture
def serve() -> Iterator[Callable[..., ChaosServer]]:
    yield from servers()


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbed_run_ends_as_the_undisturbed_one(serve: Callable[..., ChaosServer], name: str) -> None:
    mischief, options = DISTURBANCES[name]
    asked = requests()
    server = serve(mischief=mischief)
    completions = results(teacher_at(server.url, parallel=8, retries=20, **options).generate(asked))
    assert completions == results(teacher_at(serve().url, parallel=8).generate(asked))
    assert summary(completions.values()) == expected(asked)
    if name != "out of order":
        assert len(server.posts) > len(asked)  # something was disturbed
    assert server.most_at_once <= 8 + (name in {"no reply", "late twins", "everything"}) * len(server.posts)


def test_answers_come_as_they_finish(serve: Callable[..., ChaosServer]) -> None:
    asked = requests(8)
    server = serve(mischief=lambda number, body: Late(0.5) if "Question 0" in str(body) else None)
    order = [c.key for c in teacher_at(server.url, parallel=4).generate(asked)]
    assert order[-1] == "key0000" and len(order) == 8


def test_a_server_killed_and_restarted_under_load(serve: Callable[..., ChaosServer]) -> None:
    asked = requests(80)
    server = ChaosServer(mischief=lambda number, body: Late(0.02))
    teacher = teacher_at(server.url, parallel=8, retries=3)
    found: list[Completion] = []
    reborn: list[ChaosServer] = []

    def rebirth() -> None:
        time.sleep(0.8)
        reborn.append(server.reborn())

    for completion in teacher.generate(asked):
        found.append(completion)
        if len(found) == 20:
            server.kill()
            killed_with = len(server.posts)
            threading.Thread(target=rebirth).start()
    assert summary(found) == expected(asked)
    assert killed_with < 80 and len(reborn[0].posts) >= 80 - killed_with
    assert any("set aside" in note for note in teacher.notes) and teacher.notes[-1].endswith(": back")
    reborn[0].kill()


def test_a_server_that_comes_back_with_another_model(serve: Callable[..., ChaosServer]) -> None:
    server = ChaosServer(mischief=lambda number, body: Late(0.02))
    reborn: list[ChaosServer] = []
    listing = {"data": [{"id": "org/teacher", "root": "/other-weights"}]}
    with pytest.raises(EngineError, match="root was '/weights' and is '/other-weights'"):
        for number, _ in enumerate(teacher_at(server.url, parallel=8).generate(requests(80))):
            if number == 20:
                server.kill()
                reborn.append(server.reborn(listing=listing))  # the same name, other weights
    reborn[0].kill()


def test_all_dead_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_stream, "PATIENCE", 0.5)
    servers = [ChaosServer(), ChaosServer()]
    teacher = teacher_at(*(s.url for s in servers), parallel=2, seconds=0.5)
    found = []
    with pytest.raises(EngineError) as caught:
        for completion in teacher.generate(requests(200)):
            found.append(completion)
            if len(found) == 10:
                for server in servers:
                    server.kill()
    assert "no teacher has answered for 0.5 seconds" in str(caught.value)
    assert all(server.url in str(caught.value) for server in servers)
    assert "onnect" in str(caught.value)  # the reason
    assert 10 <= len(found) < 200 and no_thread_left()
    assert caught.value.exit_code == 6


def test_two_endpoints_share_the_work(serve: Callable[..., ChaosServer]) -> None:
    one, two = serve(mischief=lambda *_: Late(0.01)), serve(mischief=lambda *_: Late(0.01))
    asked = requests(100)
    assert summary(teacher_at(one.url, two.url, parallel=4).generate(asked)) == expected(asked)
    assert len(one.posts) + len(two.posts) == 100
    assert min(len(one.posts), len(two.posts)) >= 30
    assert one.most_at_once <= 4 and two.most_at_once <= 4


def test_a_slow_endpoint_gets_less(serve: Callable[..., ChaosServer]) -> None:
    slow, fast = serve(mischief=lambda *_: Late(0.2)), serve(mischief=lambda *_: Late(0.01))
    list(teacher_at(slow.url, fast.url, parallel=4).generate(requests(100)))
    assert len(slow.posts) < len(fast.posts) / 2


def test_two_endpoints_of_which_one_dies(serve: Callable[..., ChaosServer]) -> None:
    one, two = ChaosServer(mischief=lambda *_: Late(0.01)), serve(mischief=lambda *_: Late(0.01))
    asked, found = requests(100), []
    for completion in teacher_at(one.url, two.url, parallel=4, retries=3).generate(asked):
        found.append(completion)
        if len(found) == 20:
            one.kill()
    assert summary(found) == expected(asked)
    assert len(two.posts) >= 60


def test_one_endpoint_may_be_missing_from_the_start(serve: Callable[..., ChaosServer]) -> None:
    gone = ChaosServer()
    gone.kill()
    asked, server = requests(40), serve()
    teacher = teacher_at(gone.url, server.url, parallel=4)
    assert gone.url in teacher.notes[0]
    assert summary(teacher.generate(asked)) == expected(asked)
    with pytest.raises(EngineError, match=r"no teacher answers \(http://127.0.0.1:\d+/v1: .*start the server"):
        teacher_at(gone.url)


def test_too_many_failures_of_one_request(serve: Callable[..., ChaosServer]) -> None:
    server = serve(
        mischief=lambda number, body: Status(500, '{"message": "boom"}') if "Question 5:" in str(body) else None
    )
    with pytest.raises(EngineError, match=r"request key0005 in 3 tries, the last time: HTTP 500 \(boom\)"):
        list(teacher_at(server.url, parallel=2, retries=2).generate(requests(10)))
    assert sum("Question 5:" in str(p.body) for p in server.posts) == 3


def test_retry_after_is_obeyed(serve: Callable[..., ChaosServer]) -> None:
    server = serve(mischief=lambda number, _: Status(429, headers={"Retry-After": "1"}) if number == 0 else None)
    assert len(list(teacher_at(server.url, parallel=1).generate(requests(3)))) == 3
    first, second, *_ = server.posts
    assert second.at - first.at >= 0.95


def test_a_server_with_its_own_limit_is_no_failure(serve: Callable[..., ChaosServer]) -> None:
    """429 to whatever comes while three are at work: many refusals, but each request gets on, with few tries."""
    server: ChaosServer

    def busy(number: int, body: dict[str, Any]) -> Any:
        return Status(429) if server.now > 3 else Late(0.02)

    server = serve(mischief=busy)
    asked = requests(60)
    assert summary(teacher_at(server.url, parallel=16, retries=2).generate(asked)) == expected(asked)
    assert len(server.posts) > 60


def test_requests_per_minute(serve: Callable[..., ChaosServer]) -> None:
    server = serve()
    list(teacher_at(server.url, requests_per_minute=600).generate(requests(30)))
    arrivals = [p.at - server.posts[0].at for p in server.posts]
    assert arrivals[-1] > 1.7  # 10 at once, then 10 a second
    for start in arrivals:
        assert sum(start <= at < start + 1 for at in arrivals) <= 10 + 10 + 3


def test_tokens_per_minute(serve: Callable[..., ChaosServer]) -> None:
    """Each request reserves 1 to 20 prompt tokens and 100 of the answer, and gives back what it did not take."""
    server = serve(mischief=lambda *_: Changed(reply={"usage": {"prompt_tokens": 20, "completion_tokens": 80}}))
    asked = requests(20, max_tokens=100)
    list(teacher_at(server.url, tokens_per_minute=60_000).generate(asked))
    arrivals = [p.at - server.posts[0].at for p in server.posts]
    assert arrivals[-1] > 0.7  # 2000 tokens, 1000 of them at once, 1000 a second
    spent = [sum(start <= at < start + 0.5 for at in arrivals) * 100 for start in arrivals]
    assert max(spent) <= 1000 + 500 + 300


def test_bucket_holds_on_average_whatever_the_size() -> None:
    clock = [0.0]
    bucket = Bucket(6000, lambda: clock[0])  # 100 a second
    for amount in [30, 500, 1, 80, 2000, 100]:
        while (pause := bucket.wait(amount)) > 0:
            clock[0] += pause
        bucket.take(amount)
    assert clock[0] == pytest.approx((2711 - 100) / 100, abs=0.01)
    bucket.take(-5000)
    assert bucket.wait(100) == 0 and bucket.level == 100  # what is given back does not pile up


def test_requests_are_read_a_bounded_number_ahead(serve: Callable[..., ChaosServer]) -> None:
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        for i in range(10**9):
            taken += 1
            yield replace(requests(1)[0], key=str(i))

    server = serve()
    before = threading.active_count()
    stream = teacher_at(server.url, parallel=4).generate(endless())
    for number in range(50):
        next(stream)
        assert taken <= number + 1 + 8
    stream.close()
    assert no_thread_left() and threading.active_count() <= before + 8  # the server's own
    assert taken <= 58 and len(server.posts) <= 58


def test_closing_early_does_not_hang(serve: Callable[..., ChaosServer]) -> None:
    server = serve(mischief=lambda number, _: Hang() if number else None)
    stream = teacher_at(server.url, parallel=4).generate(requests(40))
    next(stream)
    start = time.monotonic()
    stream.close()
    assert no_thread_left() and time.monotonic() - start < 10  # the answers that hang would take 20

    def interrupted() -> Iterator[Request]:
        yield from requests(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(teacher_at(server.url, parallel=4).generate(interrupted()))
    assert no_thread_left()


def test_closing_the_teacher_ends_what_another_thread_waits_for(serve: Callable[..., ChaosServer]) -> None:
    server = serve(mischief=lambda *_: Hang())
    teacher = teacher_at(server.url, parallel=2)
    errors = []

    def wait() -> None:
        with pytest.raises(EngineError, match="closed while it was asked") as caught:
            list(teacher.generate(requests(4)))
        errors.append(caught.value)

    waiter = threading.Thread(target=wait)
    waiter.start()
    while len(server.posts) < 2:
        time.sleep(0.01)
    teacher.close()
    waiter.join(10)
    assert len(errors) == 1 and no_thread_left()


def test_nothing_to_do(serve: Callable[..., ChaosServer]) -> None:
    server = serve()
    teacher = teacher_at(server.url)
    assert list(teacher.generate([])) == [] and not server.posts and no_thread_left()
    teacher.close()
