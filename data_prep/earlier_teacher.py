"""Whether the student learnt from another teacher before: on-policy distillation goes on from answers of its own.

Who taught an earlier run stands in its manifest: as its recipe's teacher, as a parent, as the writer of its rows.
Where the weights were recorded they are compared, else names are, a folder by the place where it really lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.identity import model_identity, teacher_ref
from recipes.lineage import MANIFEST, read_manifest, read_object
from recipes.schema import Recipe
from recipes.student import TEACHER

IDENTITY = "identity.json"  # in a run's teacher/: the identity of the teacher that wrote its journal
Identity = Mapping[str, Any]


def teacher_parent(recipe: Recipe) -> dict[str, Any]:
    """The recipe's teacher as an entry of a manifest's `parents`: who wrote the run's answers, or is asked in training.

    Raises:
        RecipeError: it is asked in training, and cannot be found.
    """
    assert recipe.teacher is not None
    asked = recipe.method.type == "distill" and recipe.method.mode == "on_policy"
    identity = model_identity(recipe) if asked else read_object(recipe.run_dir / TEACHER / IDENTITY)
    return {"role": "teacher", "ref": recipe.teacher.model, **({"identity": identity} if identity else {})}


def changed_teacher(recipe: Recipe) -> str | None:
    """A doubt where the run that this one continues learnt from another teacher; it is looked for up the chain.

    Raises:
        DataError: a manifest of the chain was changed.
        RecipeError: the recipe's teacher cannot be found.
    """
    assert recipe.teacher is not None
    now, run, seen = recipe.teacher.model, recipe.model.run, set()
    while run is not None and run not in seen:
        seen.add(run)
        manifest = read_manifest(Path(run).expanduser()) or {}
        earlier = teachers_of(manifest)
        if any(_same(name, identity, recipe) for name, identity in earlier.items()):
            return None
        if any(_place(name) == _place(now) for name in earlier):
            return f"the student learnt from {now} in {run}, which has other weights now"
        if earlier:
            return f"the student learnt from {', '.join(sorted(earlier))} in {run}, and now from {now}"
        run = ((manifest.get("recipe") or {}).get("model") or {}).get("run")
    return None


def teachers_of(manifest: Mapping[str, Any]) -> dict[str, Identity]:
    """Who taught an earlier run, by its manifest: name -> identity, empty where none was recorded."""
    found: dict[str, Identity] = {}
    for name, identity in _named(manifest):
        found[name] = found.get(name) or identity
    return found


def _named(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Identity]]:
    recipe = manifest.get("recipe")
    teacher = recipe.get("teacher") if isinstance(recipe, dict) else None
    if isinstance(teacher, dict) and "model" in teacher:
        yield str(teacher["model"]), {}
    yield from _parents(manifest)
    for source in _entries(manifest, "inputs"):
        if source.get("role") == "data":  # rows that a teacher wrote lie in a folder that says so
            yield from _parents(read_object(Path(str(source.get("ref"))).expanduser() / MANIFEST))
    writers = manifest.get("generators")
    for name in writers if isinstance(writers, dict) else ():
        yield str(name), {}


def _parents(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Identity]]:
    for parent in _entries(manifest, "parents"):
        if parent.get("role") == "teacher" and "ref" in parent:
            identity = parent.get("identity")
            yield str(parent["ref"]), identity if isinstance(identity, dict) else {}


def _entries(manifest: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = manifest.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _same(name: str, identity: Identity, recipe: Recipe) -> bool:
    assert recipe.teacher is not None
    if identity.keys() & {"sha256", "commit"}:
        now = model_identity(recipe)
        for whole in (("sha256",), ("model", "commit")):
            if all(key in identity and key in now for key in whole):
                return all(identity[key] == now[key] for key in whole)
    return _place(name) == _place(recipe.teacher.model)


def _place(name: str) -> str:
    """A model's name; of a folder where it is, however it is written."""
    ref = teacher_ref(name)
    return str(ref.path.resolve()) if ref is not None and ref.path is not None else name
