"""The whole generate stage with the teacher behind a server: what lies on disk, and what a crash must not hide."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_server import DISTURBANCES, Changed, ChaosServer, Late, Status, servers, serving, shorten_pauses, some
from teaching import PROMPTS, lines, recipe_file, results, taught

from distill.http_watch import SERVED
from recipes.errors import EngineError, RetortError

ALL = PROMPTS + 12  # requests: half of the held-out rows are measured, the others watched
SECRET = "sk-chaos-0123456789abcdef-WXYZ"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_WORKERS", "1")  # prompts are prepared in this process
    shorten_pauses(monkeypatch)


@pytest.fixture
def serve() -> Iterator[Callable[..., ChaosServer]]:
    yield from servers()


def recipe_at(
    folder: Path, url: str, run: str = "run", prompts: int = PROMPTS, max_tokens: int = 32, **options: Any
) -> Path:
    """A recipe whose teacher is at an address; further keyword arguments are options of the engine."""
    return recipe_file(
        folder,
        data={
            "train": [{"embedded": "legal", "limit": prompts}],
            "eval": [{"embedded": "legal", "split": "heldout", "limit": 12}],
        },
        output=str(folder / run),
        use={"purpose": "research", "distribute": False},
        teacher={
            "model": "org/teacher",
            "license": "Apache-2.0",
            "sampling": {"temperature": 0.0, "max_tokens": max_tokens},
            "engine": {"http": {"urls": [url], "parallel": 4, **options}},
        },
    )


def test_no_file_of_the_run_holds_the_key(
    tmp_path: Path, serve: Callable[..., ChaosServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAOS_KEY", SECRET)
    quoted = json.dumps({"error": {"message": f"overloaded; your key is {SECRET}"}})
    server = serve(mischief=some(0.3, Status(500, quoted)))
    _, _, said = taught(recipe_at(tmp_path, server.url, api_key_env="CHAOS_KEY", retries=20))
    assert {p.headers["Authorization"] for p in server.posts} == {f"Bearer {SECRET}"}
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 15 and b"CHAOS_KEY" in (tmp_path / "run" / "teacher" / "manifest.json").read_bytes()
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert SECRET not in "\n".join(said)


LISTED = {"id": "org/teacher", "root": "/weights", "max_model_len": 4096}
SAID = {"system_fingerprint": "fp-1", "model": "org/teacher-0801"}
ANOTHER = {"root": "/other-weights", "max_model_len": 99, "system_fingerprint": "fp-2", "model": "org/teacher-0915"}


def start(serve: Callable[..., ChaosServer], dies_at: int | None = None, port: int = 0, **other: Any) -> ChaosServer:
    """A server that says all that servers say; keyword arguments change it."""
    said = {name: other.get(name, value) for name, value in SAID.items()}
    listing = {"data": [{name: other.get(name, value) for name, value in LISTED.items()}]}
    return serve(
        mischief=lambda number, _: Status(400) if dies_at is not None and number >= dies_at else Changed(said),
        listing=listing,
        port=port,
    )


@pytest.mark.parametrize("what", ANOTHER)
def test_a_server_that_is_another_one_after_a_crash(
    tmp_path: Path, serve: Callable[..., ChaosServer], what: str
) -> None:
    first = start(serve, dies_at=15)
    path, journal = recipe_at(tmp_path, first.url), tmp_path / "run" / "teacher" / "journal"
    with pytest.raises(EngineError, match="refuses request"):
        taught(path)
    first.kill()
    before = {p.name: p.read_bytes() for p in journal.glob("*.jsonl")}
    assert sum(content.count(b"\n") for content in before.values()) >= 10
    second = start(serve, port=first.server_port, **{what: ANOTHER[what]})
    was = {**LISTED, **SAID}[what]
    with pytest.raises(
        EngineError, match=f"in an earlier session: {what} was '{was}' and is '{ANOTHER[what]}'"
    ) as found:
        taught(path)
    memory = tmp_path / "run" / "teacher" / SERVED
    assert f"where the weights are the same, remove {memory}" in str(found.value)
    assert {p.name: p.read_bytes() for p in journal.glob("*.jsonl")} == before
    assert not second.posts or what in SAID  # what the list of models tells is seen before anything is asked
    memory.unlink()
    assert taught(path)[1]["from_journal"] == sum(content.count(b"\n") for content in before.values())


def test_the_same_server_elsewhere_goes_on_and_another_recipe_is_another_teacher(
    tmp_path: Path, serve: Callable[..., ChaosServer]
) -> None:
    path = recipe_at(tmp_path, start(serve, dies_at=15).url)
    with pytest.raises(EngineError):
        taught(path)
    recipe, stats, _ = taught(recipe_at(tmp_path, start(serve).url))
    assert stats["from_journal"] >= 10 and stats["calls_made"] == ALL - stats["from_journal"]
    whole, _, _ = taught(recipe_at(tmp_path, start(serve).url, run="whole"))
    assert results(recipe) == results(whole)
    other = start(serve, root="/other-weights", id="org/other", model="org/other")
    _, stats, _ = taught(recipe_at(tmp_path, other.url, served_as="org/other"))
    assert stats["from_journal"] == 0  # nothing of the first one's is used
    again = start(serve, root="/third-weights")
    with pytest.raises(EngineError, match="root was '/weights' and is '/third-weights'"):
        taught(recipe_at(tmp_path, again.url), "teacher.sampling.temperature=0.7")


def test_a_server_that_was_never_asked_is_not_remembered(tmp_path: Path, serve: Callable[..., ChaosServer]) -> None:
    """The wrong server was running: it listed its models, and refused."""
    with pytest.raises(EngineError):
        taught(recipe_at(tmp_path, start(serve, dies_at=0, root="/wrong-weights").url))
    assert taught(recipe_at(tmp_path, start(serve).url))[1]["calls_made"] == ALL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETORT_WORKERS", "1")
        recipe, stats, _ = taught(recipe_at(folder, server.url))
        assert stats["calls_made"] == len(asked_of(server)) == len(server.posts) == ALL
    return results(recipe)


def asked_of(*servers: ChaosServer) -> set[str]:
    """The prompts that arrived."""
    return {json.dumps(post.body["messages"]) for server in servers for post in server.posts}


def recorded(folder: Path) -> list[str]:
    """The keys of a run's journal, one for each line."""
    return [line["key"] for path in (folder / "teacher" / "journal").glob("*.jsonl") for line in lines(path)]


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbed_stage_ends_as_the_undisturbed_one(
    tmp_path: Path, serve: Callable[..., ChaosServer], undisturbed: dict[str, str], name: str
) -> None:
    """Through two sessions: the first ends in the middle, by a refusal."""
    mischief, options = DISTURBANCES[name]

    def broken(number: int, body: dict[str, Any]) -> Any:
        return Status(400) if number >= 24 else mischief(number, body)

    first = serve(mischief=broken)
    path = recipe_at(tmp_path, first.url, **{"retries": 20, **options})
    with pytest.raises(EngineError, match="refuses request"):
        taught(path)
    known = recorded(tmp_path / "run")
    assert len(known) == len(set(known)) and 0 < len(known) < ALL
    second = serve(mischief=mischief)
    recipe, stats, _ = taught(recipe_at(tmp_path, second.url, **{"retries": 20, **options}))
    assert results(recipe) == undisturbed
    every = recorded(tmp_path / "run")
    assert len(every) == len(set(every)) == ALL and set(known) < set(every)  # none lost, none doubled
    # What is in the journal is not asked again: the prompts of the second session are the others.
    assert stats["from_journal"] == len(known) and stats["calls_made"] == len(asked_of(second)) == ALL - len(known)
    assert len(asked_of(first, second)) == ALL


