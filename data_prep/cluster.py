"""Preparation beyond one machine: the same passes over the same pieces, as a Slurm array or on Ray, through datatrove.

The tasks fill the cache, which every machine must see; which task does which piece changes no byte. The last task finds
all work done and writes the data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.mask_pass import mask_block
from data_prep.prepare import begin, judged_on, prepare
from data_prep.read_pass import read_block
from data_prep.tokens import load_tokenizer
from recipes.errors import RecipeError, RetortError
from recipes.gate import check
from recipes.schema import Recipe
from recipes.student import rows_folder

Stage = Literal["read", "mask", "write"]
STAGES: tuple[Stage, ...] = ("read", "mask", "write")


@dataclass(frozen=True)
class Task:
    """One stage as a datatrove pipeline step: task `rank` of `world_size` does every `world_size`-th piece.

    Attributes:
        judged: what the recipe was allowed for when it was submitted. Tasks that find the same do not read all rows for
            the gate again; the one that writes the data always does.
    """

    recipe: Recipe
    run_dir: Path
    stage: Stage
    judged: str = ""

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        if self.stage == "write":
            check(self.recipe).require()
            prepare(self.recipe, self.run_dir, folder=rows_folder(self.recipe, self.run_dir))
            return
        work = begin(self.recipe, self.run_dir)
        if judged_on(self.recipe, work) != self.judged:
            check(self.recipe).require()
        if self.stage == "read":
            for job in work.read_jobs()[rank::world_size]:
                read_block(job)
            return
        work.read()  # finds every block in the cache
        for mask_job in work.mask_jobs(work.decide(), load_tokenizer(self.recipe.model))[rank::world_size]:
            mask_block(mask_job)


@dataclass(frozen=True)
class Cluster:
    """Where the tasks run.

    Attributes:
        tasks: tasks of a stage.
        time: limit of a task, as Slurm writes it (2:00:00).
        memory: GB of a task.
    """

    executor: Literal["slurm", "ray"]
    tasks: int
    partition: str | None = None
    time: str = "2:00:00"
    memory: int = 4


def submit(recipe: Recipe, run_dir: Path, cluster: Cluster) -> list[str]:
    """Submit the three stages of a recipe that the gate allows, each waiting for the one before (Slurm), or run them to
    their end (Ray).

    Returns:
        Slurm's job ids by stage; empty for Ray.

    Raises:
        RetortError: datatrove is not installed, Slurm is not here or refuses the job.
    """
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise RetortError("datatrove is not installed", None, "pip install 'retort[cluster]'") from None
    judged = judged_on(recipe, begin(recipe, run_dir))
    tasks = [Task(recipe, run_dir.absolute(), stage, judged) for stage in STAGES]
    if cluster.executor == "ray":
        _run_on_ray(tasks, cluster)
        return []
    return _submit_to_slurm(tasks, cluster)


def _submit_to_slurm(tasks: Sequence[Task], cluster: Cluster) -> list[str]:
    import subprocess

    from datatrove.executor import SlurmPipelineExecutor

    if cluster.partition is None:
        raise RecipeError("Slurm wants a partition", "--partition", "sinfo lists them")
    activate = Path(sys.prefix) / "bin" / "activate"
    before, ids = None, []
    for task in tasks:
        executor = SlurmPipelineExecutor(
            pipeline=[task],
            tasks=1 if task.stage == "write" else cluster.tasks,
            time=cluster.time,
            partition=cluster.partition,
            mem_per_cpu_gb=cluster.memory,
            job_name=f"{task.recipe.name}-{task.stage}",
            qos="",
            venv_path=str(activate) if activate.is_file() else None,
            # Slurm copies the environment; relative paths of the recipe count from here on every node.
            sbatch_args={"chdir": os.getcwd()},
            logging_dir=str(task.run_dir / "logs" / f"prepare-{task.stage}"),
            skip_completed=False,  # the cache knows better what is done: its keys see every change
            depends=before,
        )
        try:
            executor.run()
        except FileNotFoundError:
            raise RetortError(
                "sbatch is not here", "--executor slurm", "run this on a login node of a Slurm cluster"
            ) from None
        except subprocess.CalledProcessError as error:
            reason = " ".join(str(error.stderr or error.output or error).split())
            raise RetortError(f"Slurm refuses the job: {reason}", "--executor slurm") from None
        before = executor
        ids.append(str(executor.job_id))
    return ids


def _run_on_ray(tasks: Sequence[Task], cluster: Cluster) -> None:
    try:
        import ray  # noqa: F401
        from datatrove.executor import RayPipelineExecutor
    except ImportError:
        raise RetortError("ray is not installed", "--executor ray", "pip install 'retort[ray]'") from None

    for task in tasks:
        RayPipelineExecutor(
            pipeline=[task],
            tasks=1 if task.stage == "write" else cluster.tasks,
            mem_per_cpu_gb=cluster.memory,
            logging_dir=str(task.run_dir / "logs" / f"prepare-{task.stage}"),
            skip_completed=False,
        ).run()
