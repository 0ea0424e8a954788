"""Where a model folder says that it comes from: paths in configurations, plans of merges, the run it is part of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from recipes.cards import names_in
from recipes.facts import facts
from recipes.findings import Found

MERGED = ("model", "base_model", "source_model")  # keys under which mergekit names a model
MERGES = ("mergekit_config.yml", "mergekit_config.yaml", "mergekit_moe_config.yml", "mergekit_moe_config.yaml")


def merged_models(folder: Path, found: Found) -> list[str]:
    """The models that mergekit says it merged, or made experts of."""
    merged: list[str] = []
    for plan in (folder / name for name in MERGES if (folder / name).is_file()):
        try:
            stack: list[Any] = [yaml.safe_load(found.read(plan))]
        except (yaml.YAMLError, ValueError, RecursionError):
            found.doubt("block", f"{plan.name} cannot be read", plan.name, "restore the file", unknown=True)
            continue
        while stack:
            part = stack.pop()
            if isinstance(part, dict):
                merged += [name for key in MERGED if key in part for name in _merged(part[key])]
                stack += [value for key, value in part.items() if key not in MERGED]
            elif isinstance(part, list):
                stack += part
    return list(dict.fromkeys(merged))


def _merged(value: Any) -> list[str]:
    """The models in a value of a merge: a name, `base+adapter`, or an object with path and revision."""
    if isinstance(value, dict):
        inner = [name for key in (*MERGED, "path", "lora") if key in value for name in _merged(value[key])]
        revision = value.get("revision")
        return [f"{inner[0]}@{revision}"] if "path" in value and revision and len(inner) == 1 else inner
    return [name.strip() for text in names_in(value) for name in text.split("+") if name.strip()]


def names_in_path(origin: str) -> list[str]:
    """What a path may name, the surest first: `hub/models--org--name/snapshots/...`, `org/name`, `.../org/name`, or the
    name of a folder, that of a checkpoint's run included."""
    parts = [part for part in re.split(r"[\\/]+", origin.strip()) if part not in {"", ".", ".."}]
    if cached := [p.removeprefix("models--").replace("--", "/", 1) for p in parts if p.startswith("models--")]:
        return cached
    pair = "/".join(parts[-2:])
    if len(parts) == 2 and not origin.startswith(("/", ".", "~")):
        return [pair]
    return [*([pair] if facts().model(pair) else []), *reversed(parts[-2:])]


def artefact_around(folder: Path) -> list[tuple[Path, str]]:
    """Where the manifest of a folder may stand, and what the names of its files then begin with: in it; for the model,
    the adapter or a checkpoint of a run in the run; of a run that has not ended in its prepared data."""
    here = folder.absolute()
    places = [(folder, "")]
    if here.name in {"model", "adapter"}:
        places += [(here.parent, f"{here.name}/"), (here.parent / "data", "")]
    elif here.parent.name == "checkpoints":
        places += [(here.parent.parent, f"checkpoints/{here.name}/"), (here.parent.parent / "data", "")]
    return places
