"""The run directory: opened for a new run, taken up after a crash, or found finished. Nothing is overwritten unseen."""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.prepare import changed_inputs
from finetune.distributed import first, rank
from recipes.errors import DataError, RecipeError
from recipes.lineage import MANIFEST, read_manifest, read_object, verify, write_atomic
from recipes.load import difference, load_recipe
from recipes.locks import hold
from recipes.schema import Recipe
from recipes.student import LOGITS, PROMPTS, TEACHER, decides, student_recipe

RECIPE = "recipe.yaml"
STATE = "state.json"
KEPT = (PROMPTS, TEACHER, LOGITS)  # the teacher's work outlives the runs that are made of it
_WRITTEN_BY_TRAIN = (
    "adapter",
    "model",
    "checkpoints",
    "best",
    "metrics.jsonl",
    "watched.jsonl",
    "rewards.json",
    "completions.jsonl",
    "eval.json",
    "samples.jsonl",
    "base_answers.jsonl",
)
PAPERS = ("bom.cdx.json", "data.html", "report.html", "README.md")  # of a finished run; made from its other files


@dataclass
class Run:
    """An opened run directory.

    Attributes:
        status: `new`, `resumed` (an unfinished run of the same recipe) or `finished`.
        id: random, made once per run; the same after a resume (wandb's run id, for one).
        notes: what happened to the directory, to be printed.
    """

    folder: Path
    status: Literal["new", "resumed", "finished"]
    id: str
    notes: tuple[str, ...]
    lock: Any = None


def is_main() -> bool:
    """Whether this is the process that writes and prints (torchrun and accelerate set RANK)."""
    return rank() == 0


def say(*lines: str) -> None:
    """Print on the main process only."""
    if is_main():
        for line in lines:
            print(line, flush=True)


def open_run(recipe: Recipe, resume: bool = False, fresh: bool = False) -> Run:
    """Open the recipe's run directory for training, and lock it.

    A finished run of another recipe is moved aside (`<name>.1`, `.2`, ...), never overwritten; an unfinished one is
    refused, since resuming it would not be the same run.

    With several processes the main one opens; the others wait, and get what it found.

    Raises:
        RecipeError: the directory holds other files; the unfinished run there has another recipe or was made from
            other data; --resume and there is nothing to resume.
        RetortError: the directory cannot be written, or another process works in it.
    """
    with first(recipe.run_dir, "opening the run directory"):
        if is_main():
            return _open(recipe, resume, fresh)
        folder = recipe.run_dir
        return Run(folder, "new" if read_manifest(folder) is None else "finished", _id(folder), ())


def _open(recipe: Recipe, resume: bool, fresh: bool) -> Run:
    folder = recipe.run_dir
    require_ours(folder)
    lock = _lock(folder)
    notes: list[str] = []
    found = load_run_recipe(folder)
    finished = read_manifest(folder) is not None
    if found is not None and fresh:
        lock = _move_aside(folder, lock, notes)
        found = None
    changed = changed_keys(found, recipe) if found is not None else {}
    files = changed_inputs(student_recipe(recipe, folder), folder) if found else []
    changed |= {f"the file {ref}": ("as it was", "changed") for ref in files}
    if changed and not finished and not _has_trained(folder):
        found, changed = None, {}  # it failed before its first step: there is nothing to lose
    if changed and not finished:
        names = ", ".join(f"{k} ({a!r} -> {b!r})" for k, (a, b) in list(changed.items())[:4])
        raise RecipeError(
            f"holds an unfinished run of another recipe: {names}{' ...' if len(changed) > 4 else ''}",
            str(folder),
            "undo the change to resume it, or add --fresh to set it aside and start over",
        )
    if changed:
        lock = _move_aside(folder, lock, notes)
        found = None
    if resume and found is None:
        raise RecipeError("nothing to resume", str(folder), "leave --resume out to start")
    status: Literal["new", "resumed", "finished"] = "new" if found is None else "finished" if finished else "resumed"
    if status == "new":
        _clear(folder)
        write_atomic(folder / RECIPE, recipe_yaml(recipe))
        write_atomic(folder / STATE, json.dumps({"id": uuid.uuid4().hex[:12]}) + "\n")
    return Run(folder, status, _id(folder), tuple(notes), lock)


