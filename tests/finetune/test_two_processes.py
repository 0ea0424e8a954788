"""Two processes (gloo, on one machine) make the run that one process makes, with whole and with cut weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_train, write_rows
from test_preference import pairs

TRAIN = {"tokens_per_step": 900, "micro_batch": 4, "seq_len": 128, "max_steps": 6, "learning_rate": 5e-3}

# accelerate cuts weights on GPUs only; torch and DeepSpeed can on processors too. This tells accelerate so, and runs
# train.py.
CUT_ON_PROCESSORS = """
import sys
from accelerate import state
from accelerate.utils import DistributedType

begin = state.AcceleratorState.__init__

def begin_cut(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
    if self.distributed_type != DistributedType.MULTI_CPU:
        return
    kind = None
    if deepspeed_plugin is not None:
        import deepspeed
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        deepspeed_plugin.select(_from_accelerator_state=True)
        self.deepspeed_plugins, kind = {"default": deepspeed_plugin}, DistributedType.DEEPSPEED
    elif fsdp_plugin is not None:
        self.fsdp_plugin, kind = fsdp_plugin, DistributedType.FSDP
    if kind is not None:
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = kind

state.AcceleratorState.__init__ = begin_cut
from finetune.train import main
sys.exit(main())
"""


def launch(file: str, recipe: Path, *options: str, script: Path | None = None, **env: str) -> subprocess.Popen[str]:
    """`accelerate launch` with a file of recipes/accelerate on two processes, as a user types it."""
    program = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2"]
    config = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{file}.yaml")]
    command = [*program, *config, str(script or ROOT / "finetune" / "train.py"), str(recipe), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=recipe.parent)


def launched(*arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    with launch(*arguments, **more) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def cutting(folder: Path) -> Path:
    script = folder / "cut.py"
    script.write_text(CUT_ON_PROCESSORS)
    return script


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def process_of(launcher: int, rank: int) -> int:
    """The number of the process of a rank, among a launcher's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_train_the_run_of_one(make_recipe: Callable[..., Path], tmp_path: Path, method: str) -> None:
    """Preparation, a reference's shares, gradients, held-out measurements and the result."""
    sections: dict[str, Any] = {"train": {**TRAIN, "device": "cpu", "eval_every": 3}}
    if method == "dpo":
        source = {"path": str(write_rows(tmp_path / "pairs.jsonl", pairs()))}
        sections |= {"method": {"type": "dpo"}, "data": {"train": [source], "eval": {"fraction": 0.25}}}
    else:
        sections["train"] |= {"tokens_per_step": 400}
    path = make_recipe(**sections)
    done = launched("ddp", path, "--set", f"output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("loading") == 1, "one process speaks"
    assert not list(tmp_path.glob(".*.processes")), "nothing is left of the waiting"
    alone = run_train(path, "--set", f"output={tmp_path / 'one'}", "--set", "train.micro_batch=8")
    assert alone.returncode == 0, alone.stderr
    for name in ("one", "two"):
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert plan["rows_per_step"] == 8 and plan["world_size"] == (2 if name == "two" else 1)
    logs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(logs[0]) == len(logs[1]) == 8
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "reward_margin", "eval_loss"):
            assert one.get(key) == pytest.approx(two.get(key), abs=1e-5), (one["step"], key)
    results = [json.loads((tmp_path / name / "eval.json").read_text())["metrics"] for name in ("one", "two")]
    for metric in {"reward_accuracy", "loss"} & results[0].keys():
        one, two = (result[metric]["tuned"]["value"] for result in results)
        assert one == pytest.approx(two, abs=1e-5), metric


@pytest.mark.slow
def test_cut_weights_train_the_run_of_one_and_survive_a_killed_process(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """FSDP2: losses, the adapter put together, the result; one process of two is killed with -9 and the run goes on."""
    path = make_recipe(train={**TRAIN, "tokens_per_step": 400, "device": "cpu", "save_every": 2})
    script, run = cutting(tmp_path), tmp_path / "killed"
    done = launched("fsdp2", path, "--set", f"output={tmp_path / 'two'}", script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = tmp_path / "two" / "checkpoints" / "checkpoint-6" / "pytorch_model_fsdp_0"
    assert len(list(parts.glob("*.distcp"))) == 2, "the weights were cut"
    alone = run_train(path, "--set", f"output={tmp_path / 'one'}", "--set", "train.micro_batch=8")
    assert alone.returncode == 0, alone.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5), one["step"]
    adapters = [load(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().max() < 1e-4, name
    results = [json.loads((tmp_path / name / "eval.json").read_text())["metrics"]["loss"] for name in ("one", "two")]
    assert results[0]["base"]["value"] == pytest.approx(results[1]["base"]["value"], abs=1e-6)
    assert results[0]["tuned"]["value"] == pytest.approx(results[1]["tuned"]["value"], abs=1e-5)

    with launch("fsdp2", path, "--set", f"output={run}", script=script) as process:
        deadline = time.monotonic() + 200
        while not (run / "checkpoints" / "checkpoint-2" / "retort.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
            time.sleep(0.01)
        os.kill(process_of(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and "lost" in errors and errors.count("error: ") == 1, errors[-3000:]
    assert not (run / "adapter").exists() and not (run / "manifest.json").exists()
    done = launched("fsdp2", path, "--set", f"output={run}", script=script)
    assert done.returncode == 0 and "resuming from checkpoint-" in done.stdout, done.stderr[-3000:]
    same = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "two", run)]
    assert same[0] == same[1]


def load(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fsdp2-qlora", "zero3"])
def test_other_ways_to_cut_train_the_run_of_one(make_recipe: Callable[..., Path], tmp_path: Path, file: str) -> None:
    if file == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (the extra of that name)")
    quantization = "nf4" if file == "fsdp2-qlora" else "none"  # TRL trains its adapter in bfloat16
    train = {**TRAIN, "tokens_per_step": 400, "device": "cpu", "max_steps": 3}
    path = make_recipe(train=train, eval={"samples": 4, "metrics": ["loss"]})
    more = ["--set", f"model.quantization={quantization}"]
    env = {"DS_ACCELERATOR": "cpu"}
    done = launched(file, path, "--set", f"output={tmp_path / 'two'}", *more, script=cutting(tmp_path), **env)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_train(path, "--set", f"output={tmp_path / 'one'}", "--set", "train.micro_batch=8", *more)
    assert alone.returncode == 0, alone.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5), one["step"]
    adapters = [load(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    for name, tensor in adapters[0].items():
        # Of bfloat16 a gradient near zero may have either sign, and Adam takes a whole step for it: so the mean.
        assert (tensor.float() - adapters[1][name].float()).abs().mean() < 2e-5, name
    results = [json.loads((tmp_path / name / "eval.json").read_text())["metrics"]["loss"] for name in ("one", "two")]
    assert results[0]["tuned"]["value"] == pytest.approx(results[1]["tuned"]["value"], abs=1e-5)


@pytest.mark.slow
def test_all_weights_trained_and_cut_are_saved_whole(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    train = {**TRAIN, "tokens_per_step": 400, "device": "cpu", "max_steps": 2, "learning_rate": 1e-3}
    path = make_recipe(adapter=None, train=train, eval={"samples": 4, "metrics": ["loss"]})
    done = launched("fsdp2", path, "--set", f"output={tmp_path / 'two'}", script=cutting(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_train(path, "--set", f"output={tmp_path / 'one'}", "--set", "train.micro_batch=8")
    assert alone.returncode == 0, alone.stderr
    models = [load(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert (tensor - models[1][name]).abs().max() < 1e-4, name
    architectures = [json.loads((tmp_path / n / "model" / "config.json").read_text()) for n in ("one", "two")]
    assert architectures[0]["architectures"] == architectures[1]["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_bad_rows_end_all_processes_with_one_message(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = make_recipe()
    (tmp_path / "rows.jsonl").write_text("{not json\n")
    done = launched("ddp", path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "rows.jsonl" in lines[0], done.stderr[-3000:]
    assert "exitcode  : 4" in done.stderr, "the launcher's own summary names our exit code"


@pytest.mark.slow
def test_preparation_may_take_longer_than_any_collective(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The main process stands still before it has prepared, three times as long as a barrier would wait."""
    path, run = make_recipe(train={**TRAIN, "max_steps": 1, "device": "cpu"}), tmp_path / "run"
    with launch("ddp", path, RETORT_COLLECTIVE_SECONDS="4") as process:
        deadline = time.monotonic() + 100
        while not (run / "state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        main = process_of(process.pid, 0)
        os.kill(main, signal.SIGSTOP)
        assert not (run / "data" / "manifest.json").exists()
        time.sleep(12)
        os.kill(main, signal.SIGCONT)
        out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    assert "step 1/1" in out
