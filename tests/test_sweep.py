"""`retort sweep`: a typo fails before the first trial, trials share what they can, and a rerun does what is left."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from recipes.errors import RecipeError
from scripts import sweep as sweeps

TRAIN = {"tokens_per_step": 512, "seq_len": 128, "learning_rate": 5e-3, "max_steps": 2, "device": "cpu"}


def write_sweep(folder: Path, **keys: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(json.dumps({"recipe": "recipe.yaml", "metric": "loss", **keys}), encoding="utf-8")
    return path


def run_sweep(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.cli", "sweep", str(path), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("RETORT_CACHE", None)
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent, env=env, timeout=550)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grd": {"adapter.r": [4]}}, "unknown key 'grd'; did you mean 'grid'?"),
        ({"grid": {"train.lerning_rate": [1e-4]}}, "'train.lerning_rate'; did you mean 'train.learning_rate'?"),
        ({"grid": {"adapter.r": [4, "x"]}}, "'adapter.r': should be a whole number, not 'x'"),
        ({"grid": {"adapter.r": 4}}, "'grid.adapter.r' should be a list of values"),
        ({"grid": {"output": ["a"]}}, "'output' is not to be swept"),
        ({"grid": {"adapter.r": list(range(1, 1002))}}, "1,001 trials, more than 1,000"),
        ({"metric": "token_f", "grid": {"adapter.r": [4]}}, "'token_f' is not known; did you mean 'token_f1'?"),
        ({"metric": "reward", "grid": {"adapter.r": [4]}}, "the recipe measures loss, perplexity"),
        ({"goal": "maximum", "grid": {"adapter.r": [4]}}, "did you mean 'max'?"),
        ({}, "either grid or random"),
        ({"grid": {"adapter.r": [4]}, "random": {"n": 1}}, "either grid or random"),
        ({"random": {"n": 0, "ranges": {"adapter.r": [4]}}}, "'random.n' should be a whole number"),
        ({"random": {"n": 2}}, "the key 'random.ranges' is missing"),
        ({"random": {"n": 2, "ranges": {"adapter.r": {"low": 9, "hihg": 2}}}}, "did you mean 'high'?"),
        ({"random": {"n": 2, "ranges": {"adapter.r": {"low": 9, "high": 2}}}}, "needs low <= high"),
        ({"random": {"n": 2, "ranges": {"adapter.r": {"low": 0, "high": 2, "scale": "log"}}}}, "needs 0 < low <= high"),
        ({"recipe": "none.yaml", "grid": {"adapter.r": [4]}}, "no such recipe file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    make_recipe: Callable[..., Path], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    make_recipe()
    with pytest.raises(RecipeError) as caught:
        sweeps.read_sweep(write_sweep(tmp_path, **keys))
    assert message in str(caught.value) and ".yaml" in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_a_grid_has_all_combinations_in_folders_of_their_own(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make_recipe()
    sweep = sweeps.read_sweep(write_sweep(tmp_path, grid={"train.learning_rate": [1e-4, 2e-4], "adapter.r": [4, 8]}))
    found = [(t.recipe.train.learning_rate, t.recipe.adapter.r) for t in sweep.trials if t.recipe.adapter]
    assert found == [(1e-4, 4), (1e-4, 8), (2e-4, 4), (2e-4, 8)]
    folders = {t.folder for t in sweep.trials}
    assert len(folders) == 4 and {f.parent for f in folders} == {tmp_path / "sweep" / "sweep"}
    assert sweep.goal == "min", "a lower loss is better"
    other = sweeps.read_sweep(write_sweep(tmp_path, metric="token_f1", grid={"adapter.r": [4]}))
    assert other.goal == "max" and other.trials[0].recipe.adapter is not None


def test_random_settings_stay_in_their_ranges_and_the_seed_repeats_them(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    make_recipe()
    ranges = {
        "train.learning_rate": {"low": 1e-5, "high": 1e-1, "scale": "log"},
        "adapter.r": {"low": 2, "high": 64, "integer": True},
        "train.schedule": ["cosine", "linear"],
    }
    path = write_sweep(tmp_path, random={"n": 200, "seed": 7, "ranges": ranges})
    settings = [dict(t.setting) for t in sweeps.read_sweep(path).trials]
    assert settings == [dict(t.setting) for t in sweeps.read_sweep(path).trials]
    rates = [s["train.learning_rate"] for s in settings]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    below = sum(rate < 1e-3 for rate in rates)  # the middle of the range on a log scale
    assert 70 <= below <= 130
    assert {s["train.schedule"] for s in settings} == {"cosine", "linear"}
    assert all(isinstance(s["adapter.r"], int) and 2 <= s["adapter.r"] <= 64 for s in settings)
    another = write_sweep(tmp_path, random={"n": 200, "seed": 8, "ranges": ranges})
    assert settings != [dict(t.setting) for t in sweeps.read_sweep(another).trials]


def finished(sweep: sweeps.Sweep, values: list[float], p_value: float = 0.02) -> sweeps.Sweep:
    for trial, value in zip(sweep.trials, values, strict=True):
        trial.result = {"value": value, "low": value - 0.196, "high": value + 0.196, "p_value": p_value}
    return sweep


def test_the_table_ranks_by_the_goal_and_says_how_far_to_believe_it(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    make_recipe()
    path = write_sweep(tmp_path, grid={"adapter.r": [2, 4, 8, 16]})
    lowest = finished(sweeps.read_sweep(path), [1.0, 0.9, 2.0, 3.0])
    assert [dict(t.setting)["adapter.r"] for t in lowest.ranked()] == [4, 2, 8, 16]
    lines = sweeps.describe(lowest).splitlines()
    assert lines[1].split() == ["1", "adapter.r=4", "0.9000", "[0.7040,", "1.0960]", "0.0800"], "p 0.02 times 4"
    assert "best: adapter.r=4" in lines[5] and "overlaps those of 1 of the others" in lines[6]
    # The expected best of four normal draws lies 1.03 standard errors (0.1 here) from their mean.
    assert "4 equal trials would differ so by up to 0.1 by luck" in lines[7]
    highest = finished(sweeps.read_sweep(write_sweep(tmp_path, goal="max", grid={"adapter.r": [2, 4]})), [1.0, 2.0])
    assert dict(highest.ranked()[0].setting) == {"adapter.r": 4}
    (alone,) = finished(sweeps.read_sweep(write_sweep(tmp_path, grid={"adapter.r": [2]})), [1.0]).trials
    assert alone.result is not None and sweeps.luck(alone.result, 0.95, 1) == 0.0


def test_the_luck_of_the_best_of_many_is_that_of_normal_draws() -> None:
    interval = {"value": 0.0, "low": -1.959964, "high": 1.959964}  # a standard error of 1 at 95 %
    # Expected maxima of n standard normal draws (Harter 1961, table 1).
    for number, expected in ((2, 0.5642), (4, 1.0294), (10, 1.5388), (100, 2.5076)):
        assert math.isclose(sweeps.luck(interval, 0.95, number), expected, rel_tol=0.05)


def test_a_sweep_of_wandbs_needs_a_server(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    for track in ({}, {"track": {"wandb": {"project": "p", "mode": "offline"}}}):
        make_recipe(**track)
        done = run_sweep(write_sweep(tmp_path, grid={"adapter.r": [4]}), "--wandb")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "a sweep of wandb's needs a project and a key" in done.stderr


@pytest.mark.slow
def test_a_grid_of_four_runs_and_a_rerun_does_what_is_left(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make_recipe(train=TRAIN)
    # Longer rows than the model has positions: that shows only when a trial runs, and the others go on.
    path = write_sweep(tmp_path, name="rows", grid={"train.seq_len": [128, 999], "adapter.r": [2, 4]})
    first = run_sweep(path)
    assert first.returncode == 0, first.stdout + first.stderr
    lines = first.stdout.splitlines()
    assert [line for line in lines if line.startswith("trial ")] == [
        f"trial {i} of 4: train.seq_len={length}  adapter.r={r}"
        for i, (length, r) in enumerate([(128, 2), (128, 4), (999, 2), (999, 4)], 1)
    ]
    assert first.stdout.count("  failed: exit 2: train.seq_len: 999 tokens are more than the context") == 2
    assert "2 of 4 trials failed" in lines[-1]
    known = json.loads((tmp_path / "sweep" / "rows" / "sweep.json").read_text())
    values = [trial["result"] and trial["result"]["value"] for trial in known["trials"]]
    assert values[2:] == [None, None]
    best = min((0, 1), key=lambda i: values[i])
    measured = json.loads((Path(known["trials"][best]["folder"]) / "eval.json").read_text())
    assert measured["metrics"]["loss"]["tuned"]["value"] == values[best]
    assert f"best: train.seq_len=128  adapter.r={(2, 4)[best]}" in first.stdout

    # All trials read the rows that the first one prepared: one entry of each kind in the recipe's own cache.
    cache = tmp_path / ".retort-cache"
    assert [len(list((cache / kind).glob("??/*"))) for kind in ("rows", "tokens")] == [1, 1]
    assert not list((tmp_path / "sweep").rglob(".retort-cache"))

    # One finished trial is lost; the other is left as it is.
    folders = [Path(trial["folder"]) for trial in known["trials"]]
    kept = (folders[0] / "manifest.json").read_bytes()
    shutil.rmtree(folders[1])
    again = run_sweep(path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(finished before)") == 1 and (folders[0] / "manifest.json").read_bytes() == kept
    repeated = json.loads((tmp_path / "sweep" / "rows" / "sweep.json").read_text())
    assert [trial["result"] and trial["result"]["value"] for trial in repeated["trials"]] == values