def make_room(recipe: Recipe) -> list[str]:
    """Set a finished run aside before the teacher's work in its directory becomes another recipe's; returns notes.

    Raises:
        RecipeError: a run there has begun to train on the teacher's work as it is, and is not finished.
    """
    folder, notes = recipe.run_dir, list[str]()
    found = load_run_recipe(folder)
    if found is None or decides(found.resolved()) == decides(recipe.resolved()):
        return notes
    if read_manifest(folder) is None:
        if _has_trained(folder):
            remedy = "let it finish, or choose another output"
            raise RecipeError("holds an unfinished run that trains on the teacher's earlier work", str(folder), remedy)
        return notes
    _move_aside(folder, _lock(folder), notes).close()
    return notes


def require_whole(folder: Path, but: Container[str] = ()) -> None:
    """Refuse a finished run that is no longer as its manifest says.

    Args:
        but: files that are about to be written anew.

    Raises:
        DataError: files were changed, removed or added.
    """
    if read_manifest(folder) is not None and (wrong := [name for name in verify(folder) if name not in but]):
        remedy = "restore them, or train again"
        raise DataError(f"was changed after it was finished: {', '.join(wrong[:4])}", str(folder), remedy)


def is_finished(recipe: Recipe) -> bool:
    """Whether the run directory holds the finished run of this very recipe."""
    folder = recipe.run_dir
    found = load_run_recipe(folder) if read_manifest(folder) is not None else None
    return found is not None and not changed_keys(found, recipe)


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys that make another run: all but those that only describe or track it."""
    return {
        key: values
        for key, values in difference(old, new).items()
        if key not in {"description", "output"} and not key.startswith("track")
    }


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads to the same recipe."""
    from ruamel.yaml import YAML

    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1000
    yaml.dump(recipe.resolved(), stream)
    return f"# Written by Retort: the recipe with every default filled in.\n{stream.getvalue()}"


def require_ours(folder: Path) -> None:
    """Refuse a folder with files that no run of ours wrote: a run removes and replaces what is in its way.

    Raises:
        RecipeError: it holds such files, or is a file itself.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError("is a file, and a run needs a folder", str(folder), "choose another output")
    if (folder / STATE).is_file() or not folder.is_dir():
        return
    prepared = {".lock", RECIPE, "data", "data.new", "data.html", "logs", *KEPT}  # what earlier stages leave
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in prepared)
    if foreign:
        names = ", ".join(foreign[:4]) + (" ..." if len(foreign) > 4 else "")
        raise RecipeError(f"holds files that are no run of Retort ({names})", str(folder), "choose another output")


def load_run_recipe(folder: Path) -> Recipe | None:
    """The resolved recipe that a run directory was made from; None where there is none."""
    path = folder / RECIPE
    if not path.is_file():
        return None
    try:
        return load_recipe(path)
    except RecipeError as error:
        raise RecipeError(f"holds a run whose recipe no longer loads ({error})", str(folder), "add --fresh") from None


def _has_trained(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return bool(list(folder.glob("checkpoints/checkpoint-*"))) or (metrics.is_file() and metrics.stat().st_size > 0)


def _id(folder: Path) -> str:
    return str(read_object(folder / STATE).get("id") or uuid.uuid4().hex[:12])


def _lock(folder: Path) -> Any:
    """The sole right to work in a run directory."""
    return hold(folder / ".lock", folder, "another process is at work in it", "wait for it, or choose another output")


def _move_aside(folder: Path, lock: Any, notes: list[str]) -> Any:
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.replace(folder, target)
    notes.append(f"the earlier run was moved to {target}")
    carry_over(target, folder)  # another learning rate is no reason to ask the teacher again
    if lock is not None:
        lock.close()
    return _lock(folder)


def carry_over(source: Path, target: Path) -> None:
    """Give a run directory the teacher's work of another one, where it has none of its own."""
    for name in KEPT:
        if (source / name).is_dir() and not (target / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=_copy)


def _copy(source: str, target: str) -> None:
    """A second name for what is only ever replaced whole; a copy of what is appended to."""
    try:
        if source.endswith(".parquet"):
            os.link(source, target)
            return
    except OSError:
        pass  # another file system, or one without links
    shutil.copy2(source, target)


def _clear(folder: Path) -> None:
    """Remove what a run without recipe.yaml may have left; prepared data stays, it has a manifest of its own."""
    for name in (*_WRITTEN_BY_TRAIN, MANIFEST):
        path = folder / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