def test_a_stage_outlives_its_server(
    tmp_path: Path, serve: Callable[..., ChaosServer], undisturbed: dict[str, str]
) -> None:
    """It is killed and comes back at the same address, while the stage waits."""
    reborn: list[ChaosServer] = []

    def rebirth() -> None:
        server.kill()
        time.sleep(0.3)
        reborn.append(serve(port=server.server_port))

    def dies(number: int, body: dict[str, Any]) -> Any:
        if number == 12:
            threading.Thread(target=rebirth).start()
        return Late(0.02)

    server = serve(mischief=dies)
    recipe, stats, _ = taught(recipe_at(tmp_path, server.url, retries=3))
    assert results(recipe) == undisturbed
    every = recorded(tmp_path / "run")
    assert len(every) == len(set(every)) == ALL == stats["calls_made"]
    asked = Counter(json.dumps(post.body["messages"]) for one in (server, *reborn) for post in one.posts)
    assert len(asked) == ALL and len(reborn[0].posts) >= ALL - len(server.posts)
    assert asked.total() <= ALL + 4  # only what was under way is asked twice


def outcome(path: Path) -> str | None:
    """The error of a run in words, which must be one of Retort's, on one line."""
    try:
        taught(path)
    except RetortError as error:
        assert "\n" not in str(error) and error.exit_code == 1
        return str(error)
    return None


@pytest.mark.parametrize("name", ["rejected.jsonl", "answers.jsonl", "sessions.jsonl"])
def test_a_full_disk_is_an_error_in_one_line(tmp_path: Path, serve: Callable[..., ChaosServer], name: str) -> None:
    path, folder = recipe_at(tmp_path, serve().url, max_tokens=6), tmp_path / "run" / "teacher"
    folder.mkdir(parents=True)
    written = folder / (name if name == "sessions.jsonl" else f"{name}.new")
    written.symlink_to("/dev/full")
    remedy = "free some space or choose another output"
    assert outcome(path) == f"{folder / name}: cannot be written (No space left on device); {remedy}"
    written.unlink(missing_ok=True)
    recipe, stats, _ = taught(path)
    # No answer was lost. The time of a session is written first, before there is anything to pay for.
    assert stats["calls_made"] == (ALL if name == "sessions.jsonl" else 0)
    whole, _, _ = taught(recipe_at(tmp_path, serve().url, run="whole", max_tokens=6))
    assert results(recipe) == results(whole)


def test_wherever_the_room_ends(tmp_path: Path, serve: Callable[..., ChaosServer]) -> None:
    """Files may grow to a size and no further, just too small for each that the stage writes."""
    folder = tmp_path / "run" / "teacher"
    path = recipe_at(tmp_path, serve().url, prompts=100, max_tokens=6)  # most are cut, and rejected
    recipe, _, _ = taught(path)
    before, soft = results(recipe), resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = {p.stat().st_size for p in folder.rglob("*") if p.is_file() and "journal" not in str(p)}
    failed = set()
    for size in sorted(sizes - {0}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, soft[1]))
        try:
            said = outcome(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert said is None or "cannot be written (File too large)" in said
        failed |= {Path(said.partition(":")[0]).name} if said else set()
    assert {"identity.json", "rows-00000.jsonl", "rejected.jsonl"} <= failed
    assert outcome(path) is None and results(recipe) == before
