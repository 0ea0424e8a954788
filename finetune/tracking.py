"""Weights & Biases: metrics under stable names, the resolved recipe as config, report and manifest as an artefact."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

from recipes.errors import RecipeError
from recipes.schema import Recipe, Wandb

NAMES = {
    "tokens_per_second": "speed/tokens_per_second",
    "memory_bytes": "memory/peak_bytes",
    "divergence": "teacher/divergence",
    "token_loss": "teacher/token_loss",
    "head_mass": "teacher/head_mass",
    "student_head_mass": "teacher/student_head_mass",
    "agreement": "teacher/agreement",
    "calibration_error": "teacher/calibration_error",
    "matched_loss": "teacher/matched_loss",
    "unmatched_loss": "teacher/unmatched_loss",
}
OWN = {"step", "seconds"}  # wandb has its own
FOLDERS = {"eval_": "eval/", "reward/": "rewards/"}


def name_of(key: str) -> str:
    """The name of a series of metrics.jsonl in the dashboard: by kind, else under train/."""
    if key in NAMES:
        return NAMES[key]
    start = next((start for start in FOLDERS if key.startswith(start)), "")
    return FOLDERS.get(start, "train/") + key.removeprefix(start)


class Tracker:
    """One wandb run; does nothing where the recipe names none."""

    def __init__(self, run: Any = None) -> None:
        self.run = run

    def log(self, entry: dict[str, Any]) -> None:
        """Log one line of metrics.jsonl."""
        if self.run is not None:
            values = {name_of(k): v for k, v in entry.items() if k not in OWN and v is not None}
            self.run.log(values, step=entry["step"])

    def finish(self, result: dict[str, Any] | None, files: list[Path]) -> None:
        """Put the evaluation into the summary, attach the files, and close the run."""
        if self.run is None:
            return
        import wandb

        for name, metric in (result or {}).get("metrics", {}).items():
            for who in (one for one in ("base", "tuned", "teacher") if one in metric):
                self.run.summary[f"eval/{name}/{who}"] = metric[who]["value"]
            self.run.summary[f"eval/{name}/p_value"] = metric["p_value"]
        artifact = wandb.Artifact(f"{self.run.project}-{self.run.id}", type="run")
        for path in files:
            if path.is_file():
                artifact.add_file(str(path), name=path.name)
        self.run.log_artifact(artifact)
        self.run.finish()
        self.run = None


def choose_mode(recipe: Recipe) -> str | None:
    """`online`, `offline` or `disabled`; None where the recipe names no wandb. `auto` is offline without a key.

    Raises:
        RecipeError: the recipe pins `online` and no key is configured.
    """
    ask = recipe.track.wandb
    if ask is None:
        return None
    mode = ask.mode if ask.mode != "auto" else os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode == "online" and not _has_key():
        raise RecipeError("no wandb key is configured", "track.wandb.mode", "run wandb login, or set it to offline")
    return mode


def start(recipe: Recipe, run_dir: Path, run_id: str) -> Tracker:
    """Open the wandb run that a recipe names; `auto` falls back to offline where the server cannot be reached.

    Raises:
        RecipeError: the recipe pins `online` and no key is configured, or wandb refuses.
    """
    ask, mode = recipe.track.wandb, choose_mode(recipe)
    if ask is None or mode is None:
        return Tracker()
    try:
        return _open(ask, recipe, run_dir, run_id, mode)
    except RecipeError as error:
        if ask.mode != "auto" or mode != "online":
            raise
        print(f"{error.message}; tracking goes on offline (wandb sync sends it later)", flush=True)
        return _open(ask, recipe, run_dir, run_id, "offline")


def _open(ask: Wandb, recipe: Recipe, run_dir: Path, run_id: str, mode: str) -> Tracker:
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_stats=False)
    try:
        run = wandb.init(
            project=ask.project,
            entity=ask.entity,
            name=ask.name or recipe.name,
            tags=list(ask.tags),
            config=recipe.resolved(),
            dir=str(run_dir),
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
        )
    except Exception as error:  # network, permissions, quota: a run must not start half tracked
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"wandb cannot start: {reason}", "track.wandb", "set mode: offline to track later") from None
    return Tracker(run)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts if os.environ.get("NETRC") else netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
