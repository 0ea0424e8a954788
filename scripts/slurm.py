"""`retort submit`: the stages of a recipe as dependent Slurm jobs, each a batch script that a person can read and edit.

    prepare -> generate (an array of shards) -> merge -> train -> finish -> export

Generation is there where the recipe has a teacher, export where it says `use`. Scripts, logs and the list of jobs lie
in RUN_DIR/logs/slurm. Every stage is a command that skips what is done, so submitting again goes on where a failed,
cancelled or timed-out job left off. scripts/slurm/*.sbatch are those of a shipped recipe, made by the same code
(`python -m scripts.reference`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.journal import JOURNAL
from finetune.distributed import check_launch
from finetune.launch import FILES, asked_device, launched, suggested
from finetune.layout import model_facts
from recipes.errors import RecipeError, RetortError
from recipes.gate import check
from recipes.lineage import read_manifest, read_object, write_atomic
from recipes.load import load_recipe
from recipes.schema import Recipe
from recipes.student import TEACHER, student_recipe
from scripts.batch import FOLDER, Ask, Place, render, require_time, stages
from scripts.plan import base_folder

JOBS = "jobs.json"
PATIENCE = 60  # seconds that a Slurm command may take to answer


def submit(path: Path, overrides: Sequence[str] = (), ask: Ask | None = None, dry_run: bool = False) -> str:
    """Submit the stages of a recipe; returns what was submitted, or with `dry_run` the scripts.

    Raises:
        RecipeError: the recipe or what is asked makes no sense. GateError: a licence forbids it.
        RetortError: Slurm is not here, does not answer or refuses; the run directory cannot be written; its run is
            finished, or still in the queue.
    """
    ask = ask or Ask()
    recipe = load_recipe(path, list(overrides))
    check(recipe).require()
    _require_sense(recipe, path, overrides, ask)
    folder = recipe.run_dir.absolute()
    ask, launch = _launch(recipe, ask, folder)
    python = sys.executable if ask.container is None else "python3"
    place = Place(str(path.absolute()), tuple(overrides), str(folder), python, os.getcwd())
    scripts = [(stage, render(stage, ask, place, recipe.name)) for stage in stages(recipe, ask, place)]
    if dry_run:
        said = [f"# {_words(launch)}\n"] if launch is not None else []
        return "\n".join([*said, *(f"# {folder / FOLDER / stage.name}.sbatch\n{text}" for stage, text in scripts)])
    _require_room(recipe, folder)
    if launch is not None and ask.config_file is not None:
        write_atomic(Path(ask.config_file), (FILES / f"{launch[0]}.yaml").read_text(encoding="utf-8"))
    for stage, text in scripts:
        write_atomic(folder / FOLDER / f"{stage.name}.sbatch", text)
        for old in (folder / FOLDER).glob(f"{stage.name}*.end"):
            old.unlink()
    submitted: list[dict[str, Any]] = []
    try:
        for stage, _ in scripts:
            after = [f"--dependency=afterok:{submitted[-1]['job']}"] if submitted else []
            script = folder / FOLDER / f"{stage.name}.sbatch"
            job = slurm("sbatch", "--parsable", *after, str(script)).strip().partition(";")[0]
            submitted.append({"stage": stage.name, "job": job, "array": stage.array, "script": str(script)})
    except RetortError:
        if submitted:
            slurm("scancel", *(str(entry["job"]) for entry in submitted))
        raise
    state = {
        "recipe": str(path.absolute()),
        "overrides": list(overrides),
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "answers": journalled(folder),
        "ask": dataclasses.asdict(ask),
        "jobs": submitted,
    }
    write_atomic(folder / FOLDER / JOBS, json.dumps(state, indent=2) + "\n")
    lines = [f"job {entry['job']}: {entry['stage']}" for entry in submitted]
    if launch is not None:
        lines.append(_words(launch))
    return "\n".join([*lines, f"logs are in {folder / FOLDER}; retort status {recipe.run_dir} shows how far it is"])


def _launch(recipe: Recipe, ask: Ask, folder: Path) -> tuple[Ask, tuple[str, str] | None]:
    """The launch file of a training on several cards, and why, where the user names none and the base is here.

    The file goes beside the scripts, where containers and all nodes see it. ddp needs none.

    Raises:
        RecipeError: the recipe asks for what the file that suits it cannot do.
    """
    world = ask.nodes * ask.gpus
    if world < 2 or ask.config_file is not None or (base := base_folder(recipe)) is None:
        return ask, None
    student, device = student_recipe(recipe, recipe.run_dir), asked_device(recipe, ask.gpus, ask.card_memory)
    launch = suggested(student, device, world, model_facts(base))
    with launched(launch[0], world):
        check_launch(student, device.kind)
    if launch[0] == "ddp":
        return ask, launch
    return dataclasses.replace(ask, config_file=str(folder / FOLDER / f"{launch[0]}.yaml")), launch


def _words(launch: tuple[str, str]) -> str:
    return f"launch: recipes/accelerate/{launch[0]}.yaml, as {launch[1]} (--config-file takes another)"


def _require_sense(recipe: Recipe, path: Path, overrides: Sequence[str], ask: Ask) -> None:
    for name in ("nodes", "shards"):
        if getattr(ask, name) < 1:
            raise RecipeError(f"must be at least 1, not {getattr(ask, name)}", f"--{name}")
    require_time(ask.time)
    if recipe.teacher is None and (ask.vllm or ask.shards > 1):
        raise RecipeError("the recipe has no teacher", "--vllm" if ask.vllm else "--shards", "leave it out")
    if ask.serve and not ask.vllm:
        raise RecipeError("no server is started", "--serve", "add --vllm, or leave it out")
    if ask.vllm:
        try:
            load_recipe(path, [*overrides, "teacher.engine.http.urls=[http://127.0.0.1:10000/v1]"])
        except RecipeError:
            remedy = "leave it out: that engine needs no server"
            raise RecipeError("the recipe's teacher.engine is another than http", "--vllm", remedy) from None


def _require_room(recipe: Recipe, folder: Path) -> None:
    """Refuse where a run is finished or in the queue; jobs that wait for a failed one for ever are cancelled."""
    if read_manifest(folder) is not None:
        remedy = "choose another output, or move it away"
        raise RetortError("holds a finished run", str(recipe.run_dir), remedy)
    before = read_jobs(folder)
    known = queue([str(entry["job"]) for entry in before["jobs"]]) if before else []
    ids, reasons = [line["id"] for line in known], {line["reason"] for line in known}
    if not ids:
        return
    if "DependencyNeverSatisfied" in reasons and reasons <= {"DependencyNeverSatisfied", "Dependency"}:
        slurm("scancel", *ids)
        return
    remedy = f"wait for them, or scancel {' '.join(ids)} first"
    raise RetortError("its jobs are in the queue", str(recipe.run_dir), remedy)


def read_jobs(folder: Path) -> dict[str, Any] | None:
    """What was submitted for a run directory last; None where nothing was."""
    return read_object(folder / FOLDER / JOBS) or None


def queue(jobs: Sequence[str]) -> list[dict[str, str]]:
    """Slurm's queue, of some jobs: id (of an array's element with its number), state, reason, start, seconds run."""
    if not jobs:
        return []
    names = ("id", "job", "state", "reason", "time", "node")
    text = slurm("squeue", "-h", "-r", "-o", "%i|%F|%T|%r|%M|%N")
    lines = [dict(zip(names, line.split("|"), strict=False)) for line in text.splitlines()]
    return [line for line in lines if line.get("job") in set(jobs)]


def journalled(folder: Path) -> int:
    """Answers in the teacher's journal, as lines of its files."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / TEACHER / JOURNAL).glob("*.jsonl"))


def slurm(*command: str) -> str:
    """Run a command of Slurm's; returns what it says.

    Raises:
        RetortError: it is not here, does not answer, or fails (in Slurm's own words).
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except FileNotFoundError:
        raise RetortError(f"{command[0]} is not here", "Slurm", "run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        remedy = "see whether scontrol ping answers"
        raise RetortError(f"{command[0]} did not answer within {PATIENCE} s", "Slurm", remedy) from None
    if done.returncode == 0:
        return done.stdout
    said = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
    words = "; ".join(said)[:400] or f"exit code {done.returncode}"
    if "munge" in words.lower():
        remedy = "is munged running on this machine?"
    elif "partition" in words:
        remedy = "sinfo lists the partitions (--partition)"
    else:
        remedy = "sacctmgr show associations lists the accounts (--account)" if "account" in words else ""
    raise RetortError(f"{command[0]} fails: {words}", "Slurm", remedy or None)
