"""What the student of a distillation trains on: the recipe that is left when the teacher has done its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.errors import EngineError, RecipeError
from recipes.lineage import read_manifest, verify
from recipes.schema import Recipe
from recipes.schema_data import Source
from recipes.schema_method import SFT, Method

TEACHER = "teacher"  # of a run directory: what the teacher wrote
PROMPTS = "prompts"  # prepared prompts, the teacher's input; the student's rows are in data/, as in any run
LOGITS = "logits"
PROMPT = "_prompt"  # column of a row: the id of the prepared prompt that it came from
ANSWERS_BY = ("quantization", "hf_overrides", "served_as", "extra_body")
REFERENCE = "_reference"  # column of a held-out row: the answer that the student's is compared with
ROWS = ("rows", "heldout")  # folders inside TEACHER: the student's training rows, and its held-out ones


def waits(recipe: Recipe) -> bool:
    """Whether the student's rows are written by the teacher first."""
    method = recipe.method
    return method.type == "distill" and method.mode != "on_policy" and recipe.prompts_only


def rows_folder(recipe: Recipe, run_dir: Path) -> Path:
    """Where the recipe's own rows are prepared: prompts for a teacher apart, the student's rows will lie in data/."""
    return run_dir / (PROMPTS if waits(recipe) else "data")


def scored(recipe: Recipe) -> bool:
    """Whether the student needs the teacher's distributions of its rows."""
    return recipe.method.type == "distill" and recipe.method.mode == "logits"


def student_recipe(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe of the training itself: its rows are those that the teacher wrote, its method is what is done with
    them. A recipe whose rows are there already is its own.

    Args:
        run_dir: the run directory with the teacher's rows.
    """
    method = recipe.method
    if method.type != "distill" or not waits(recipe):
        return recipe
    learns: Method
    if method.mode == "logits":
        learns = method.model_copy(update={"answers": "given"})
    else:
        learns = method.dpo if method.mode == "preference" else SFT()
    assert recipe.teacher is not None
    speaks = any(asked.write == "user" for asked in recipe.teacher.rounds)  # then earlier turns are the teacher's too
    rows, held_out = (Source(path=str(run_dir / TEACHER / name)) for name in ROWS)
    data = recipe.data.model_copy(
        update={
            "train": (rows,),
            "eval": (held_out,) if recipe.data.eval is not None else None,
            "steps": (),
            "requests": (),
            "train_on": "all" if speaks else "last",
        }
    )
    return recipe.model_copy(update={"data": data, "method": learns})


def require_taught(recipe: Recipe) -> None:
    """Refuse to train before the teacher has done its part, or after it was asked for something else.

    Raises:
        RecipeError: the recipe names a teacher that its method would not ask.
        EngineError: teacher rows or distributions are missing or were made by another recipe; names the command.
    """
    if recipe.method.type != "distill" and recipe.teacher is not None:
        why = f"the method {recipe.method.type} asks no teacher"
        raise RecipeError(why, "teacher", "set method: distill, or leave teacher out to train on the rows")
    if recipe.method.type != "distill" or recipe.method.mode == "on_policy":
        return
    command = "run retort generate with this recipe"
    folder = recipe.run_dir / TEACHER
    made = read_manifest(folder)
    if made is None:
        raise EngineError("holds no finished work of the teacher", str(folder), command)
    if wrong := verify(folder):
        raise EngineError(f"was changed after it was made: {', '.join(wrong[:4])}", str(folder), command)
    before, now = decides(made.get("recipe", {})), decides(recipe.resolved())
    if changed := sorted(key for key in now if before.get(key) != now[key]):
        raise EngineError(f"was made by another recipe ({', '.join(changed[:4])} changed)", str(folder), command)
    if scored(recipe) and read_manifest(recipe.run_dir / LOGITS) is None:
        raise EngineError("holds no finished distributions", str(recipe.run_dir / LOGITS), command)


def decides(resolved: dict[str, Any]) -> dict[str, Any]:
    """Of a resolved recipe what decides the teacher's rows, by key path."""
    teacher, method = dict(resolved.get("teacher") or {}), resolved.get("method") or {}
    engine = teacher.pop("engine", None) or {}
    teacher.pop("price", None)
    found = {f"teacher.{key}": value for key, value in teacher.items()}
    found |= {f"teacher.engine.{key}": answers_by(engine).get(key) for key in ANSWERS_BY}
    found |= {f"data.{key}": value for key, value in (resolved.get("data") or {}).items()}
    found |= {f"method.{key}": method.get(key) for key in ("type", "mode", "answers", "pairs", "student_samples")}
    return {**found, "seed": resolved.get("seed"), "model.base": (resolved.get("model") or {}).get("base")}


def answers_by(engine: dict[str, Any]) -> dict[str, Any]:
    """Of a resolved `teacher.engine` what makes another teacher of the same weights: rounded weights, another name at
    the server, further fields of its requests. All else is only how it is run. A replay is what was recorded."""
    options = next(iter(engine.values()), None) or {}
    options = {**(options.get("extra") or {}), **options}  # vLLM's own arguments
    return {key: options[key] for key in ANSWERS_BY if options.get(key) not in (None, "none", {})}
