"""manifest.json: what an artefact is made of. Written last and atomically: an artefact without one is unfinished."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.errors import DataError, RetortError

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
# What is put beside a finished artefact, or lies there from the work on it, by kind: folders with manifests or seals of
# their own, logs, what a signature adds. Anything else that the manifest does not name does not belong there.
SIGNATURE = "model.sig"
BESIDE = {
    "run": {
        *("state.json", "stopped.json", "base_answers.jsonl", "checkpoints", "data.html", "logs", "wandb"),
        *("export", "export.new", "prompts", "teacher", "logits"),
    },
    "teacher": {"journal", "identity.json", "sessions.jsonl", "stats.json", "rejected.jsonl", "student"},
    "export": {SIGNATURE},
    "model": {SIGNATURE},
}
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "wandb",
    "tokenizers",
    "numpy",
)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of key order and spacing."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def sha256_files(root: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Hashes by path relative to `root`; all files below it when `names` is None (its manifest left out)."""
    if names is None:
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {name: sha256_file(root / name) for name in names}


def sha256_path(path: Path) -> str:
    """One hash for a file, or for a folder (over the names and hashes of its files)."""
    return sha256_file(path) if path.is_file() else sha256_json(sha256_files(path))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part.

    Raises:
        RetortError: the file cannot be written (permissions, full disk); no half file is left.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as stream:
            temporary = stream.name
            os.chmod(temporary, 0o644)  # the library's default would hide the file from the group
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise cannot_write(path, error) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file or folder: a full disk and its like become a RetortError that names it."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path | str, error: OSError) -> RetortError:
    remedy = "free some space or choose another output" if error.errno in {28, 122} else "choose another output"
    return RetortError(f"cannot be written ({error.strerror or error})", str(path), remedy)


def build_manifest(folder: Path, content: dict[str, Any], files: Iterable[str] | None = None) -> dict[str, Any]:
    """`content` with date, version and the hashes of `files` (all files of the folder when None)."""
    stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "retort_version": version()}
    return sealed({**content, **stamp, "files": sha256_files(folder, files)})


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash over itself, so that a changed one is told from a whole one."""
    content = {k: v for k, v in manifest.items() if k != SEAL}
    return {**content, SEAL: sha256_json(content)}


def write_manifest(folder: Path, content: dict[str, Any], files: Iterable[str] | None = None) -> dict[str, Any]:
    """Hash the folder's files and write its manifest, last of all. Returns what was written."""
    manifest = build_manifest(folder, content, files)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def refresh(folder: Path, names: Iterable[str]) -> None:
    """Bring the hashes of files that were written again on purpose up to date; nothing without a manifest."""
    manifest = read_manifest(folder)
    if manifest is not None:
        manifest["files"] |= sha256_files(folder, names)
        write_atomic(folder / MANIFEST, json.dumps(sealed(manifest), indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None where it has none (an unfinished artefact).

    Raises:
        DataError: there is one, and it is no JSON object, or not as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"cannot be read ({error})", str(path), "run the stage that made it again") from None
    if not isinstance(manifest, dict):
        raise DataError("is no JSON object", str(path), "run the stage that made it again")
    if {"retort_version", SEAL} & manifest.keys() and manifest != sealed(manifest):
        raise DataError("was changed after it was written", str(path), "run the stage that made it again")
    return manifest


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that may be missing, half written or something else: then it is empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def verify(folder: Path, part: str = "") -> list[str]:
    """Recompute the hashes of an artefact. Returns the names of files that are missing, differ, or were added to it
    (empty: intact). Files whose names begin with a dot are nobody's.

    Args:
        part: only of the files whose names begin so; `model/` is a subfolder.

    Raises:
        DataError: the folder has no manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError("has no manifest.json", str(folder), "it is no finished artefact; run the stage that makes it")
    files = manifest.get("files", {})
    if not isinstance(files, dict):
        raise DataError(
            "'files' is no map of names to hashes", str(folder / MANIFEST), "run the stage that made it again"
        )
    wrong = []
    for name, expected in files.items():
        path = folder / name
        if name.startswith(part) and (not path.is_file() or sha256_file(path) != expected):
            wrong.append(name)
    added = _added(folder, manifest) if "retort_version" in manifest else []
    return wrong + [name for name in added if name.startswith(part)]


def _added(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files of an artefact of ours that its manifest does not name."""
    files, beside = manifest.get("files", {}), BESIDE.get(str(manifest.get("kind")), set())
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and path.name != MANIFEST and not (parts[0] in beside or any(p[0] == "." for p in parts)):
            found.append("/".join(parts))
    return [name for name in found if name not in files]


def version() -> str:
    try:
        return importlib.metadata.version("retort")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def packages() -> dict[str, str]:
    """Installed versions of the libraries that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_state() -> dict[str, Any]:
    """Commit of Retort's own checkout and whether it has uncommitted changes; nulls outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": dirty}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def environment(device: str) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cpu_count": os.cpu_count(),
        "memory_bytes": memory,
    }
