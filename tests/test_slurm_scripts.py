"""The batch scripts of a recipe's stages: what is asked for stands in them, and bash and accelerate understand it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from test_slurm_stages import TRAIN

from recipes.errors import RecipeError
from scripts.batch import NODES, SHIPPED, Ask, Place, render, shipped, stages
from scripts.slurm import FOLDER, submit
from scripts.status import last_words, status


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
