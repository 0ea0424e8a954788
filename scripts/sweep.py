"""`retort sweep SWEEP.yaml`: a recipe under several settings, one process a trial, and the best trial with its luck.

    recipe: legal.yaml          # beside the sweep file
    metric: token_f1            # of eval.metrics; goal: max or min, by default what is better
    grid:                       # all combinations; or random: {n: 20, seed: 1, ranges: {KEY: {low, high, scale: log}}}
      train.learning_rate: [1e-4, 2e-4]
      adapter.r: [8, 32]

Trials lie in RUNS/sweep/NAME/ and share the cache of prepared data with the recipe's own run. A rerun skips those that
are finished.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, get_args

from recipes.errors import RecipeError, RetortError
from recipes.lineage import sha256_json, write_atomic
from recipes.load import load_recipe
from recipes.schema import Metric, Recipe
from recipes.yamltree import Tree, read_yaml

KEYS = ("name", "recipe", "metric", "goal", "grid", "random")
RANDOM_KEYS = ("n", "seed", "ranges")
RANGE_KEYS = ("low", "high", "scale", "integer")
LOWER_IS_BETTER = {"loss", "perplexity"}
MOST_TRIALS = 1000
_NOT_SWEPT = {"output", "name", "extends", "attest", "schema_version"}
Setting = tuple[tuple[str, Any], ...]  # (key of the recipe, value), in the order of the file


@dataclass
class Trial:
    """One setting of a sweep.

    Attributes:
        result: value, low, high of the metric, and p_value against the base; None until it is finished.
        failed: the last line that a trial which ended badly printed.
    """

    setting: Setting
    recipe: Recipe
    result: dict[str, float] | None = None
    failed: str | None = None

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def words(self) -> str:
        return "  ".join(f"{key}={_short(value)}" for key, value in self.setting)


@dataclass
class Sweep:
    """A sweep file, checked: every trial's recipe loads."""

    name: str
    path: Path
    recipe: Recipe
    metric: str
    goal: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir.parent / "sweep" / self.name

    def ranked(self) -> list[Trial]:
        """Finished trials, the best first."""
        done = [trial for trial in self.trials if trial.result is not None]
        sign = 1 if self.goal == "min" else -1
        return sorted(done, key=lambda trial: sign * (trial.result or {})["value"])


def read_sweep(path: Path) -> Sweep:
    """Load a sweep file, and the recipe of every trial, so that a typo fails before the first trial.

    Raises:
        RecipeError: an unknown key, a value of the wrong kind, a trial whose recipe does not load, a metric that the
            recipe does not measure.
    """
    tree = read_yaml(path)
    known = _map(tree, (), KEYS)
    for key in ("recipe", "metric"):
        if not isinstance(known.get(key), str):
            raise RecipeError(f"the key '{key}' is missing or no text", tree.place(()), f"write {key}: ...")
    name = known.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RecipeError("is no name for a folder", tree.place(("name",)), "use letters, digits, dots and dashes")
    base = (path.parent / Path(known["recipe"]).expanduser()).resolve()
    recipe = load_recipe(base)
    metric, goal = known["metric"], known.get("goal")
    _require_choice(metric, get_args(Metric), tree, ("metric",))
    if goal is None:
        goal = "min" if metric in LOWER_IS_BETTER else "max"
    _require_choice(goal, ("min", "max"), tree, ("goal",))
    sweep = Sweep(name, base, recipe, metric, goal)
    if ("grid" in known) == ("random" in known):
        raise RecipeError("a sweep has either grid or random", tree.place(()), "write one of the two")
    for setting in _grid(tree) if "grid" in known else _random(tree):
        sweep.trials.append(_trial(sweep, setting, tree))
    for trial in sweep.trials:
        if metric not in trial.recipe.eval.metrics or trial.recipe.data.eval is None:
            measured = ", ".join(trial.recipe.eval.metrics) if trial.recipe.data.eval is not None else "nothing"
            remedy = "name one of them, or add it to eval.metrics of the recipe"
            raise RecipeError(f"the recipe measures {measured}, not {metric}", tree.place(("metric",)), remedy)
    return sweep


