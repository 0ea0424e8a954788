"""The stages of a recipe as jobs of a real Slurm: in order, disturbed, failed, and on a cluster in disorder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, colour_rows, run_train, write_rows
from slurm import command, queued, slurm, wait_for_jobs, wait_until

from recipes.lineage import read_manifest, sha256_files
from scripts.slurm import FOLDER
from scripts.status import last_words, status

Cluster = dict[str, str]
TRAIN = {
    "tokens_per_step": 256,
    "seq_len": 128,
    "learning_rate": 5e-3,
    "max_steps": 80,
    "save_every": 500,  # none but those that a warning causes
    "micro_batch": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm") / "c") as environment:
        yield {**environment, "OMP_NUM_THREADS": "1"}


def submitted(cluster: Cluster, recipe: Path, *options: str) -> dict[str, str]:
    """Submit through the command; returns the jobs by stage."""
    done = attempt(cluster, recipe, *options)
    assert done.returncode == 0, done.stderr
    return {stage: job for job, stage in re.findall(r"^job (\d+): (\w+)$", done.stdout, re.M)}


def attempt(cluster: Cluster, recipe: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "scripts.cli", "submit", str(recipe), *options]
    return subprocess.run(words, env=cluster, cwd=recipe.parent, capture_output=True, text=True, timeout=100)


def told(cluster: Cluster, run: Path) -> str:
    words = [sys.executable, "-m", "scripts.cli", "status", str(run)]
    done = subprocess.run(words, env=cluster, cwd=run.parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logs(run: Path) -> str:
    return "\n".join(f"== {p.name}\n{p.read_text()[-2500:]}" for p in sorted((run / FOLDER).glob("*.log")))


def last_step(run: Path) -> int:
    try:
        return max((json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()), default=0)
    except (OSError, ValueError):
        return 0


def disturb(cluster: Cluster, run: Path, job: str) -> int:
    """Warn the training job in the middle of its run, as before a time limit; returns its last step."""
    wait_until(lambda: last_step(run) >= 5, 120, "step 5", lambda: logs(run))
    command(cluster, "scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: (run / "stopped.json").is_file(), 60, "the stop", lambda: logs(run))
    step = int(json.loads((run / "stopped.json").read_text())["step"])
    assert 5 <= step < TRAIN["max_steps"]
    assert (run / "checkpoints" / f"checkpoint-{step}" / "retort.json").is_file()
    return step


@pytest.mark.slow
def test_a_warned_and_a_requeued_training_ends_with_the_same_bits(
    make_recipe: Callable[..., Path], tmp_path: Path, cluster: Cluster
) -> None:
    """Prepare, train, finish in order; the training is warned once, and once sent back without a word."""
    recipe, run = make_recipe(train=TRAIN, adapter={"r": 4, "dropout": 0.1}), tmp_path / "run"
    jobs = submitted(cluster, recipe)
    assert list(jobs) == ["prepare", "train", "finish"]
    assert "waits for the stage before it" in told(cluster, run)
    second = attempt(cluster, recipe)
    assert second.returncode == 1 and "its jobs are in the queue" in second.stderr
    step = disturb(cluster, run, jobs["train"])
    wait_until(lambda: "preempted at step" in told(cluster, run), 60, "the requeue", lambda: told(cluster, run))
    wait_until(lambda: last_step(run) > step + 3, 120, "the resumption", lambda: logs(run))
    command(cluster, "scontrol", "requeue", jobs["train"])
    done = run_train(recipe, "--set", f"output={tmp_path / 'whole'}", env=cluster)
    assert done.returncode == 0, done.stderr
    wait_for_jobs(cluster, 120)
    assert f"resuming from checkpoint-{step}" in (run / FOLDER / "train.log").read_text(), logs(run)
    assert (run / FOLDER / "train.log").read_text().count("resuming from") == 2
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert adapters[0] == adapters[1]
    assert not (run / "stopped.json").exists()
    assert "every file is as the manifest says" in (run / FOLDER / "finish.log").read_text()
    shown = told(cluster, run)
    assert re.findall(r"^(\w+) +done", shown, re.M) == ["prepare", "train", "finish"], shown
    assert f"step {TRAIN['max_steps']} of {TRAIN['max_steps']}" in shown and "held-out rows" in shown
    again = attempt(cluster, recipe)
    assert again.returncode == 1 and "holds a finished run" in again.stderr


@pytest.mark.slow
def test_two_nodes_train_the_run_of_one(make_recipe: Callable[..., Path], tmp_path: Path, cluster: Cluster) -> None:
    """Two slurmd, one process on each; both stop after the same step when the job is warned."""
    train = {**TRAIN, "tokens_per_step": 792, "micro_batch": 8, "max_steps": 40}
    # 64 rows are four steps of 16: where an epoch ends inside a step, two processes fill it up with other rows.
    rows = {"train": [{"path": str(write_rows(tmp_path / "all.jsonl", colour_rows()))}]}
    recipe, run = make_recipe(train=train, data=rows), tmp_path / "run"
    jobs = submitted(cluster, recipe, "--nodes", "2", "--set", "train.micro_batch=4")
    step = disturb(cluster, run, jobs["train"])
    done = run_train(recipe, "--set", f"output={tmp_path / 'one'}", env=cluster)
    assert done.returncode == 0, done.stderr
    wait_for_jobs(cluster, 180)
    assert f"resuming from checkpoint-{step}" in (run / FOLDER / "train.log").read_text(), logs(run)
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (tmp_path / "one", run)]
    assert [plan["world_size"] for plan in plans] == [1, 2]
    assert plans[0]["rows_per_step"] == plans[1]["rows_per_step"]
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "one", run)
    ]
    assert len(losses[0]) == 40 and losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("legal", ["prepare", "train", "finish", "export"]),
        ("legal-distill", ["prepare", "generate", "train", "finish", "export"]),
    ],
)
def test_the_demonstrations_run_as_jobs(tmp_path: Path, cluster: Cluster, name: str, stages: list[str]) -> None:
    """The recipes as they are shipped, cut to a few rows and steps."""
    run = tmp_path / "run"
    cut = [f"output={run}", "data.train=[{embedded: legal, limit: 40}]", "train.epochs=1", "eval.samples=8"]
    jobs = submitted(cluster, ROOT / "recipes" / f"{name}.yaml", *(word for value in cut for word in ("--set", value)))
    assert list(jobs) == stages
    wait_for_jobs(cluster, 240)
    shown = told(cluster, run)
    assert re.findall(r"^(\w+) +done", shown, re.M) == stages, shown + logs(run)
    assert read_manifest(run)["kind"] == "run" and json.loads((run / "eval.json").read_text())["n"] == 8
    assert "every file is as the manifest says" in (run / FOLDER / "finish.log").read_text()
    if "generate" in stages:
        told_of = json.loads((run / "teacher" / "stats.json").read_text())
        assert told_of["calls_made"] == told_of["requests"] >= 40 + 8 and told_of["kept"] >= 30


@pytest.mark.slow
def test_a_killed_shard_goes_on_where_it_was(tmp_path: Path, cluster: Cluster) -> None:
    from distill.generate import generate
    from recipes.load import load_recipe

    recipe, run = distillation(tmp_path), tmp_path / "run"
    submitted(cluster, recipe, "--shards", "4")
    shard = run / "teacher" / "journal" / "shard-00002-of-00004.jsonl"
    wait_until(lambda: shard.is_file() and shard.read_bytes().count(b"\n") >= 2, 120, "an answer", lambda: logs(run))
    os.kill(process_of(recipe, "2/4"), signal.SIGKILL)
    wait_until(
        lambda: set(queued(cluster).values()) == {"PENDING Dependency", "PENDING DependencyNeverSatisfied"},
        150,
        "the end of the others",
        lambda: f"{queued(cluster)}\n{logs(run)}",
    )
    written = shard.read_bytes()
    written = written[: written.rindex(b"\n") + 1]  # the kill may have cut a line short
    assert 2 <= written.count(b"\n") < len(mine(recipe, 2, 4))
    shown = told(cluster, run)
    assert re.search(r"^generate +failed +job \d+ \(3 of 4 shards done\): shard 2, exit code 137", shown, re.M), shown
    assert re.search(r"^merge +waiting +job \d+: waits for ever", shown, re.M), shown
    assert " answers of 24" in shown and "generate failed" in shown
    submitted(cluster, recipe, "--shards", "4")
    wait_for_jobs(cluster, 240)
    assert read_manifest(run) is not None, logs(run)
    assert shard.read_bytes().startswith(written)
    alone = load_recipe(recipe, [f"output={tmp_path / 'alone'}"])
    generate(alone, say=lambda line: None)
    keys, wanted = keys_of(run), keys_of(tmp_path / "alone")
    assert len(keys) == len(set(keys)) and sorted(keys) == sorted(wanted), "each answer once"
    assert len(wanted) == 24 + len((run / "teacher" / "answers.jsonl").read_text().splitlines())
    for name in ("rows", "heldout"):
        made = [sha256_files(folder / "teacher" / name) for folder in (run, tmp_path / "alone")]
        texts = [{k: v for k, v in one.items() if k.endswith(".jsonl")} for one in made]
        assert texts[0] == texts[1] and texts[0]


STAND_IN = """\
#!/usr/bin/env bash
# serve MODEL --served-model-name NAME --host HOST --port PORT, as vLLM takes it
[ "$1" = serve ] && [ "$3" = --served-model-name ] && [ "$4" = embedded:tiny-teacher ] || exit 2
exec {python} -m transformers.cli.transformers serve "$2" "${{@:5}}" --dtype float32 --device cpu
"""


@pytest.mark.slow
def test_a_job_brings_its_own_server(tmp_path: Path, cluster: Cluster) -> None:
    """vLLM needs a card: `transformers serve` stands in for it, a real server under vLLM's command line."""
    from recipes.refs import EMBEDDED

    model, run = EMBEDDED / "tiny-teacher", tmp_path / "run"
    engine = {"http": {"urls": ["http://127.0.0.1:9/v1"], "served_as": str(model), "parallel": 2}}
    recipe = distillation(tmp_path, engine=engine)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "bin" / "vllm").chmod(0o755)
    with_server = {**cluster, "PATH": f"{tmp_path / 'bin'}:{cluster['PATH']}"}
    jobs = submitted(with_server, recipe, "--vllm")
    wait_until(lambda: jobs["generate"] not in queued(cluster), 240, "the generation", lambda: logs(run))
    command(cluster, "scancel", jobs["train"], jobs["finish"])
    wait_for_jobs(cluster, 60)
    assert (run / FOLDER / "generate.end").read_text().strip() == "0", logs(run)
    assert len(keys_of(run)) == 24 + len((run / "teacher" / "answers.jsonl").read_text().splitlines())
    assert (run / FOLDER / f"server-{jobs['generate']}.log").stat().st_size > 0

    def serves() -> bool:
        return any(str(model) in words and "serve" in words for words in processes().values())

    wait_until(lambda: not serves(), 60, "the end of the server")

    (tmp_path / "bin" / "vllm").write_text("#!/bin/sh\nexit 3\n")
    jobs = submitted(with_server, recipe, "--vllm", "--set", "data.train=[{embedded: legal, limit: 25}]")
    wait_until(lambda: jobs["generate"] not in queued(cluster), 120, "the end", lambda: logs(run))
    shown = told(cluster, run)
    said = rf"generate +failed +job {jobs['generate']}: exit code 6: the teacher's server ended; see .*server-"
    assert re.search(said, shown), shown
    command(cluster, "scancel", *set(jobs.values()) & {job.partition("_")[0] for job in queued(cluster)})
    wait_for_jobs(cluster, 60)


