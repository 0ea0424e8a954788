"""The journal loses nothing, doubles nothing and asks nothing twice; replay answers from it.

The engine here is a stand-in whose answers follow from the keys alone, so that undisturbed and disturbed runs can be
compared word for word. The journal, its files and its processes are real.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.earlier_teacher import IDENTITY
from data_prep.logit_cache import Sparse
from distill.engine_replay import ReplayTeacher
from distill.journal import AHEAD, JOURNAL, Journal, read_journal
from distill.journal_files import encode
from distill.teachers import Completion, Request
from recipes.errors import DataError, EngineError, RetortError
from recipes.load import load_recipe
from recipes.schema import Recipe

SHARD = "shard-00001-of-00001.jsonl"


def wanted(count: int, max_tokens: int = 64, start: int = 0) -> list[Request]:
    return [
        Request(f"{i:08x}", ({"role": "user", "content": f"{i}?"},), None, {}, i, max_tokens)
        for i in range(start, start + count)
    ]


def answer(request: Request) -> Completion:
    """What the stand-in says to a key: of 1 to 90 tokens, unless the limit cuts it; some texts are long."""
    rng = random.Random(request.key)
    length = rng.randint(1, 90)
    shown = min(length, request.max_tokens)
    ids = tuple(rng.randrange(2**17) for _ in range(length))[:shown]
    text = " ".join(map(str, ids)) + "§\u2028" * (rng.randrange(40_000) if rng.random() < 0.1 else 1)
    finish = "stop" if shown == length else "length"
    return Completion(request.key, text, finish, ids, 7, shown, rng.random(), "stand-in", request.max_tokens)


class StandIn:
    """An engine whose answers follow from the requests.

    Args:
        log: gets every key that is asked, before it is answered.
        say: turns one answer into those that the engine yields.
        fail: raised instead of the answer to this position.
        pause: seconds before each answer.
        gather: requests taken before the first of them is answered.
    """

    def __init__(
        self,
        log: Path | None = None,
        say: Callable[[Completion], list[Completion]] = lambda c: [c],
        fail: tuple[int, BaseException] | None = None,
        pause: float = 0.0,
        gather: int = 0,
    ) -> None:
        self.log, self.say, self.fail, self.pause, self.gather = log, say, fail, pause, gather
        self.identity: dict[str, Any] = {"engine": "stand-in"}
        self.asked: list[str] = []
        self.delivered: list[str] = []  # answers that were taken off the engine's hands
        self.cleared_up = threading.Event()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        self.at_work = self._generate(iter(requests))  # held, so that it is not cleared up by going out of sight
        return self.at_work

    def _generate(self, requests: Iterator[Request]) -> Iterator[Completion]:
        try:
            gathered = list(itertools.islice(requests, self.gather))
            for number, request in enumerate(itertools.chain(gathered, requests)):
                self.asked.append(request.key)
                if self.log is not None:
                    note(self.log, request.key)
                if self.fail is not None and number == self.fail[0]:
                    raise self.fail[1]
                time.sleep(self.pause)
                for completion in self.say(answer(request)):
                    self.delivered.append(completion.key)  # the journal takes it even where it then stops us
                    yield completion
        finally:
            self.cleared_up.set()

    def score(self, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[Sparse]:
        raise EngineError("the stand-in has no distributions")

    def close(self) -> None:
        pass


def note(path: Path, line: str) -> None:
    with path.open("a") as stream:
        stream.write(line + "\n")


def no_teacher() -> StandIn:
    raise AssertionError("the teacher was opened")


def by_key(completions: Iterable[Completion]) -> dict[str, Completion]:
    """Completions by key; a second one of a key is a failure."""
    found: dict[str, Completion] = {}
    for completion in completions:
        assert completion.key not in found
        found[completion.key] = completion
    return found


def undisturbed(requests: Sequence[Request]) -> dict[str, Completion]:
    return {request.key: answer(request) for request in requests}


def lines_by_key(folder: Path) -> dict[str, int]:
    """How many lines of the folder's files each key has."""
    counts: dict[str, int] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            key = json.loads(line)["key"]
            counts[key] = counts.get(key, 0) + 1
    return counts


def fill(folder: Path, requests: Sequence[Request], shard: tuple[int, int] = (1, 1)) -> Path:
    with Journal(folder, shard) as journal:
        assert by_key(journal.run(requests, StandIn)) == undisturbed(requests)
    return journal.path


