"""Several processes as one run: who waits for whom, who speaks, which launch file, and how a step is shared out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from finetune import distributed
from finetune.gpus import count_cards
from finetune.launch import suggested
from finetune.layout import Device, ModelFacts, fixed_bytes, model_facts, per_token, plan_layout
from recipes.errors import MemoryFitError, RecipeError
from recipes.load import load_recipe
from recipes.refs import require_model_folder
from recipes.schema import Recipe

FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
SEVEN_B = ModelFacts(7_000_000_000, 32, 4096, 11008, 32000)
SEVENTY_B = ModelFacts(70_000_000_000, 80, 8192, 28672, 128256)
CARD = Device("cuda", 80 * 2**30, "NVIDIA H100 80GB")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_launch_file_is_what_accelerate_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by accelerate's own launcher; the environment that it makes is what our code and transformers look at."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py", "recipe.yaml"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 8 and arguments.num_machines == 1 and arguments.mixed_precision == "no"
    wanted = {"ddp": None, "zero3": "zero3", "zero3-offload": "zero3"}.get(file.stem, "fsdp2")
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        made = prepare_deepspeed_cmd_env(arguments)[1]
        assert made["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto", "the recipe's"
    else:
        assert arguments.use_fsdp is (wanted == "fsdp2") and arguments.multi_gpu is (wanted is None)
        made = prepare_multi_gpu_env(arguments)
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert distributed.sharding() == wanted
    assert distributed.shards("cuda") == (1 if wanted is None else 8) and distributed.shards("cpu") == 1
    assert distributed.offloads() is file.stem.endswith("offload")
    if wanted == "fsdp2":
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.cpu_ram_efficient_loading is (file.stem != "fsdp2-qlora")
        assert "SHARDED" in str(plugin.state_dict_type) and not plugin.activation_checkpointing
        assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") is file.stem.endswith("offload")


def test_a_rule_picks_the_launch_file(make_recipe: Callable[..., Path]) -> None:
    def pick(facts: ModelFacts, world: int, **sections: object) -> str:
        return suggested(load_recipe(make_recipe(**sections)), CARD, world, facts)[0]

    assert pick(SEVEN_B, 8) == "ddp"  # 14 GB of weights
    assert pick(SEVENTY_B, 8) == "fsdp2"  # 140 GB, 18 on each
    assert pick(SEVENTY_B, 8, model={"base": "embedded:tiny", "quantization": "nf4"}) == "ddp"  # about 42 GB
    assert pick(SEVENTY_B, 8, adapter=None) == "fsdp2-offload"  # 140 + 1,120 GB of gradients and states
    small = Device("cuda", 24 * 2**30, "card")
    quantised = load_recipe(make_recipe(model={"base": "embedded:tiny", "quantization": "nf4"}))
    name, reason = suggested(quantised, small, 8, SEVENTY_B)
    assert name == "fsdp2-qlora" and "24 GiB" in reason
    assert suggested(quantised, Device("cpu", 2**36, "cores"), 8, SEVENTY_B)[0] == "ddp"


def test_cut_weights_make_room(make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(make_recipe(train={"seq_len": 2048, "tokens_per_step": 32768, "max_steps": 4}))
    with pytest.raises(MemoryFitError):
        plan_layout(recipe, CARD, SEVENTY_B, 1000, 1000.0, 2048, 8)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "8")
    layout = plan_layout(recipe, CARD, SEVENTY_B, 1000, 1000.0, 2048, 8)
    assert 140e9 / 8 < layout.estimated_bytes < 68 * 2**30


@pytest.mark.parametrize("mean, asked", [(1000.0, 32000), (500.0, 65536), (40.0, 512 * 40)])
def test_a_step_is_what_the_recipe_says_on_any_number_of_devices(
    make_recipe: Callable[..., Path], mean: float, asked: int
) -> None:
    steps = {}
    for world in (1, 2, 4, 8):
        recipe = load_recipe(make_recipe(train={"seq_len": 2048, "tokens_per_step": asked, "epochs": 1}))
        layout = plan_layout(recipe, CARD, SEVEN_B, 100_000, mean, 2048, world)
        assert layout.rows_per_step == layout.micro_batch * layout.gradient_accumulation * world
        # Rows are whole and each device takes as many: half a row for each, and what finetune/layout.py allows.
        assert abs(layout.tokens_per_step - asked) <= 0.03 * asked + mean * world / 2, (world, layout)
        steps[world] = layout.steps
    assert max(steps.values()) - min(steps.values()) <= 0.04 * steps[1]


def test_cut_weights_refuse_what_they_cannot_do(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = load_recipe(make_recipe(train={"tokens_per_step": 512, "seq_len": 128, "max_steps": 6, "eval_every": 3}))
    assert distributed.check_launch(watched, "cuda") == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RecipeError, match=r"train\.eval_every: rows cannot be measured while training on cut weights"):
        distributed.check_launch(watched, "cuda")
    assert "whole copy" in distributed.check_launch(watched, "cpu")[0]
    with pytest.raises(RecipeError, match="'pissa' changes the weights beneath"):
        distributed.check_launch(load_recipe(make_recipe(adapter={"r": 4, "init": "pissa"})), "cuda")
    assert distributed.check_launch(load_recipe(make_recipe()), "cuda") == []


# --- one first, the others after it ---------------------------------------------------------------------------------

MEMBER = """
import os, sys, time
from pathlib import Path
from finetune import distributed
from recipes.errors import DataError

