"""What the student of a distillation trains on: the recipe that is left when the teacher has done its part."""

from __future__ import annotations

from pathlib import Path

from recipes.schema import Recipe
from recipes.schema_data import Source
from recipes.schema_method import SFT

TEACHER = "teacher"  # of a run directory: what the teacher wrote
PROMPTS = "prompts"  # prepared prompts, the teacher's input; the student's rows are in data/, as in any run
LOGITS = "logits"
ROWS = ("rows", "heldout")  # folders inside TEACHER: the student's training rows, and its held-out ones


def waits(recipe: Recipe) -> bool:
    """Whether the student's rows are written by the teacher first."""
    method = recipe.method
    return method.type == "distill" and method.mode != "on_policy" and recipe.prompts_only


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
