"""Sending preparation to a cluster from the command line."""

from __future__ import annotations

from typing import Any

from recipes.errors import RecipeError
from recipes.schema import Recipe
from recipes.student import rows_folder


def submitted(recipe: Recipe, executor: Any, tasks: int, partition: str | None, time: str, memory: int) -> str:
    """Submit the stages; says which jobs do what.

    Raises:
        RecipeError: no such executor.
        RetortError: see data_prep.cluster.submit.
    """
    from data_prep.cluster import STAGES, Cluster, submit

    if executor not in ("slurm", "ray"):
        raise RecipeError(f"there is no executor '{executor}'", "--executor", "it is local, slurm or ray")
    ids = submit(recipe, recipe.run_dir, Cluster(executor, tasks, partition, time, memory))
    lines = [f"job {number}: {stage}" for stage, number in zip(STAGES, ids, strict=False)]
    return "\n".join([*lines, f"the data will be in {rows_folder(recipe, recipe.run_dir)}"])