def _map(tree: Tree, path: tuple[str, ...], keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The map at a place, with no other keys than these."""
    value = tree.value
    for part in path:
        value = value[part]
    if not isinstance(value, dict) or not value:
        raise RecipeError(
            f"{'.'.join(path) or 'a sweep'} is a map of keys", tree.place(path), "see retort sweep --help"
        )
    for key in value:
        if keys is not None and key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"valid keys here: {', '.join(keys)}"
            raise RecipeError(f"unknown key '{'.'.join((*path, key))}'", tree.place((*path, key)), hint)
    return value


def _require_choice(value: Any, options: Sequence[str], tree: Tree, path: tuple[str, ...]) -> None:
    if value not in options:
        close = difflib.get_close_matches(str(value), options, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(options)}"
        raise RecipeError(f"'{'.'.join(path)}': {value!r} is not known", tree.place(path), hint)


def _grid(tree: Tree) -> Iterator[Setting]:
    grid, total = _map(tree, ("grid",)), 1
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"'grid.{key}' should be a list of values", tree.place(("grid", key)), "write [a, b]")
        total *= len(values)
    _require_few(total, tree, "grid")
    yield from (tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _random(tree: Tree) -> Iterator[Setting]:
    asked = _map(tree, ("random",), RANDOM_KEYS)
    number, seed = asked.get("n"), asked.get("seed", 0)
    for key, value in (("n", number), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool) or value < (1 if key == "n" else 0):
            raise RecipeError(f"'random.{key}' should be a whole number", tree.place(("random", key)), "write n: 20")
    if "ranges" not in asked:
        raise RecipeError("the key 'random.ranges' is missing", tree.place(("random",)), "write ranges: {KEY: [a, b]}")
    ranges = _map(tree, ("random", "ranges"))
    draws = {key: _draw(tree, key, value) for key, value in ranges.items()}
    _require_few(int(number or 0), tree, "random")
    dice = random.Random(seed)
    for _ in range(int(number or 0)):
        yield tuple((key, draw(dice)) for key, draw in draws.items())


def _draw(tree: Tree, key: str, value: Any) -> Callable[[random.Random], Any]:
    """What draws a value: one of a list, or a number between two ends."""
    path = ("random", "ranges", key)
    if isinstance(value, list) and value:
        return lambda dice: dice.choice(value)
    asked = _map(tree, path, RANGE_KEYS)
    ends = [asked.get("low"), asked.get("high")]
    _require_choice(scale := asked.get("scale", "linear"), ("linear", "log"), tree, (*path, "scale"))
    if any(not isinstance(end, int | float) or isinstance(end, bool) for end in ends):
        raise RecipeError(f"'{'.'.join(path)}' needs the numbers low and high", tree.place(path), "or a list of values")
    low, high = (float(end) for end in ends if end is not None)
    if low > high or (scale == "log" and low <= 0):
        ends_words = "0 < low <= high" if scale == "log" else "low <= high"
        raise RecipeError(f"'{'.'.join(path)}' needs {ends_words}", tree.place(path))

    def draw(dice: random.Random) -> float | int:
        drawn = math.exp(dice.uniform(math.log(low), math.log(high))) if scale == "log" else dice.uniform(low, high)
        return round(drawn) if asked.get("integer") else float(f"{drawn:.4g}")

    return draw


def _require_few(number: int, tree: Tree, where: str) -> None:
    if number > MOST_TRIALS:
        raise RecipeError(f"these are {number:,} trials, more than {MOST_TRIALS:,}", tree.place((where,)), "try fewer")


def _trial(sweep: Sweep, setting: Setting, tree: Tree) -> Trial:
    for key, _ in setting:
        if key.split(".")[0] in _NOT_SWEPT:
            raise RecipeError(f"'{key}' is not to be swept", _place(tree, key), "a trial differs in how it trains")
    try:
        recipe = load_recipe(sweep.path, overrides(setting, sweep.folder))
    except RecipeError as error:
        places = [_place(tree, key) for key, _ in setting if error.place == f"--set {key}"]
        raise RecipeError(error.message, places[0] if places else error.place, error.remedy) from None
    return Trial(setting, recipe)


def _place(tree: Tree, key: str) -> str:
    return next(place for path, place in tree.places.items() if path and path[-1] == key)


def overrides(setting: Setting, folder: Path) -> list[str]:
    """A setting as `--set` texts; its output is named by its values."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(f"{k.rsplit('.', 1)[-1]}-{_short(v)}" for k, v in setting))
    output = folder / f"{words[:60]}-{sha256_json(dict(setting))[:6]}"
    return [*(f"{key}={json.dumps(value)}" for key, value in setting), f"output={json.dumps(str(output))}"]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def run_sweep(sweep: Sweep, say: Callable[[str], None] = print) -> Sweep:
    """Run the trials that are not finished, one after the other, each in a process of its own.

    A trial that fails is told, and the others go on. sweep.json in the sweep's folder holds what is known so far.
    """
    from finetune.runs import is_finished

    for number, trial in enumerate(sweep.trials, 1):
        again = is_finished(trial.recipe)
        say(f"trial {number} of {len(sweep.trials)}: {trial.words}{' (finished before)' if again else ''}")
        if not again:
            trial.failed = run_trial(sweep, trial)
        trial.result = None if trial.failed else _result(trial.folder, sweep.metric)
        if trial.result is None:
            trial.failed = trial.failed or "it left no eval.json with this metric"
            say(f"  failed: {trial.failed}")
        else:
            say(f"  {sweep.metric} {_interval(trial.result)}")
        write_atomic(sweep.folder / "sweep.json", json.dumps(as_dict(sweep), indent=2) + "\n")
    return sweep


def run_trial(sweep: Sweep, trial: Trial) -> str | None:
    """Run one trial; returns what it died of, None where it did not. What it prints is in FOLDER.log."""
    import finetune
    from data_prep.cache import cache_folder
    from finetune.runs import carry_over

    carry_over(sweep.recipe.run_dir, trial.folder)  # trials learn from what the recipe's teacher wrote once
    options = [part for text in overrides(trial.setting, sweep.folder) for part in ("--set", text)]
    script = Path(str(finetune.__file__)).parent / "train.py"
    # A trial is no part of the sweep of wandb that asked for it: its own tracking, if any, is a run of its own.
    env = {k: v for k, v in os.environ.items() if k not in {"WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"}}
    env.setdefault("RETORT_CACHE", str(cache_folder(sweep.recipe.run_dir).absolute()))
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    log = trial.folder.with_name(trial.folder.name + ".log")
    with log.open("w", encoding="utf-8") as stream:
        command = [sys.executable, str(script), str(sweep.path), *options]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    if done.returncode == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was printed"]
    return f"exit {done.returncode}: {lines[-1].removeprefix('error: ')} (see {log})"


def _result(folder: Path, metric: str) -> dict[str, float] | None:
    try:
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["metrics"][metric]
        return {**{end: float(found["tuned"][end]) for end in ("value", "low", "high")}, "p_value": found["p_value"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_dict(sweep: Sweep) -> dict[str, Any]:
    trials = [
        {"set": dict(t.setting), "folder": str(t.folder), "result": t.result, "failed": t.failed} for t in sweep.trials
    ]
    return {"name": sweep.name, "recipe": str(sweep.path), "metric": sweep.metric, "goal": sweep.goal, "trials": trials}


def luck(result: dict[str, float], confidence: float, number: int) -> float:
    """How much better the best of so many equal trials would look than it is, by chance alone.

    The expected maximum of n normal draws (Blom's approximation) times the standard error that the interval implies.
    Trials are measured on the same rows, so their errors go together and the true figure is smaller.
    """
    if number < 2:
        return 0.0
    error = (result["high"] - result["low"]) / (2 * NormalDist().inv_cdf(0.5 + confidence / 2))
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) * error


def describe(sweep: Sweep) -> str:
    """The trials as a table, the best first, and how far to believe it."""
    ranked = sweep.ranked()
    failed = [trial for trial in sweep.trials if trial.failed]
    if not ranked:
        return (
            f"no trial of {len(sweep.trials)} ended well; the first failed with {failed[0].failed if failed else '-'}"
        )
    number = len(ranked)
    table = [["", "trial", sweep.metric, f"p x {number}"]]
    for place, trial in enumerate(ranked, 1):
        assert trial.result is not None
        corrected = min(1.0, trial.result["p_value"] * number)
        table.append([str(place), trial.words, _interval(trial.result), f"{corrected:.4f}"])
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    best = ranked[0]
    assert best.result is not None
    close = [t for t in ranked[1:] if t.result and _overlap(t.result, best.result)]
    lines += [f"best: {best.words} ({best.folder})"]
    if number > 1:
        more = luck(best.result, best.recipe.eval.confidence, number)
        lines += [
            f"its interval overlaps those of {len(close)} of the others; p is of base against tuned, times {number} "
            "trials (Bonferroni)",
            f"the best of {number} looks better than it is: {number} equal trials would differ so by up to {more:.2g} "
            f"by luck; measure it on rows that no trial was chosen by before you rely on it",
        ]
    lines += [f"{len(failed)} of {len(sweep.trials)} trials failed"] if failed else []
    return "\n".join(lines)


def _interval(result: dict[str, float]) -> str:
    return f"{result['value']:.4f} [{result['low']:.4f}, {result['high']:.4f}]"


def _overlap(a: dict[str, float], b: dict[str, float]) -> bool:
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def run_in_wandb(sweep: Sweep, say: Callable[[str], None] = print) -> Sweep:
    """The same trials as a sweep of wandb's, which keeps them and draws them; an agent here runs them.

    Raises:
        RecipeError: no project is named, or there is no server to talk to.
    """
    from finetune.tracking import choose_mode

    ask = sweep.recipe.track.wandb
    if ask is None or choose_mode(sweep.recipe) != "online":
        remedy = "name track.wandb.project and run wandb login, or leave --wandb out"
        raise RecipeError("a sweep of wandb's needs a project and a key", "track.wandb", remedy)
    import wandb

    names = [key for key, _ in sweep.trials[0].setting]
    goal = {"min": "minimize", "max": "maximize"}[sweep.goal]
    # The trials are ours, drawn and checked: wandb goes through their numbers, whichever way they were drawn.
    plan = {
        "name": sweep.name,
        "method": "grid",
        "metric": {"name": sweep.metric, "goal": goal},
        "parameters": {"trial": {"values": list(range(len(sweep.trials)))}},
    }

    def one() -> None:
        with wandb.init(group=sweep.name, job_type="trial") as run:
            trial = sweep.trials[int(run.config["trial"])]
            run.config.update(dict(trial.setting))
            trial.failed = run_trial(sweep, trial)
            trial.result = None if trial.failed else _result(trial.folder, sweep.metric)
            if trial.result is None:
                raise RetortError(trial.failed or "it left no eval.json", trial.words)
            run.summary[sweep.metric] = trial.result["value"]
            run.summary.update({f"{sweep.metric}_{end}": trial.result[end] for end in ("low", "high")})

    say(f"sweeping {', '.join(names)}: {len(sweep.trials)} trials")
    wandb.agent(wandb.sweep(plan, project=ask.project, entity=ask.entity), function=one, count=len(sweep.trials))
    return sweep