def until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


# What is written is what is read


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
    count = st.integers(0, 2**31)
    anything = st.text(st.characters(codec=None))  # halves of surrogate pairs too
    return Completion(
        key=draw(anything),
        text=draw(anything),
        finish=draw(st.sampled_from(["stop", "length", "tool_calls", "unknown"])),
        token_ids=draw(st.none() | st.lists(st.integers(0, 2**32)).map(tuple)),
        prompt_tokens=draw(count),
        completion_tokens=draw(count),
        seconds=draw(st.floats(allow_nan=False)),
        model=draw(anything),
        max_tokens=draw(count),
        tool_calls=draw(st.lists(st.dictionaries(st.text(), values), max_size=2).map(tuple)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(completions(), min_size=1, max_size=4, unique_by=lambda c: c.key))
def test_every_field_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, some: list[Completion]) -> None:
    folder = tmp_path_factory.mktemp("journal")
    with Journal(folder) as journal:
        journal.add(some)
        assert [journal.get(c.key, 0) for c in some] == some
    assert read_journal(folder) == {c.key: c for c in some}
    shutil.rmtree(folder)


def test_line_separators_and_tool_calls_stay_within_a_line_and_distributions_stay_out(tmp_path: Path) -> None:
    sparse = Sparse(
        *(np.zeros(1, t) for t in ("u2", "u4", "f2")), weights=None, actual=np.zeros(1, "f2"), tail=np.ones(1, "f2")
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\u2028\\n"}'}}
    given_one = Completion(
        "k", "a\u2028b\u2029c\x85d\r\ne\x0b\x00😀\ud800", "stop", None, 1, 2, 0.1, "m", 9, (call,), sparse
    )

    class Teacher(StandIn):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            yield from (given_one for _ in requests)

    with Journal(tmp_path) as journal:
        request = Request("k", (), None, {}, 0, 9)
        (yielded,) = journal.run([request], Teacher)
    assert yielded.sparse is sparse  # passed through to the cache
    (found,) = read_journal(tmp_path).values()
    assert found == given_one and found.sparse is None
    assert journal.path.name == SHARD and journal.path.read_bytes().count(b"\n") == 1
    assert json.loads(journal.path.read_bytes()).keys() == {"sum"} | {
        f.name for f in dataclasses.fields(Completion) if f.name != "sparse"
    }


# What is asked


def test_an_answer_is_on_the_disk_when_it_is_yielded_and_a_rerun_asks_nothing(tmp_path: Path) -> None:
    requests, engine = wanted(50), StandIn()
    with Journal(tmp_path) as journal:
        seen = {}
        for completion in journal.run(requests, lambda: engine):
            seen[completion.key] = completion
            assert read_journal(tmp_path)[completion.key] == completion
        assert seen == undisturbed(requests)
        assert engine.asked == [r.key for r in requests]
        assert (journal.calls_made, journal.from_journal, journal.ignored, journal.damaged) == (50, 0, 0, 0)
    before = journal.path.read_bytes()
    with Journal(tmp_path) as journal:
        assert by_key(journal.run(requests, no_teacher)) == undisturbed(requests)
        assert (journal.calls_made, journal.from_journal) == (0, 50)
        more = wanted(70)
        assert by_key(journal.run(more, StandIn)) == undisturbed(more)
        assert (journal.calls_made, journal.from_journal) == (20, 100)
    assert journal.path.read_bytes().startswith(before) and set(lines_by_key(tmp_path).values()) == {1}


def test_a_raised_limit_asks_again_for_cut_answers_only(tmp_path: Path) -> None:
    low, high = wanted(60, 30), wanted(60, 50)
    cut = [key for key, c in undisturbed(low).items() if c.truncated]
    still_cut = [key for key, c in undisturbed(high).items() if c.truncated]
    assert 0 < len(still_cut) < len(cut) < 60  # or the test tests nothing
    fill(tmp_path, low)
    engine = StandIn()
    expected = undisturbed(low) | {r.key: answer(r) for r in high if r.key in cut}
    with Journal(tmp_path) as journal:
        assert by_key(journal.run(high, lambda: engine)) == expected
    assert engine.asked == cut and journal.calls_made == len(cut)
    assert read_journal(tmp_path) == expected
    for requests in (high, low):  # a lower limit is content with the longer answer
        with Journal(tmp_path) as journal:
            assert by_key(journal.run(requests, no_teacher)) == expected
    engine = StandIn()
    with Journal(tmp_path) as journal:
        journal_run = by_key(journal.run(wanted(60, 90), lambda: engine))
    assert engine.asked == still_cut and not any(c.truncated for c in journal_run.values())


def test_replies_nobody_asked_for_and_second_ones_are_ignored_and_counted(tmp_path: Path) -> None:
    stranger = dataclasses.replace(answer(wanted(1)[0]), key="stranger")

    def twice(completion: Completion) -> list[Completion]:
        return [stranger, completion, dataclasses.replace(completion, text="second thoughts")]

    requests = wanted(20)
    with Journal(tmp_path) as journal:
        assert by_key(journal.run(requests, lambda: StandIn(say=twice))) == undisturbed(requests)
    assert journal.ignored == 40 and read_journal(tmp_path) == undisturbed(requests)
    assert set(lines_by_key(tmp_path).values()) == {1}


def test_silence_of_the_teacher_is_an_error_that_says_how_many(tmp_path: Path) -> None:
    def silent(completion: Completion) -> list[Completion]:
        return [] if completion.key.endswith("3") else [completion]

    requests = wanted(40)
    with Journal(tmp_path) as journal:
        got = []
        with pytest.raises(EngineError, match="left 3 of 40 requests unanswered; run it again") as caught:
            got.extend(journal.run(requests, lambda: StandIn(say=silent)))  # extend keeps none of it on an error
        assert caught.value.exit_code == 6
        engine = StandIn()
        assert by_key(journal.run(requests, lambda: engine)) == undisturbed(requests)
        assert engine.asked == ["00000003", "00000013", "00000023"]


def test_requests_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal, pytest.raises(ValueError, match="same key"):
        journal.run(wanted(3) + wanted(1), no_teacher)
    for shard in ((0, 1), (3, 2)):
        with pytest.raises(ValueError, match="no shard"):
            Journal(tmp_path, shard)


# What a crash and the years do to a file


def test_a_tail_torn_at_any_byte_costs_that_answer_alone(tmp_path: Path) -> None:
    requests = wanted(4, max_tokens=8)
    path = fill(tmp_path / "whole", requests)
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    assert len(data) - last > 100
    torn = tmp_path / "torn" / SHARD
    torn.parent.mkdir()
    for end in range(last, len(data)):
        torn.write_bytes(data[:end])
        assert read_journal(torn.parent) == undisturbed(requests[:3])
        assert torn.stat().st_size == end  # a reader changes nothing
        engine = StandIn()
        with Journal(torn.parent) as journal:
            assert torn.read_bytes() == data[:last] and journal.damaged == 0
            assert len(journal.notes) == (end > last)
            assert by_key(journal.run(requests, lambda e=engine: e)) == undisturbed(requests)
        assert engine.asked == [requests[3].key] and torn.read_bytes() == data


def test_no_flipped_byte_makes_another_answer(tmp_path: Path) -> None:
    requests = wanted(3, max_tokens=8)
    data = fill(tmp_path, requests).read_bytes()
    path, aside = tmp_path / SHARD, tmp_path / f"{SHARD}.damaged"
    expected, sound = undisturbed(requests), list(io.BytesIO(data))
    for place in range(len(data)):
        broken = data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
        path.write_bytes(broken)
        left = read_journal(tmp_path)
        assert 1 <= len(left) < 3 and left.items() <= expected.items()
        if place % 19 and data[place : place + 1] != b"\n":
            continue  # a repair syncs three files, so not every one
        with Journal(tmp_path) as journal:
            assert by_key(journal.run(requests, StandIn)) == expected
            assert journal.calls_made == 3 - len(left)
        moved = [line for line in io.BytesIO(broken) if line.endswith(b"\n") and line not in sound]
        assert journal.damaged == len(moved)
        assert (aside.read_bytes() if moved else b"") == b"".join(moved)
        with Journal(tmp_path) as journal:
            assert (journal.damaged, journal.notes) == (0, []) and read_journal(tmp_path) == expected
        aside.unlink(missing_ok=True)


def test_a_damaged_line_is_set_aside_counted_and_asked_again(tmp_path: Path) -> None:
    requests = wanted(10)
    lines = fill(tmp_path, requests).read_bytes().splitlines(keepends=True)
    bad = lines[4].replace(b'"finish":"stop"', b'"finish":"stpo"').replace(b'"finish":"length"', b'"finish":"stop"')
    assert bad != lines[4]
    path, engine = tmp_path / SHARD, StandIn()
    path.write_bytes(b"".join([*lines[:4], bad, b"no json at all\n", *lines[5:]]))
    with Journal(tmp_path) as journal:
        assert journal.damaged == 2
        assert journal.notes == [
            f"{SHARD}: damaged lines were moved to {SHARD}.damaged (2); what they held is asked again"
        ]
        assert path.read_bytes() == b"".join(lines[:4] + lines[5:])
        assert by_key(journal.run(requests, lambda: engine)) == undisturbed(requests)
    assert engine.asked == [requests[4].key]
    assert (tmp_path / f"{SHARD}.damaged").read_bytes() == bad + b"no json at all\n"


def test_another_machines_file_is_read_but_never_touched(tmp_path: Path) -> None:
    other = fill(tmp_path, wanted(5), (2, 2))
    lines = other.read_bytes().splitlines(keepends=True)
    state = b"".join([lines[0], lines[1][:-9] + b"\n", *lines[2:4], lines[4][:30]])  # one damaged, one being written
    other.write_bytes(state)
    engine = StandIn()
    with Journal(tmp_path, (1, 2)) as journal:
        assert (journal.damaged, journal.notes) == (
            1,
            ["shard-00002-of-00002.jsonl: damaged lines were left out (1); what they held is asked again"],
        )
        assert by_key(journal.run(wanted(5), lambda: engine)) == undisturbed(wanted(5))
    assert engine.asked == ["00000001", "00000004"] and other.read_bytes() == state


def test_a_line_of_another_version_is_not_taken_for_damage(tmp_path: Path) -> None:
    path = fill(tmp_path, wanted(2))
    body = json.dumps({"key": "k", "text": "t", "mood": "good"}).encode()[1:]
    digest = hashlib.blake2b(body, digest_size=8).hexdigest()
    with path.open("ab") as stream:
        stream.write(b'{"sum":"' + digest.encode() + b'",' + body + b"\n")
    for opened in (Journal, read_journal):
        with pytest.raises(DataError, match=r"jsonl: was written by another version of Retort; go on with that"):
            opened(tmp_path)
    with pytest.raises(DataError, match="another version"):  # and the lock is free again
        Journal(tmp_path)


@pytest.mark.slow
def test_twenty_kills_lose_nothing_double_nothing_and_ask_nothing_again(tmp_path: Path) -> None:
    count, folder, rng = 600, tmp_path / "journal", random.Random(7)
    asked: set[str] = set()
    for kill in range(20):
        on_record = read_journal(folder)
        log = tmp_path / f"asked-{kill}"
        process = start_writer(folder, log, count)
        target = rng.randint(1, 40)
        until(lambda log=log, n=target: log.exists() and log.read_bytes().count(b"\n") >= n, "the point to kill at")
        time.sleep(rng.uniform(0, 0.02))
        assert process.poll() is None
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        asked = set(log.read_text().split())
        assert not asked & on_record.keys()
        assert on_record.items() <= read_journal(folder).items()
    on_record = read_journal(folder)
    assert 20 < len(on_record) < count
    log = tmp_path / "asked-last"
    process = start_writer(folder, log, count)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    asked_last = log.read_text().split()
    assert sorted([*asked_last, *on_record]) == [r.key for r in wanted(count)]
    told = json.loads(out)
    assert (told["calls_made"], told["from_journal"]) == (len(asked_last), len(on_record))
    assert (told["yielded"], told["damaged"]) == (count, 0)
    assert read_journal(folder) == undisturbed(wanted(count))
    assert lines_by_key(folder) == dict.fromkeys((r.key for r in wanted(count)), 1)


# Several writers


def test_a_second_writer_is_refused_in_one_line(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    process = start_writer(tmp_path / "journal", log, 10_000)
    try:
        until(log.exists, "the writer's first question")
        with pytest.raises(RetortError, match=rf"{SHARD}: another process writes to it; wait for it") as caught:
            Journal(tmp_path / "journal")
        assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
        assert len(read_journal(tmp_path / "journal")) < 10_000  # readers need no lock
        fill(tmp_path / "journal", wanted(3, start=20_000), (2, 2))  # and another shard is another file
    finally:
        process.kill()
        process.communicate()
    with Journal(tmp_path / "journal") as journal, pytest.raises(RetortError, match="another process writes"):
        Journal(tmp_path / "journal")
    Journal(tmp_path / "journal").close()
    journal.close()  # twice does no harm


def test_a_writer_that_no_lock_kept_out_is_noticed(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.add([answer(r) for r in wanted(2)])
        with journal.path.open("ab") as stream:
            stream.write(b"another's line\n")
        with pytest.raises(RetortError, match="another process wrote to it"):
            journal.add([answer(r) for r in wanted(1, start=5)])
    assert journal.path.read_bytes().endswith(b"another's line\n") and len(read_journal(tmp_path)) == 2


def test_two_shards_copied_together_are_one_journal(tmp_path: Path) -> None:
    requests = wanted(41)
    merged = tmp_path / "merged"
    merged.mkdir()
    for number in (1, 2):
        folder = tmp_path / f"machine-{number}"
        shutil.copy(fill(folder, requests[number - 1 :: 2], (number, 2)), merged)
    fill(tmp_path / "one", requests)
    assert read_journal(merged) == read_journal(tmp_path / "one") == undisturbed(requests)
    with Journal(merged) as journal:
        assert by_key(journal.run(requests, no_teacher)) == undisturbed(requests)
    assert sorted(p.name for p in merged.glob("*.jsonl")) == [
        SHARD,
        "shard-00001-of-00002.jsonl",
        "shard-00002-of-00002.jsonl",
    ]


def test_of_several_answers_the_whole_then_the_longest_then_the_first_is_taken(tmp_path: Path) -> None:
    def said(text: str, finish: str, limit: int) -> Completion:
        return Completion("k", text, finish, None, 1, limit if finish == "length" else 1, 0.5, "m", limit)

    def best_of(*files: list[Completion]) -> str:
        folder = tmp_path / "several"
        for number, lines in enumerate(files, 1):
            with Journal(folder, (number, len(files))) as journal:
                for completion in lines:
                    journal.add([completion])
        with Journal(folder, (9, 9)) as journal:
            found = journal.get("k", 0)
        assert found is not None and read_journal(folder) == {"k": found}
        shutil.rmtree(folder)
        return found.text

    cut, longer, whole, other = (
        said("cut", "length", 10),
        said("longer", "length", 20),
        said("whole", "stop", 5),
        said("other", "stop", 5),
    )
    assert best_of([cut, longer]) == best_of([longer, cut]) == best_of([longer], [cut]) == "longer"
    assert best_of([longer], [whole]) == best_of([whole, longer]) == "whole"
    assert best_of([whole, other]) == best_of([whole], [other]) == "whole"
    assert best_of([cut], [other], [whole, longer]) == "other"


# The disk, the engine and the user


def test_a_full_disk_is_said_and_the_next_run_goes_on(tmp_path: Path) -> None:
    folder, limit = tmp_path / "journal", 20_000
    process = start_writer(folder, tmp_path / "asked", 200, str(limit))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        error.strip().splitlines()[-1].endswith(f"{SHARD}: cannot be written (File too large); choose another output")
    )
    room, fitting = limit, 0
    while (room := room - len(encode(answer(wanted(200)[fitting])))) >= 0:
        fitting += 1
    on_record = read_journal(folder)
    assert on_record == undisturbed(wanted(fitting)) and 5 < fitting < 200
    assert (folder / SHARD).stat().st_size == sum(len(encode(c)) for c in on_record.values())
    engine = StandIn()
    with Journal(folder) as journal:
        assert (journal.damaged, journal.notes) == (0, [])
        assert by_key(journal.run(wanted(200), lambda: engine)) == undisturbed(wanted(200))
    assert not set(engine.asked) & on_record.keys() and len(engine.asked) == 200 - len(on_record)
    assert set(lines_by_key(folder).values()) == {1}


def test_an_engine_that_fails_loses_nothing_that_it_had_said(tmp_path: Path) -> None:
    requests = wanted(30)
    error = EngineError("the card is gone")
    got = []
    with Journal(tmp_path) as journal:
        with pytest.raises(EngineError) as caught:
            for completion in journal.run(requests, lambda: StandIn(fail=(12, error))):
                got.append(completion)
        assert caught.value is error
        assert by_key(got) == undisturbed(requests[:12]) == read_journal(tmp_path)
        with pytest.raises(ZeroDivisionError):  # not only errors of our own
            list(journal.run(requests, lambda: StandIn(fail=(0, ZeroDivisionError()))))
        assert by_key(journal.run(requests, StandIn)) == undisturbed(requests)
        assert (journal.calls_made, journal.from_journal) == (13 + 1 + 18, 12 + 12)


def test_a_consumer_that_leaves_stops_the_engine_and_what_was_received_stays(tmp_path: Path) -> None:
    def leave_by_close(journal: Journal, engine: StandIn) -> None:
        answers = journal.run(wanted(5000), lambda: engine)
        next(answers)
        answers.close()
        journal.close()

    def leave_by_error(journal: Journal, engine: StandIn) -> None:
        with pytest.raises(KeyError), journal:
            for number, _ in enumerate(journal.run(wanted(5000), lambda: engine)):
                if number == 3:
                    raise KeyError("of the consumer")

    def leave_by_forgetting(journal: Journal, engine: StandIn) -> None:
        answers = journal.run(wanted(5000), lambda: engine)
        next(answers)
        journal.close()
        with pytest.raises(ValueError, match="closed while a run was under way"):
            list(answers)

    for number, leave in enumerate((leave_by_close, leave_by_error, leave_by_forgetting) * 2):
        folder, engine = tmp_path / str(number), StandIn(pause=0.001, gather=5000 * (number % 2))
        journal = Journal(folder)
        leave(journal, engine)
        assert engine.cleared_up.is_set()  # its own finally has run
        assert 0 < len(engine.delivered) < 5000
        assert list(read_journal(folder)) == engine.delivered and journal.notes == []
        assert not any(t.name == "teacher" for t in threading.enumerate())
        fill(folder, wanted(40))


def test_an_engine_that_looks_far_ahead_is_given_no_more_requests_after_the_end(tmp_path: Path) -> None:
    taken: list[str] = []

    class Hungry(StandIn):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            requests = iter(requests)
            yield answer(next(requests))
            for request in requests:
                time.sleep(0.001)
                taken.append(request.key)
            self.cleared_up.set()

    engine = Hungry()
    with Journal(tmp_path) as journal:
        answers = journal.run(wanted(20_000), lambda: engine)
        assert next(answers) == answer(wanted(1)[0])
        answers.close()  # it takes requests for 20 s to come, and 10 is patience
        assert engine.cleared_up.is_set() and journal.notes == []
    assert len(taken) < 20_000 and journal.calls_made == len(taken) + 1


def test_an_engine_that_hangs_is_left_behind(tmp_path: Path) -> None:
    release = threading.Event()

    def hang(completion: Completion) -> list[Completion]:
        if completion.key.endswith("5"):
            release.wait(60)
        return [completion]

    engine = StandIn(say=hang)
    journal = Journal(tmp_path, patience=0.2)
    answers = journal.run(wanted(20), lambda: engine)
    first = [next(answers) for _ in range(5)]
    answers.close()
    journal.close()
    assert journal.notes == ["the engine did not stop within 0.2 s and was left behind"]
    assert by_key(first) == undisturbed(wanted(5)) == read_journal(tmp_path)
    release.set()
    assert engine.cleared_up.wait(60) and len(engine.asked) == 6  # nothing further was handed to it
    assert read_journal(tmp_path) == undisturbed(wanted(5))


def test_an_interrupt_from_the_keyboard_keeps_what_was_received(tmp_path: Path) -> None:
    folder, log = tmp_path / "journal", tmp_path / "asked"
    process = start_writer(folder, log, 20_000)
    until(lambda: log.exists() and log.read_bytes().count(b"\n") > 50, "fifty questions")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in {-signal.SIGINT, 130} and "KeyboardInterrupt" in error
    asked = log.read_text().split()
    assert list(read_journal(folder)) == asked and 50 < len(asked) < 20_000
    with Journal(folder) as journal:
        assert (journal.damaged, journal.notes) == (0, [])


def test_the_engine_runs_ahead_so_far_and_what_it_finished_is_synced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = []
    real = os.fsync
    engine, requests = StandIn(), wanted(3 * AHEAD)
    with Journal(tmp_path) as journal:
        monkeypatch.setattr(os, "fsync", lambda handle: (syncs.append(handle), real(handle))[1])
        answers = journal.run(requests, lambda: engine)
        first = next(answers)
        ahead = 0
        while len(engine.delivered) > ahead:  # until it goes no further
            ahead = len(engine.delivered)
            time.sleep(0.3)
        assert ahead >= AHEAD
        assert ahead <= 2 * AHEAD + 1  # what the first sync took along, what waits, and one in its hands
        rest = [next(answers) for _ in range(AHEAD)]
        assert len(syncs) <= 4
        rest += answers
    assert by_key([first, *rest]) == undisturbed(requests)
    assert len(syncs) < len(requests) / 2


# Replay


def replay_recipe(tmp_path: Path, run: Path) -> Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1?"}\n', encoding="utf-8")
    content = {
        "name": "replayed",
        "model": {"base": "embedded:tiny"},
        "data": {"train": [{"path": str(rows)}]},
        "method": {"type": "distill", "mode": "sequence"},
        "teacher": {"model": "embedded:tiny-teacher", "engine": {"replay": {"run": str(run)}}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return load_recipe(path)


def recorded(run: Path, requests: Sequence[Request]) -> dict[str, Any]:
    identity = {"engine": "stand-in", "model": "org/name@rev", "weights": "ab" * 32}
    fill(run / "teacher" / JOURNAL, requests)
    (run / "teacher" / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")
    return identity


def test_replay_answers_as_the_recorded_teacher_did(tmp_path: Path) -> None:
    requests = wanted(30, 40)
    identity = recorded(tmp_path / "old", requests)
    teacher = ReplayTeacher(replay_recipe(tmp_path, tmp_path / "old"))
    assert teacher.identity == identity
    some = wanted(20, 4000, start=5)  # cut answers count under the limit they were written with
    with Journal(tmp_path / "new") as journal:
        replayed = by_key(journal.run(some, lambda: teacher))
    assert replayed == {r.key: answer(r) for r in requests[5:25]} == read_journal(tmp_path / "new")
    assert any(c.truncated for c in replayed.values())
    with Journal(tmp_path / "new") as journal:  # the cut ones are asked for again, and found to be the same
        assert by_key(journal.run(some, lambda: teacher)) == replayed
        assert journal.calls_made == sum(c.truncated for c in replayed.values())
    assert set(lines_by_key(tmp_path / "new").values()) == {1}
    with pytest.raises(EngineError, match="holds no distributions"):
        teacher.score([((1, 2), (False, True))])
    teacher.close()
    teacher.close()


def test_replay_says_what_is_missing_before_it_answers(tmp_path: Path) -> None:
    run = tmp_path / "old"
    recipe = replay_recipe(tmp_path, run)
    with pytest.raises(EngineError, match=r"identity\.json: is not there, .*; teacher\.engine\.replay\.run must name"):
        ReplayTeacher(recipe)
    recorded(run, wanted(10))
    teacher = ReplayTeacher(recipe)
    missing = r"3 of 8 answers are not in this journal of 10; it was made with other prompts, sampling, seed or samples"
    with pytest.raises(EngineError, match=missing) as caught:
        next(teacher.generate(wanted(8, start=5)))
    assert caught.value.place == str(run / "teacher" / JOURNAL)
    teacher.close()
    for content, said in (("[1]", "is no JSON object"), ("{", "cannot be read")):
        (run / "teacher" / IDENTITY).write_text(content, encoding="utf-8")
        with pytest.raises(EngineError, match=said):
            ReplayTeacher(recipe)
    (run / "teacher" / IDENTITY).write_text("{}", encoding="utf-8")
    shutil.rmtree(run / "teacher" / JOURNAL)
    with pytest.raises(EngineError, match="has no journal of a teacher"):
        ReplayTeacher(recipe)


# The writer in a process of its own


def start_writer(folder: Path, log: Path, count: int, limit: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(folder), str(log), str(count), limit]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write(folder: str, log: str, count: str, limit: str) -> None:
    """Generate into a folder, at up to 500 answers a second, with no file larger than so many bytes."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    engine = StandIn(Path(log), pause=0.002)
    with Journal(Path(folder)) as journal:
        yielded = len(by_key(journal.run(wanted(int(count)), lambda: engine)))
    counts = {"calls_made": journal.calls_made, "from_journal": journal.from_journal, "damaged": journal.damaged}
    print(json.dumps({**counts, "yielded": yielded}))


if __name__ == "__main__":
    write(*sys.argv[1:])