run, work = Path(sys.argv[1]), sys.argv[2]
try:
    with distributed.first(run, "working"):
        if distributed.rank() == 0:
            if work == "fail":
                raise DataError("holds no rows", "rows.jsonl")
            time.sleep(float(work))
            (run / "done").write_text("x")
        else:
            assert (run / "done").exists()
except Exception as error:
    distributed.report(error)
    sys.exit(getattr(error, "exit_code", 1))
print("through", distributed.rank())
"""


def member(run: Path, rank: int, work: str, world: int = 3, **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), **env}
    command = [sys.executable, "-c", MEMBER, str(run), work]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    texts = [process.communicate(timeout=60) for process in processes]
    return [(p.returncode, out.strip(), err.strip()) for p, (out, err) in zip(processes, texts, strict=True)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_the_others_wait_for_the_main_process(run_dir: Path) -> None:
    """Also behind what an earlier launch left: a state that says done, and a token that nobody will take back."""
    left = run_dir.parent / ".run.processes"
    left.mkdir()
    (left / "working.json").write_text(json.dumps({"state": "done", "exit_code": 0, "beat": 9, "seen": {"1": "old"}}))
    (left / "working.wait.1").write_text("old")
    (left / "working.wait.2").write_text("old")
    found = ended([member(run_dir, rank, "1.5") for rank in (2, 1, 0)])
    assert [(code, out) for code, out, _ in found] == [(0, f"through {rank}") for rank in (2, 1, 0)], found
    assert not left.exists()


def test_a_failure_of_the_main_process_is_said_once(run_dir: Path) -> None:
    found = ended([member(run_dir, rank, "fail") for rank in (2, 1, 0)])
    assert [code for code, _, _ in found] == [4, 4, 4]
    assert [err for _, _, err in found] == ["", "", "error: rows.jsonl: holds no rows"]


def test_a_main_process_that_is_gone_is_not_waited_for_for_ever(run_dir: Path) -> None:
    """Killed while it works; the two others of one launcher say so once."""
    limit = {"RETORT_WAIT_SECONDS": "2"}
    main, *others = [member(run_dir, rank, "60", **limit) for rank in (0, 1, 2)]
    deadline = time.monotonic() + 30
    status = run_dir.parent / ".run.processes" / "working.json"
    while not status.exists() or len(json.loads(status.read_text())["seen"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    main.send_signal(signal.SIGKILL)
    found = ended(others)
    assert [code for code, _, _ in found] == [1, 1]
    said = [err for _, _, err in found if err]
    assert len(said) == 1 and "no sign of life from the main process for 2 s while working" in said[0]
    main.communicate()


def test_long_work_outlasts_the_limit_as_long_as_it_gives_signs_of_life(run_dir: Path) -> None:
    found = ended([member(run_dir, rank, "5", RETORT_WAIT_SECONDS="2") for rank in (0, 1, 2)])
    assert [code for code, _, _ in found] == [0, 0, 0], found


def test_a_shared_disk_that_stalls_or_is_away_for_a_while_changes_nothing(run_dir: Path) -> None:
    """The main process hangs as in a write to a slow disk; then the folder is gone, and comes back."""
    main, *others = processes = [member(run_dir, rank, "4", RETORT_WAIT_SECONDS="3") for rank in (0, 1, 2)]
    place = run_dir.parent / ".run.processes"
    deadline = time.monotonic() + 30
    while not (place / "working.json").exists() or len(json.loads((place / "working.json").read_text())["seen"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    main.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    assert [process.poll() for process in others] == [None, None]
    main.send_signal(signal.SIGCONT)
    time.sleep(0.6)
    place.rename(place.with_name("away"))
    place.write_text("nothing can be read or written below it")
    time.sleep(1)
    place.unlink()
    place.with_name("away").rename(place)
    found = ended(processes)
    assert [(code, out) for code, out, _ in found] == [(0, f"through {rank}") for rank in (0, 1, 2)], found


SPEAKER = """
import sys, time
from finetune import distributed
from recipes.errors import DataError

if sys.argv[1] == "fails":
    distributed.report(DataError("holds no rows", "rows.jsonl"))
    sys.exit(4)
