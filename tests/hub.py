"""A small real server on this machine that speaks as much of the Hugging Face Hub's protocol as its clients use."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their id, each with all its files, and where `main` stands."""

    commits: dict[str, Files] = field(default_factory=dict)
    main: str = ""
    gated: bool = False


class Hub:
    """Repositories (`models/org/name`, `datasets/org/name`) and what was asked of them (method, path)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def push(self, name: str, files: Files, gated: bool = False) -> str:
        """Put a commit on `main`; returns its id."""
        repository = self.repositories.setdefault(name, Repository())
        seed = repr([name, len(repository.commits), sorted(files.items())]).encode()
        commit = hashlib.sha1(seed).hexdigest()
        repository.commits[commit], repository.main, repository.gated = files, commit, gated
        return commit

    def find(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit that a revision means."""
        repository = self.repositories.get(f"{kind}/{name}")
        commit = repository.main if repository and revision == "main" else revision
        return (repository, commit) if repository and commit in repository.commits else None

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that takes this server for the Hub, with a cache of its own."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        told = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {**clean, **told, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}


def folder_files(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def running() -> Iterator[Hub]:
    """The server, until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.state.asked.append((self.command, path))
        parts = path.split("/")
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in {"models", "datasets"}:
            self._api(parts[1], "/".join(parts[2:4]), parts[4:], body)
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        name, rest = ("/".join(parts[1:3]), parts[3:]) if kind == "datasets" else ("/".join(parts[:2]), parts[2:])
        if len(rest) >= 3 and rest[0] == "resolve":
            self._file(kind, name, rest[1], "/".join(rest[2:]))
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, kind: str, name: str, rest: list[str], body: bytes) -> None:
        """What a repository is, what lies in it, and what single paths of it are."""
        what, revision = (rest[0], rest[1]) if len(rest) >= 2 else ("revision", "main")
        found = self.state.find(kind, name, revision)
        if found is None:
            there = f"{kind}/{name}" in self.state.repositories
            self._refuse(404, "RevisionNotFound" if there else "RepoNotFound")
            return
        repository, commit = found
        files = repository.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            gated = "manual" if repository.gated else False
            about = {"id": name, "sha": commit, "private": False, "gated": gated, "siblings": siblings, "tags": []}
            self._send(200, json.dumps(about).encode())
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        elif what == "tree":
            below = "/".join(rest[2:])
            entries = [_entry(path, files[path]) for path in files if path.startswith(f"{below}/" if below else "")]
            self._send(200, json.dumps(entries).encode())
        elif what == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
            self._send(200, json.dumps([_entry(path, files[path]) for path in wanted if path in files]).encode())
        else:
            self._refuse(404, "EntryNotFound")

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self.state.find(kind, name, revision)
        if found is None:
            self._refuse(404, "RevisionNotFound" if f"{kind}/{name}" in self.state.repositories else "RepoNotFound")
            return
        repository, commit = found
        if repository.gated:
            self._refuse(401, "GatedRepo")
            return
        content = repository.commits[commit].get(path)
        if content is None:
            self._refuse(404, "EntryNotFound", commit)
            return
        begin, _, end = (self.headers.get("Range") or "").removeprefix("bytes=").partition("-")
        part = content[int(begin) : int(end) + 1 if end else None] if begin else content
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"
        self._send(206 if begin else 200, part, headers, "application/octet-stream")

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        message = "Access to this repository is restricted" if code == "GatedRepo" else "not found"
        headers = {"X-Error-Code": code, "X-Error-Message": message, **({"X-Repo-Commit": commit} if commit else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _blob(content: bytes) -> str:
    """The id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
