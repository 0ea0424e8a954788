"""Preparation as a Slurm array, on a real Slurm of two nodes; and as its tasks run one by one."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_cli, write_rows
from slurm import slurm, wait_for_jobs
from test_pipeline import chat, content, made_entries, texts

from data_prep.cluster import STAGES, Task
from data_prep.prepare import begin, judged_on, prepare
from recipes.errors import GateError
from recipes.load import load_recipe

DATA = {"steps": ["clean", "exact_dedup", {"near_dedup": {"threshold": 0.7}}], "too_long": "truncate"}


def sources(folder: Path) -> dict[str, object]:
    rows = [chat("x?", text) for text in texts(300, low=20, high=60)]
    paths = [write_rows(folder / f"{n}.jsonl", rows[n::4] + rows[:20]) for n in range(4)]
    return {**DATA, "train": [{"path": str(p), "limit": 1000} for p in paths]}


def test_tasks_in_any_order_make_the_same_data(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(make_recipe(data=sources(tmp_path)))
    alone = prepare(recipe, tmp_path / "alone")
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path / "shared"))
    for stage in STAGES:
        for rank in (2, 0, 1) if stage != "write" else (0,):
            before = made_entries(tmp_path / "shared")
            Task(recipe, tmp_path / "together", stage)(None, rank, 3 if stage != "write" else 1)
            made = len(made_entries(tmp_path / "shared")) - len(before)
            assert made == (0 if stage == "write" else 2 if rank == 0 else 1)
    together = prepare(recipe, tmp_path / "together")
    assert together.reused and content(together) == content(alone)


def test_tasks_trust_the_verdict_while_all_is_as_it_was(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    asked = sources(tmp_path)
    asked["train"] = [{**source, "license": "CC-BY-NC-4.0"} for source in asked["train"]]  # type: ignore[attr-defined]
    recipe = load_recipe(make_recipe(data=asked, use={"purpose": "commercial", "distribute": True}))
    out = tmp_path / "run"
    judged = judged_on(recipe, begin(recipe, out))
    with pytest.raises(GateError):
        Task(recipe, out, "read")(None)
    Task(recipe, out, "read", judged)(None, 0, 2)
    assert len(made_entries(tmp_path / ".retort-cache")) == 2
    with pytest.raises(GateError):  # what is written is judged by itself
        Task(recipe, out, "write", judged)(None)
    write_rows(tmp_path / "3.jsonl", [chat("x?", "y")])
    with pytest.raises(GateError):
        Task(recipe, out, "read", judged)(None, 1, 2)
    assert not (out / "data").exists() and len(made_entries(tmp_path / ".retort-cache")) == 2


def test_ray_that_is_missing_is_one_line(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'retort[cluster]'")
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("ray is installed")
    done = run_cli("prepare", str(make_recipe()), "--executor", "ray", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "ray is not installed" in done.stderr and "retort[ray]" in done.stderr


@pytest.mark.slow
def test_ray_makes_the_same_data(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'retort[ray]'")
    recipe = make_recipe(data=sources(tmp_path), output=str(tmp_path / "run"))
    done = run_cli("prepare", str(recipe), "--executor", "ray", "--tasks", "2", "--memory", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    together = prepare(load_recipe(recipe), tmp_path / "run")
    assert together.reused
    assert content(together) == content(prepare(load_recipe(recipe), tmp_path / "alone" / "run"))


@pytest.mark.slow
def test_a_slurm_array_makes_the_same_data(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'retort[cluster]'")
    recipe = make_recipe(data=sources(tmp_path), output=str(tmp_path / "run"))
    with slurm(tmp_path / "slurm") as environment:
        asked = ("prepare", str(recipe), "--executor", "slurm", "--tasks", "2")
        done = run_cli(*asked, cwd=tmp_path, env=environment)
        assert done.returncode == 2 and "Slurm wants a partition" in done.stderr
        done = run_cli(*asked, "--partition", "none", cwd=tmp_path, env=environment)
        assert done.returncode == 1 and "Slurm refuses the job" in done.stderr, done.stderr
        done = run_cli(*asked, "--partition", "main", "--memory", "2", cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("job ") == 3
        wait_for_jobs(environment, 240)
        states = subprocess.run(
            ["scontrol", "show", "job", "-o"], env=environment, capture_output=True, text=True
        ).stdout
        logs = "\n".join(p.read_text()[-2000:] for p in (tmp_path / "run").rglob("*.out"))
        assert (tmp_path / "run" / "data" / "manifest.json").is_file(), f"{states}\n{logs}"
        nodes = {part for line in states.splitlines() for part in line.split() if part.startswith("NodeList=n")}
        assert {"NodeList=n1", "NodeList=n2"} <= nodes, states
    together = prepare(load_recipe(recipe), tmp_path / "run")
    assert together.reused
    assert content(together) == content(prepare(load_recipe(recipe), tmp_path / "alone" / "run"))