if sys.argv[1] == "late":
    try:
        distributed.join("cpu")
    except RuntimeError as error:
        lost = distributed.lost_peer(error)
        assert lost is not None, repr(error)
        distributed.report(lost)
        sys.exit(lost.exit_code)
distributed.report(distributed.lost_peer(RuntimeError("Connection closed by peer [127.0.0.1]:1")))
"""


def speaker(rank: int, words: str, temporary: Path, **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "TMPDIR": str(temporary), **env}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SPEAKER, words]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def test_a_failure_elsewhere_is_said_once_and_leaves_no_file(tmp_path: Path) -> None:
    """The process that failed says why; the one whose exchange broke adds nothing, and takes the file away."""
    (tmp_path / f"{distributed.SAID}{os.getuid()}-1-1").write_text("")  # of a launcher that ended long ago
    (failed,) = ended([speaker(1, "fails", tmp_path)])
    assert failed == (4, "", "error: rows.jsonl: holds no rows")
    assert [path.name.split("-")[3] for path in tmp_path.iterdir()] == [str(os.getpid())]
    (lost,) = ended([speaker(0, "lost", tmp_path)])
    assert lost == (0, "", "") and list(tmp_path.iterdir()) == []
    killed = ended([speaker(0, "lost", tmp_path)])  # where nobody else can say it, it does
    assert "the connection to another process was lost" in killed[0][2]


def test_a_peer_that_does_not_come_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0", "RETORT_COLLECTIVE_SECONDS": "1"}
    ((code, _, said),) = ended([speaker(0, "late", tmp_path, **meeting)])
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "another process did not come" in lines[0], said
    assert "Traceback" not in said


def test_plan_and_submit_take_the_file_that_suits(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card too small for a whole copy of the tiny model and large enough for a share of it, and one for all."""
    from scripts.batch import Ask
    from scripts.plan import describe, make_plan
    from scripts.slurm import submit

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = make_recipe(train={"tokens_per_step": 1024, "seq_len": 128, "max_steps": 6})
    monkeypatch.chdir(path.parent)
    recipe = load_recipe(path)
    assert make_plan(recipe)["launch"] is None and "WORLD_SIZE" not in os.environ
    made = make_plan(recipe, gpus=2, nodes=2, card_memory=80)
    assert (made["launch"]["processes"], made["launch"]["file"]) == (4, "ddp")
    assert made["layout"]["world_size"] == 4 and made["device"]["name"] == "a card of 80 GiB"
    line = next(line for line in describe(made) if line.startswith("launch "))
    assert line.startswith("launch   on 4 cards: recipes/accelerate/ddp.yaml, as a whole copy needs about ")
    text = submit(path, (), Ask(nodes=2, gpus=2), dry_run=True)
    assert "--multi_gpu" in text and "# launch: recipes/accelerate/ddp.yaml, as a whole copy needs" in text

    monkeypatch.setattr("finetune.layout.MEMORY_SHARE", 1.0)
    monkeypatch.setattr("finetune.launch.MEMORY_SHARE", 1.0)
    whole, share = (need(recipe, parts) for parts in (1, 8))
    assert share < whole
    small = (whole + share) / 2 / 2**30
    assert make_plan(recipe, gpus=8, card_memory=small)["launch"]["file"] == "fsdp2"
    text = submit(path, (), Ask(gpus=8, card_memory=small), dry_run=True)
    assert f"--config_file {path.parent}/run/logs/slurm/fsdp2.yaml" in text and "--multi_gpu" not in text
    mine = submit(path, (), Ask(gpus=8, card_memory=small, config_file="my.yaml"), dry_run=True)
    assert "--config_file my.yaml" in mine and "# launch:" not in mine, "what the user names is taken"
    with pytest.raises(RecipeError, match=r"train\.eval_every: rows cannot be measured while training on cut weights"):
        submit(path, ["train.eval_every=3"], Ask(gpus=8, card_memory=small), dry_run=True)
    with pytest.raises(RecipeError, match="--gpus: the recipe trains on processors"):
        submit(path, ["train.device=cpu"], Ask(gpus=8), dry_run=True)


def test_the_cards_of_this_machine_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_cards() == 0, "a driver that cannot be run"
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert count_cards() == 2
    for visible, wanted in (("0,3,5", 3), ("", 0), ("-1", 0), ("1,-1,2", 1), ("GPU-1a, GPU-2b", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_cards() == wanted, visible


def need(recipe: Recipe, parts: int) -> int:
    """Bytes that a card needs for its part of a recipe's base."""
    facts = model_facts(require_model_folder(recipe.model.ref, "model.base"))
    row = recipe.train.seq_len * per_token(recipe, CARD, facts, True)
    return row + fixed_bytes(recipe, CARD, facts, parts)