def distillation(folder: Path, **teacher: Any) -> Path:
    content = {
        "name": "taught",
        "output": str(folder / "run"),
        "model": {"base": "embedded:tiny"},
        "adapter": {"r": 8},
        "data": {
            "train": [{"embedded": "legal", "limit": 24}],
            "eval": [{"embedded": "legal", "split": "heldout", "limit": 12}],
        },
        "method": {"type": "distill"},
        "teacher": {
            "model": "embedded:tiny-teacher",
            "sampling": {"max_tokens": 32},
            "engine": {"transformers": {"batch_size": 1, "batching": "plain"}},
            **teacher,
        },
        "train": {"tokens_per_step": 512, "seq_len": 352, "learning_rate": 3e-3, "max_steps": 2, "device": "cpu"},
        "eval": {"samples": 4, "max_new_tokens": 8, "resamples": 200, "metrics": ["exact_match", "loss"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def keys_of(run: Path) -> list[str]:
    files = (run / "teacher" / "journal").glob("*.jsonl")
    return [json.loads(line)["key"] for path in files for line in path.read_text().splitlines()]


def mine(recipe: Path, number: int, of: int) -> list[str]:
    """Ids of the prompts of one shard."""
    from data_prep.assemble import read_rows
    from recipes.load import load_recipe

    rows = read_rows(load_recipe(recipe).run_dir / "prompts", "train")
    return [row["_id"] for row in rows if int(row["_id"].partition("-")[0], 16) % of == number - 1]


def processes() -> dict[int, list[str]]:
    """Command lines of what runs on this machine, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return found


def process_of(recipe: Path, shard: str) -> int:
    """The process that works on a shard of a recipe."""
    return next(pid for pid, words in processes().items() if str(recipe) in words and shard in words)


@pytest.mark.slow
def test_a_failed_stage_stops_the_others_and_status_says_why(
    make_recipe: Callable[..., Path], tmp_path: Path, cluster: Cluster
) -> None:
    recipe, run = make_recipe(train={**TRAIN, "max_steps": 2}), tmp_path / "run"
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows + "{broken\n")
    jobs = submitted(cluster, recipe)
    never = {"PENDING Dependency", "PENDING DependencyNeverSatisfied"}
    wait_until(lambda: set(queued(cluster).values()) == never, 90, "the failure", lambda: logs(run))
    shown = told(cluster, run)
    assert re.search(rf"^prepare +failed +job {jobs['prepare']}: exit code 4: .*rows.jsonl:65", shown, re.M), shown
    assert re.search(rf"^train +waiting +job {jobs['train']}: waits for ever", shown, re.M), shown
    assert re.search(rf"^finish +waiting +job {jobs['finish']}: waits for ever", shown, re.M), shown
    assert not (run / "data" / "manifest.json").exists() and not (run / "adapter").exists()
    (tmp_path / "rows.jsonl").write_text(rows)
    again = submitted(cluster, recipe, "--set", "train.max_steps=5000")
    assert not set(jobs.values()) & set(again.values())
    wait_until(lambda: last_step(run) > 2, 120, "the training", lambda: logs(run))
    shown = told(cluster, run)
    assert re.search(r"^train +running +job \d+ on n\d for \d", shown, re.M) and re.search(
        r" of 5,000, loss .* left", shown
    )
    command(cluster, "scancel", again["train"])
    wait_until(lambda: set(queued(cluster).values()) <= never, 90, "the end", lambda: logs(run))
    assert list(queued(cluster)) == [again["finish"]], "what somebody cancelled stays away"
    shown = told(cluster, run)
    assert re.search(r"^train +failed +job \d+: exit code 75: preempted at step", shown, re.M), shown
    command(cluster, "scancel", again["finish"])
    wait_for_jobs(cluster, 30)


@pytest.mark.slow
def test_clusters_that_are_not_as_they_should(
    make_recipe: Callable[..., Path], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = make_recipe(), tmp_path / "run"
    done = attempt(cluster, recipe, "--partition", "night")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "invalid partition specified: night" in done.stderr and "sinfo lists the partitions" in done.stderr
    assert queued(cluster) == {} and "open" in told(cluster, run)

    bare = {**cluster, "PATH": str(Path(sys.executable).parent)}
    done = attempt(bare, recipe)
    assert done.returncode == 1 and "sbatch is not here" in done.stderr and done.stderr.count("\n") == 1

    wrong = tmp_path / "slurm.conf"
    known = Path(cluster["SLURM_CONF"]).read_text()
    wrong.write_text(re.sub(r"AuthInfo=socket=[^,]*", f"AuthInfo=socket={tmp_path}/none", known))
    done = attempt({**cluster, "SLURM_CONF": str(wrong)}, recipe)
    assert done.returncode == 1 and "is munged running on this machine?" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1

    (tmp_path / "file").write_text("")
    done = attempt(cluster, recipe, "--set", f"output={tmp_path / 'file' / 'run'}")
    assert done.returncode == 1 and "cannot be written (Not a directory)" in done.stderr and queued(cluster) == {}

    done = attempt(cluster, recipe, "--vllm")
    assert done.returncode == 2 and "--vllm: the recipe has no teacher" in done.stderr

    command(cluster, "scontrol", "update", "NodeName=n1,n2", "State=DOWN", "Reason=test")
    try:
        jobs = submitted(cluster, recipe)
        wait_until(lambda: "DOWN" in told(cluster, run), 30, "the reason", lambda: told(cluster, run))
        assert re.search(rf"^prepare +waiting +job {jobs['prepare']}: ", told(cluster, run), re.M)
        unreachable = {**cluster, "SLURM_CONF": str(wrong)}
        assert "Slurm does not say what the jobs do" in told(unreachable, run)
    finally:
        command(cluster, "scancel", *jobs.values())
        command(cluster, "scontrol", "update", "NodeName=n1,n2", "State=RESUME")
    wait_for_jobs(cluster, 30)
    assert "prepare   failed" in told(cluster, run), "cancelled before it began"
    assert shutil.which("sbatch", path=bare["PATH"]) is None


@pytest.mark.slow
def test_status_of_a_run_without_slurm(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, run = make_recipe(train={**TRAIN, "max_steps": 2}), tmp_path / "run"
    assert run_train(recipe).returncode == 0
    assert [line.split()[:2] for line in status(run)[:2]] == [["prepare", "done"], ["train", "done"]]
    (run / "manifest.json").unlink()
    lines = status(run)
    assert lines[1].split()[:2] == ["train", "stopped"] and "step 2 of 2" in lines[2]
    shutil.rmtree(run / "data")
    (run / "metrics.jsonl").unlink()
    assert [line.split()[1] for line in status(run)] == ["open", "open"]


def test_last_words_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\nerror: rows.jsonl:3: no JSON\nsrun: error: n1: task 0: Exited with exit code 4\n")
    assert last_words(log) == "rows.jsonl:3: no JSON"
    log.write_text("one\nslurmstepd: error: *** JOB 3 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***\n")
    assert last_words(log) == "JOB 3 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT"
    log.write_text("error: long ago\n--- job 4, start 2, on n1\nTraceback\nValueError: no\nsrun: error: x\n")
    assert last_words(log) == "ValueError: no"
