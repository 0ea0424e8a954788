"""The whole generate stage with the teacher behind a server: what lies on disk, and what a crash must not hide."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_server import Changed, ChaosServer, Status, servers, shorten_pauses, some
from teaching import PROMPTS, recipe_file, results, taught

from distill.http_watch import SERVED
from recipes.errors import EngineError, RetortError

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
            "sampling": {"max_tokens": max_tokens},
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
    assert stats["from_journal"] >= 10 and stats["calls_made"] == PROMPTS + 12 - stats["from_journal"]
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
    assert taught(recipe_at(tmp_path, start(serve).url))[1]["calls_made"] == PROMPTS + 12


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
    assert stats["calls_made"] == 0  # no answer was lost
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
