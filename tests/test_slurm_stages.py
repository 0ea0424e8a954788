"""The stages of a recipe as jobs of a real Slurm: in order, disturbed, failed, and on a cluster in disorder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, colour_rows, run_train, write_rows
from slurm import command, queued, slurm, wait_for_jobs, wait_until

from recipes.errors import RecipeError
from recipes.lineage import read_manifest, sha256_files
from scripts.batch import NODES, SHIPPED, Ask, Place, render, shipped, stages
from scripts.slurm import FOLDER, submit
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


def test_shipped_scripts_are_rendered_by_the_same_code() -> None:
    made = shipped()
    assert set(made) == {f"{name}.sbatch" for name in ("prepare", "generate", "merge", "train", "finish", "export")}
    assert {path.name for path in SHIPPED.iterdir()} == set(made)
    for name, text in made.items():
        assert (SHIPPED / name).read_text(encoding="utf-8") == text, "run python -m scripts.reference"
        assert subprocess.run(["bash", "-n", str(SHIPPED / name)], check=False).returncode == 0


def test_what_is_asked_is_in_the_scripts(make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_recipe(train={**TRAIN, "device": "auto"})
    monkeypatch.chdir(path.parent)
    ask = Ask(nodes=2, gpus=4, time="1:00:00", partition="p q", account="a", cpus=8, memory="64G", modules=("cuda/12",))
    text = submit(path, ["seed=7"], ask, dry_run=True)
    train = text[text.index("stage train") : text.index("stage finish")]
    for line in ("--nodes=2", "--gpus-per-node=4", "--time=1:00:00", "--account=a", "--cpus-per-task=8", "--mem=64G"):
        assert f"#SBATCH {line}\n" in train
    assert "module load cuda/12 || {" in train and "options=(--set seed=7)" in train and "$SLURM_PROCID" in train
    assert "--num_processes $((SLURM_JOB_NUM_NODES * 4))" in train
    prepare = text[text.index("stage prepare") : text.index("stage train")]
    assert "--nodes=1\n" in prepare and "gpus" not in prepare
    assert not (path.parent / "run").exists(), "a dry run writes nothing"
    for image, words in (("my.sif", "apptainer exec --nv"), ("org/image:1", "srun --overlap --ntasks=1 --container")):
        text = submit(path, (), Ask(gpus=1, container=image), dry_run=True)
        assert f"{words}" in text and image in text and "python=python3\n" in text


MISTRAL = ("--max-model-len=20480", "--tokenizer-mode=mistral", "--config-format=mistral", "--load-format=mistral")


@pytest.mark.parametrize(
    ("name", "model", "serve"),
    [
        ("qwen3-slurm", "Qwen/Qwen3-235B-A22B-Thinking-2507", ("--max-model-len=32768",)),
        ("deepseek-r1", "deepseek-ai/DeepSeek-R1-0528", ("--max-model-len=32768",)),
        ("mistral-large-3", "mistralai/Mistral-Large-3-675B-Instruct-2512", MISTRAL),
        ("nemotron", None, ()),  # vLLM in the process: no server
        ("qwen3", None, ()),
    ],
)
def test_each_large_teacher_has_its_jobs(name: str, model: str | None, serve: tuple[str, ...], tmp_path: Path) -> None:
    path = SHIPPED.parent.parent / "recipes" / f"reasoning-distill-{name}.yaml"
    ask = Ask(nodes=4, gpus=8, shards=4, vllm=model is not None, serve=serve)
    text = submit(path, [f"output={tmp_path / 'run'}"], ask, dry_run=True)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    found = dict(re.findall(r"^# (?:\S*/)(\w+)\.sbatch\n(.*?)(?=^# \S*/\w+\.sbatch\n|\Z)", text, re.M | re.S))
    assert list(found) == ["prepare", "generate", "merge", "train", "finish", "export"]
    assert "#SBATCH --array=1-4\n" in found["generate"] and '--shard "$SLURM_ARRAY_TASK_ID/4"' in found["generate"]
    assert "--array" not in found["merge"] and "--shard" not in found["merge"]
    for stage in ("generate", "merge"):
        assert "#SBATCH --nodes=1\n" in found[stage] and "#SBATCH --gpus-per-node=8\n" in found[stage]
        assert ("vllm serve" in found[stage]) is (model is not None)
        if model is not None:
            served = found[stage].replace("\\\n", "").split("vllm serve ")[1].split(" > ")[0].split()
            assert served[:3] == [model, "--served-model-name", model]
            assert served[-2 - len(serve) :] == ["--tensor-parallel-size", "8", *serve]
    assert "#SBATCH --nodes=4\n" in found["train"]


def test_options_of_a_server_need_a_server(make_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="--serve: no server is started; add --vllm"):
        submit(make_recipe(), (), Ask(serve=("--max-model-len=8",)), dry_run=True)


@pytest.mark.parametrize("time", ["0:01:00", "4", "4:00", "0-0:04", "240 s", "soon", ""])
def test_a_time_limit_that_leaves_no_time_to_work_is_refused(make_recipe: Callable[..., Path], time: str) -> None:
    said = r"--time: .*; (ask for more than 4 minutes|write it as hours:minutes:seconds, or days-hours)"
    with pytest.raises(RecipeError, match=said):
        submit(make_recipe(), (), Ask(time=time), dry_run=True)


@pytest.mark.parametrize("time", ["5", "4:01", "0:04:01", "1-0", "0-1:00", "UNLIMITED"])
def test_other_time_limits_go_through(make_recipe: Callable[..., Path], time: str) -> None:
    assert f"--time={time}\n" in submit(make_recipe(), (), Ask(time=time), dry_run=True)


def script_of(stage: str, text: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Run one script of a dry run on this machine, where it says `module` and Slurm's commands are not."""
    found = re.split(r"^(?=#!/usr/bin/env bash$)", text, flags=re.M)
    script = next(part for part in found if f"# Retort, stage {stage} of " in part)
    script = script.rpartition('exit "$code"\n')[0] + 'exit "$code"\n'
    env = {**os.environ, "SLURM_JOB_ID": "7", **values}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_module_that_is_not_there_ends_the_stage(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    text = submit(make_recipe(), (), Ask(modules=("nosuch/1",)), dry_run=True)
    (tmp_path / "run" / FOLDER).mkdir(parents=True)
    done = script_of("prepare", text)
    (tmp_path / "run" / FOLDER / "prepare.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 1 and not (tmp_path / "run" / "data").exists(), done.stdout
    assert (tmp_path / "run" / FOLDER / "prepare.end").read_text() == "1\n"
    assert "module load nosuch/1 failed" in last_words(tmp_path / "run" / FOLDER / "prepare.log")


def test_a_recipe_that_says_its_use_is_handed_over_last(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """A refusal of the gate is the export's own: the status says why, and that the run is whole."""
    from recipes.load import load_recipe

    plain, ask = make_recipe(), Ask()
    place = Place(str(plain), (), str(tmp_path / "run"), sys.executable, str(ROOT))
    assert [stage.name for stage in stages(load_recipe(plain), ask, place)] == ["prepare", "train", "finish"]
    recipe = load_recipe(make_recipe(use={"purpose": "research", "distribute": False}))
    made = stages(recipe, ask, place)
    assert [stage.name for stage in made] == ["prepare", "train", "finish", "export"]
    folder = tmp_path / "run" / FOLDER
    folder.mkdir(parents=True)
    done = script_of("export", render(made[-1], ask, place, "n"))
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr, "no finished run"
    assert (folder / "export.end").read_text() == "2\n"
    jobs = [{"stage": stage.name, "job": str(i), "array": None} for i, stage in enumerate(made)]
    (folder / "jobs.json").write_text(json.dumps({"recipe": "r.yaml", "overrides": [], "answers": 0, "jobs": jobs}))
    for stage in made[:-1]:
        (folder / f"{stage.name}.end").write_text("0\n")
    (folder / "export.end").write_text("3\n")
    (folder / "export.log").write_text("--- job 3, start 1\nerror: export: 1 duties are not met\n")
    lines = [line for line in status(tmp_path / "run") if not line.startswith("Slurm does not say")]
    assert [line.split()[:2] for line in lines[:3]] == [[name, "done"] for name in ("prepare", "train", "finish")]
    assert lines[3:] == [
        "export    failed   job 3: exit code 3: export: 1 duties are not met",
        "the run itself is whole; when the cause is gone: retort export r.yaml",
    ]


def test_accelerate_understands_what_starts_several_cards(make_recipe: Callable[..., Path]) -> None:
    """No cards here: what the script would start on each of two nodes is read by accelerate's own parser."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    script = submit(make_recipe(train={**TRAIN, "device": "auto"}), (), Ask(nodes=2, gpus=4), dry_run=True)
    script = script[script.index("# One launcher a node") : script.index("# Launchers hide")]
    values = {"SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "1", "head": "h", "port": "1", "recipe": "r.yaml"}
    shown = 'run() { shift 4; "$@"; }\npython=printf\noptions=(--set a=b)\ninside=()\n' + script.replace(
        'exec "$0"', 'printf "%s\\n"'
    )
    done = subprocess.run(
        ["bash", "-c", shown], env={**os.environ, **values}, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "accelerate.commands.launch"]
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert (asked.num_machines, asked.num_processes, asked.machine_rank, asked.multi_gpu) == (2, 8, 1, True)
    assert (asked.main_process_ip, asked.main_process_port) == ("h", 1)
    assert asked.module and asked.training_script == "finetune.train"
    assert asked.training_script_args == ["r.yaml", "--set", "a=b"]


def test_a_port_that_somebody_listens_on_is_left_alone() -> None:
    with socket.socket() as taken:
        port = next(port for port in range(23000, 29000) if taken.connect_ex(("127.0.0.1", port)) != 0)
    with socket.create_server(("127.0.0.1", port)):
        lines = [line for line in NODES.splitlines() if "port=$" in line]
        assert len(lines) == 2
        done = subprocess.run(
            ["bash", "-c", "\n".join([*lines, "echo $port"])],
            env={**os.environ, "SLURM_JOB_ID": str(port - 10000)},
            capture_output=True,
            text=True,
            check=True,
        )
    assert port < int(done.stdout) < port + 100


@pytest.mark.parametrize("container", [None, "im age.sif", "org/im age"])
def test_scripts_parse_whatever_the_paths_hold(tmp_path: Path, container: str | None) -> None:
    from recipes.load import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "legal-distill.yaml")
    place = Place("/a b/it's.yaml", ("a=[1, 2]", "b='x y'"), "/a b/run $HOME", "/p y/python", "/c d")
    for ask in (Ask(container=container), Ask(2, 8, container=container, shards=3, vllm=True, modules=("a b",))):
        for stage in stages(recipe, ask, place):
            path = tmp_path / "script"
            path.write_text(render(stage, ask, place, "n"), encoding="utf-8")
            done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            shown = path.read_text().replace("set -uo pipefail\n", "")
            values = shown[: shown.index("# How it ended")] + 'printf "%s\\n" "$recipe" "${options[@]}" "$run_dir"\n'
            values = "module() { :; }\n" + values
            done = subprocess.run(["bash", "-c", values], capture_output=True, text=True, check=True)
            assert done.stdout.splitlines() == [place.recipe, "--set", "a=[1, 2]", "--set", "b='x y'", place.run_dir]


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
