"""What tells one teacher from another: part of every request's key, of the journal and of the logit cache.

The engine is no part of it, nor is the place of a folder. The same weights are the same teacher under transformers,
vLLM or a server, here or on another machine, so what one of them began another goes on with.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.tokens import fetch
from recipes.lineage import MANIFEST, sha256_files, sha256_json
from recipes.names import COMMIT
from recipes.papers import cached
from recipes.refs import Ref, parse_ref, require_model_folder
from recipes.schema import Recipe
from recipes.schema_teacher import Teacher
from recipes.student import answers_by

PLACE = "teacher.model"
_DECIDES = {".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt"}  # a README answers nothing
_LOADS = {"transformers", "vllm"}  # engines that load the weights on this machine

State = tuple[tuple[str, int, int], ...]  # name, size in bytes and time of change (ns) of files


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """The teacher that a recipe names, without starting it.

    A folder is the hash of its weights, configuration and tokenizer (read whole: a second or two a GB). A hub
    repository is its commit, which is looked up where this machine loads the weights; behind a server only the recipe
    can tell it, for what the local cache holds says nothing of what is served. A service is its name.

    Returns:
        `sha256`, or `model` and where it is known `commit`; and what of the engine's options makes another teacher
        (`recipes.student.answers_by`).

    Raises:
        RecipeError: the folder is missing or no model, or the repository cannot be reached.
    """
    teacher = recipe.teacher
    assert teacher is not None
    return {**_weights(teacher), **answers_by(teacher.engine.model_dump(mode="json", by_alias=True))}


def teacher_ref(text: str) -> Ref | None:
    """The reference that teacher.model is; None for a service (`openai:gpt-4o`)."""
    try:
        return parse_ref(text)
    except ValueError:
        return None


def _weights(teacher: Teacher) -> dict[str, Any]:
    ref, loads = teacher_ref(teacher.model), teacher.engine.name in _LOADS
    if ref is None or (ref.kind == "local" and not loads and not _is_model(ref.path)):
        return {"model": teacher.model}  # a service, or a folder at the server
    folder = require_model_folder(ref, PLACE)
    if folder is not None:
        return {"sha256": _sha256(folder, _state(folder))}
    if ref.revision is not None and COMMIT.fullmatch(ref.revision):
        return {"model": ref.name, "commit": ref.revision}
    if not loads:
        return {"model": str(ref)}
    snapshot = cached(ref.name, ref.revision) or fetch(ref, False, PLACE)
    return {"model": ref.name, "commit": snapshot.name}


def _is_model(path: Path | None) -> bool:
    return path is not None and (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _state(folder: Path) -> State:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _DECIDES and p.name != MANIFEST)
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)


@lru_cache(maxsize=8)
def _sha256(folder: Path, state: State) -> str:
    return sha256_json(sha256_files(folder, [name for name, _, _ in state]))
