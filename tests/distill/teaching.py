"""A small distillation with the embedded models, run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.generate import generate
from recipes.lineage import sha256_files
from recipes.load import load_recipe
from recipes.schema import Recipe

PROMPTS = 24


def recipe_file(folder: Path, **sections: Any) -> Path:
    """A recipe whose teacher and student ship with Retort; keyword arguments replace whole sections."""
    teacher = {"model": "embedded:tiny-teacher", "sampling": {"max_tokens": 32}}
    content = {
        "name": "taught",
        "output": str(folder / "run"),
        "model": {"base": "embedded:tiny"},
        "adapter": {"r": 8},
        "data": {
            "train": [{"embedded": "legal", "limit": PROMPTS}],
            "eval": [{"embedded": "legal", "split": "heldout", "limit": 12}],
        },
        "method": {"type": "distill"},
        "train": {"tokens_per_step": 512, "seq_len": 352, "learning_rate": 3e-3, "max_steps": 4, "device": "cpu"},
        "eval": {"samples": 6, "max_new_tokens": 16, "resamples": 200, "metrics": ["exact_match", "loss"]},
        **sections,
        "teacher": teacher | sections.get("teacher", {}),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


def taught(path: Path, *overrides: str, **options: Any) -> tuple[Recipe, dict[str, Any], list[str]]:
    """Run the stage; returns the recipe, its figures and what it said."""
    said: list[str] = []
    recipe = load_recipe(path, list(overrides))
    return recipe, generate(recipe, say=said.append, **options), said


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rows_of(recipe: Recipe, name: str = "rows") -> list[dict[str, Any]]:
    return [row for path in sorted((recipe.run_dir / "teacher" / name).glob("*.jsonl")) for row in lines(path)]


def results(recipe: Recipe) -> dict[str, str]:
    """Hashes of what the stage leaves for the student, by file name."""
    folder = recipe.run_dir / "teacher"
    kept = [
        f"{p.parent.name}/{p.name}" for name in ("rows", "heldout") for p in sorted((folder / name).glob("*.jsonl"))
    ]
    return sha256_files(folder, [*kept, "answers.jsonl", "rejected.jsonl"])
