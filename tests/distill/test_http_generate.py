"""The whole generate stage with the teacher behind a server: what lies on disk, and what a crash must not hide."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_server import ChaosServer, Status, servers, shorten_pauses, some
from teaching import recipe_file, taught

SECRET = "sk-chaos-0123456789abcdef-WXYZ"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_pauses(monkeypatch)


@pytest.fixture
def serve() -> Iterator[Callable[..., ChaosServer]]:
    yield from servers()


def recipe_at(folder: Path, url: str, run: str = "run", **options: Any) -> Path:
    """A recipe whose teacher is at an address; keyword arguments are options of the engine."""
    return recipe_file(
        folder,
        output=str(folder / run),
        use={"purpose": "research", "distribute": False},
        teacher={
            "model": "org/teacher",
            "license": "Apache-2.0",
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
