"""A recipe's trainer, built in this process by the same stages that a run goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.assemble import read_rows
from data_prep.prepare import prepare
from finetune import stages
from finetune.arguments import Job
from finetune.layout import Layout, find_device
from finetune.trainers import BUILDERS
from recipes.load import load_recipe
from recipes.schema import Recipe


@dataclass
class Built:
    recipe: Recipe
    layout: Layout
    rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    known: list[float]
    trainer: Any
    tokenizer: Any


def built(path: Path, *overrides: str, callbacks: Sequence[Any] = ()) -> Built:
    recipe = load_recipe(path, list(overrides))
    folder = recipe.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(recipe, folder)
    device = find_device("cpu")
    layout = stages.write_layout(recipe, device, prepared, folder)
    rows, held_out = read_rows(prepared.folder, "train"), read_rows(prepared.folder, "eval")
    model = stages.load(recipe, prepared.tokenizer, device)
    known = stages.reference(recipe, layout, prepared.tokenizer, model, rows)
    job = Job(recipe, layout, prepared.tokenizer, model, rows, folder, callbacks, known)
    trainer = BUILDERS[recipe.method.key](job)
    return Built(recipe, layout, rows, held_out, known, trainer, prepared.tokenizer)


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def adapter_of(trainer: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def run_losses(path: Path, *overrides: str) -> list[float]:
    trainer = built(path, *overrides).trainer
    trainer.train()
    return logged(trainer)
