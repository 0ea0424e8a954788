"""`retort status`: which stages of a run are done, at work or waiting; how fast, how long still, and why one failed.

What the files say holds everywhere: manifests close stages, the journal and metrics.jsonl grow with the work. Where the
run was submitted to Slurm its queue says what the files cannot; the scripts leave their exit codes, because many
clusters keep no accounts.
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from recipes.errors import DataError, RetortError
from recipes.lineage import read_manifest, read_object
from recipes.load import load_recipe
from recipes.schema import Recipe
from recipes.student import LOGITS, PROMPTS, TEACHER
from scripts.batch import FOLDER
from scripts.slurm import journalled, queue, read_jobs, slurm

ALIVE = {"RUNNING", "COMPLETING", "CONFIGURING"}
REASONS = {
    "DependencyNeverSatisfied": "waits for ever: a stage before it failed",
    "Dependency": "waits for the stage before it",
    "BeginTime": "goes on soon",
    "Resources": "waits for room on the cluster",
    "Priority": "waits for jobs of higher priority",
}


@dataclass
class Part:
    """A stage: its name, `done`, `running`, `waiting`, `failed`, `stopped` or `open`, and what there is to say."""

    name: str
    state: str
    words: str = ""


def status(run_dir: Path) -> list[str]:
    """The state of a run as lines, one a stage, with indented lines that say more.

    Raises:
        DataError: there is no run directory.
    """
    if not run_dir.is_dir():
        raise DataError("is no run directory", str(run_dir))
    submitted = read_jobs(run_dir)
    lines, parts = [], list[Part]()
    if submitted is not None:
        try:
            known = queue([str(job["job"]) for job in submitted["jobs"]])
        except RetortError as error:
            known = None
            lines.append(f"Slurm does not say what the jobs do ({error.message}); this is what the files say")
        parts = [_job(run_dir, entry, known) for entry in submitted["jobs"]]
        _hopeless(parts)
    else:
        parts = [_local(run_dir, name) for name in _stages(run_dir)]
    for part in parts:
        lines.append(f"{part.name:<10}{part.state:<9}{part.words}".rstrip())
        if part.name in {"generate", "merge", "train"} and part.state != "open":
            lines += [f"{'':10}{line}" for line in _progress(run_dir, part, submitted)]
    failed = next((part.name for part in parts if part.state == "failed"), None)
    if failed == "export":
        recipe = submitted["recipe"] if submitted is not None else "RECIPE"
        lines.append(f"the run itself is whole; when the cause is gone: retort export {recipe}")
    elif failed is not None:
        again = "submit again" if submitted is not None else "the same command"
        lines.append(f"{failed} failed: when its cause is gone, {again} goes on from what is on disk")
    if read_manifest(run_dir) is not None:
        from finetune.results import result_table

        lines.append(result_table(run_dir))
    return lines


def _job(run_dir: Path, entry: dict[str, Any], known: list[dict[str, str]] | None) -> Part:
    """A submitted stage: from the queue while it is there, else from what its script left."""
    name, job = str(entry["stage"]), str(entry["job"])
    mine = [line for line in known or () if line["job"] == job]
    waiting = [line for line in mine if line["state"] not in ALIVE]
    running = [line for line in mine if line["state"] in ALIVE]
    codes = _codes(run_dir, name, entry["array"])
    failed = _failure(run_dir, name, entry["array"], codes, {_task(line["id"]) for line in mine})
    done = sum(code == 0 for code in codes.values())
    share = f" ({done} of {entry['array']} shards done)" if entry["array"] else ""
    if failed and not running:
        return Part(name, "failed", f"job {job}{share}: {failed}")
    if running:
        where = ", ".join(sorted({line["node"] for line in running}))
        more = f"; {failed}" if failed else ""
        return Part(name, "running", f"job {job} on {where} for {running[0]['time']}{share}{more}")
    if waiting:
        reason = waiting[0]["reason"]
        words = REASONS.get(reason) or f"Slurm says {reason}"
        stopped = _stopped(run_dir) if name == "train" else ""
        return Part(name, "waiting", f"job {job}: {words}{share}{stopped}")
    if done == (entry["array"] or 1):
        return Part(name, "done", f"job {job}{share}")
    if known is None:
        return Part(name, "open", f"job {job}{share}")
    return Part(name, "failed", f"job {job}{share}: {_vanished(job)}")


def _hopeless(parts: list[Part]) -> None:
    """Of jobs after one that waits for ever Slurm itself only says that they wait for the one before."""
    ever, usual = REASONS["DependencyNeverSatisfied"], REASONS["Dependency"]
    for before, part in pairwise(parts):
        if ever in before.words:
            part.words = part.words.replace(usual, ever)


def _task(identifier: str) -> int | None:
    """12_3 -> 3; 12 -> None."""
    number = identifier.partition("_")[2]
    return int(number) if number.isdigit() else None


def _codes(run_dir: Path, name: str, array: int | None) -> dict[int | None, int]:
    """Exit codes that the scripts of a stage left, by the array's element."""
    tasks: list[int | None] = list(range(1, array + 1)) if array else [None]
    found = {}
    for task in tasks:
        path = run_dir / FOLDER / f"{name}{'' if task is None else f'-{task}'}.end"
        if path.is_file() and (text := path.read_text(encoding="utf-8").strip()).isdigit():
            found[task] = int(text)
    return found


