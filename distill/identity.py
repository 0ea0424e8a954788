"""What tells one teacher from another: part of every request's key, of the journal and of the logit cache.

The engine is no part of it. The same weights are the same teacher under transformers, vLLM or a server, so what one
engine wrote another continues.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.tokens import fetch
from recipes.lineage import MANIFEST, sha256_files, sha256_json
from recipes.papers import COMMIT, cached
from recipes.refs import Ref, parse_ref, require_model_folder
from recipes.schema import Recipe

PLACE = "teacher.model"
_DECIDES = {".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt"}  # a README answers nothing
_AT_HAND = {"transformers", "vllm"}  # engines that load the weights themselves


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """The teacher that a recipe names, without starting it.

    A folder is its weights, configuration and tokenizer, by hash (read whole: 1 to 2 s a GB from a fast disk). A hub
    repository is its commit, which is looked up where this machine loads the weights; behind a server only the recipe
    can tell it, for what the local cache holds says nothing of what is served. A service is its name.

    Returns:
        `model`, and where they are known `sha256` or `commit`, and `quantization` where the weights are rounded.

    Raises:
        RecipeError: the folder is missing or no model, or the repository cannot be reached.
    """
    teacher = recipe.teacher
    assert teacher is not None
    rounded = getattr(teacher.engine.options, "quantization", "none")
    extra = {} if rounded == "none" else {"quantization": rounded}
    ref = teacher_ref(teacher.model)
    if ref is None:
        return {"model": teacher.model, **extra}
    folder = require_model_folder(ref, PLACE)
    if folder is not None:
        return {"model": str(ref), "sha256": _sha256(folder, _state(folder)), **extra}
    if ref.revision is not None and COMMIT.fullmatch(ref.revision):
        return {"model": ref.name, "commit": ref.revision, **extra}
    if teacher.engine.name not in _AT_HAND:
        return {"model": str(ref), **extra}
    snapshot = cached(ref.name, ref.revision) or fetch(ref, False, PLACE)
    return {"model": ref.name, "commit": snapshot.name, **extra}


def teacher_ref(text: str) -> Ref | None:
    """The reference that teacher.model is; None for a service (`openai:gpt-4o`)."""
    try:
        return parse_ref(text)
    except ValueError:
        return None


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size in bytes and time of change (ns) of the files that decide the answers."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _DECIDES and p.name != MANIFEST)
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)


@lru_cache(maxsize=8)
def _sha256(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    return sha256_json(sha256_files(folder, [name for name, _, _ in state]))