def _failure(
    run_dir: Path, name: str, array: int | None, codes: dict[int | None, int], queued: set[int | None]
) -> str | None:
    """Why the first failed job of a stage failed; one that is back in the queue has not."""
    for task, code in codes.items():
        if code and task not in queued:
            log = run_dir / FOLDER / f"{name}{'' if task is None else f'-{task}'}.log"
            where = f"shard {task}, " if array else ""
            return f"{where}exit code {code}: {last_words(log)}"
    return None


def last_words(log: Path) -> str:
    """Why a job ended, from its log: the last error message, else Slurm's last word, else the last line."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return f"no log at {log}"
    begun = [i for i, line in enumerate(lines) if line.startswith("--- job ")]
    lines = lines[begun[-1] + 1 :] if begun else lines  # logs are appended to
    for mark in ("error: ", "slurmstepd: error: *** "):
        if found := [line for line in lines if line.startswith(mark)]:
            return found[-1].removeprefix(mark).strip("* ")
    said = [line for line in lines if line and not line.startswith(("srun:", "slurmstepd:"))]
    return said[-1][:300] if said else f"nothing in {log}"


def _vanished(job: str) -> str:
    """Of a job that left the queue without a word of its script: what Slurm remembers."""
    for command, key in (
        (("sacct", "-n", "-X", "-P", "-o", "State,ExitCode", "-j", job), ""),
        (("scontrol", "show", "job", "-o", job), "JobState="),
    ):
        try:
            said = slurm(*command).split()
        except RetortError:
            continue
        words = [word.removeprefix(key) for word in said if word.startswith(key)]
        ends = [word for word in words if not word.startswith("COMPLETED")]
        if ends:
            return f"Slurm says {ends[0].replace('|', ', exit code ')}"
    return "it left the queue without a word (cancelled, or its node was lost)"


def _stages(run_dir: Path) -> list[str]:
    recipe = _recipe(run_dir)
    teacher = recipe.teacher is not None if recipe is not None else (run_dir / TEACHER).is_dir()
    return ["prepare", *(["generate"] if teacher else []), "train"]


def _recipe(run_dir: Path) -> Recipe | None:
    submitted, own = read_jobs(run_dir), run_dir / "recipe.yaml"
    try:
        if submitted is not None:
            return load_recipe(Path(submitted["recipe"]), submitted["overrides"])
        return load_recipe(own) if own.is_file() else None
    except RetortError:
        return None


def _local(run_dir: Path, name: str) -> Part:
    """A stage of a run that no scheduler knows, by its files."""
    folders = {
        "prepare": run_dir / PROMPTS if (run_dir / PROMPTS).is_dir() else run_dir / "data",
        "generate": run_dir / TEACHER,
        "train": run_dir,
    }
    made = read_manifest(folders[name]) is not None
    if name == "generate" and made and (run_dir / LOGITS).is_dir():
        made = read_manifest(run_dir / LOGITS) is not None
    if made:
        return Part(name, "done")
    if name == "train" and _locked(run_dir / ".lock"):
        return Part(name, "running")
    if name == "generate" and any(map(_locked, (run_dir / TEACHER / "journal").glob("*"))):
        return Part(name, "running")
    begun = (run_dir / "metrics.jsonl").is_file() if name == "train" else journalled(run_dir) and name == "generate"
    return Part(name, "stopped", _stopped(run_dir).lstrip("; ")) if begun else Part(name, "open")


def _locked(path: Path) -> bool:
    """Whether a process holds the lock of a file (always no where the file system has none)."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _stopped(run_dir: Path) -> str:
    """That training made room, and where, as an addition to a line."""
    step = read_object(run_dir / "stopped.json").get("step")
    return f"; preempted at step {step}" if step is not None else ""


def _progress(run_dir: Path, part: Part, submitted: dict[str, Any] | None) -> list[str]:
    if part.name == "train":
        return _training(run_dir)
    return _generation(run_dir, part, submitted) if part.name == "generate" else []


def _training(run_dir: Path) -> list[str]:
    """Steps, loss, speed and time left, of metrics.jsonl and plan.json."""
    try:
        plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        entry = next(found for found in map(json.loads, reversed(lines)) if "loss" in found)
    except (OSError, ValueError, StopIteration):
        return []
    step, steps = int(entry["step"]), int(plan["steps"])
    left = entry["seconds"] / max(1, step) * (steps - step)
    words = f"step {step:,} of {steps:,}, loss {entry['loss']:.4f}, {entry['tokens_per_second']:,.0f} tokens/s"
    if step < steps:
        words += f", about {duration(left)} left"
    return [words]


def _generation(run_dir: Path, part: Part, submitted: dict[str, Any] | None) -> list[str]:
    """Answers in the journal, of how many where one round asks for them, and their speed since the jobs started."""
    answers, wanted = journalled(run_dir), _wanted(run_dir)
    if not answers:
        return []
    # Held-out prompts are answered in the end; only until then is it a share.
    words = f"{answers:,} answers" + (f" of {wanted:,}" if wanted and answers <= wanted else "")
    if part.state != "running" or submitted is None:
        return [words]
    elapsed = part.words.partition(" for ")[2].split()
    seconds = _seconds(elapsed[0].rstrip(":;,")) if elapsed else 0
    new = answers - int(submitted["answers"])
    if new > 0 and seconds:
        words += f", {new / seconds:.2f} a second"
        if wanted and wanted > answers:
            words += f", about {duration((wanted - answers) * seconds / new)} left"
    return [words]


def _wanted(run_dir: Path) -> int | None:
    """Answers that the recipe asks for; None where rounds make it unknown. Held-out prompts are not counted."""
    recipe, prompts = _recipe(run_dir), read_manifest(run_dir / PROMPTS)
    if recipe is None or recipe.teacher is None or prompts is None or len(recipe.teacher.rounds) != 1:
        return None
    return int(prompts["counts"]["train_rows"]) * (recipe.teacher.rounds[0].samples or recipe.teacher.samples)


def _seconds(text: str) -> int:
    """Slurm's [days-][hours:]minutes:seconds."""
    days, _, rest = text.rpartition("-")
    total = int(days or 0) * 86400
    for place, number in enumerate(reversed(rest.split(":"))):
        total += int(number) * 60**place
    return total


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
