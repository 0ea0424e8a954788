"""Two processes (gloo, on one machine) make the run that one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, run_train, write_rows
from test_preference import pairs


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Preparation, the reference's shares, gradients, held-out measurements and the result, with DPO."""
    source = {"path": str(write_rows(tmp_path / "pairs.jsonl", pairs()))}
    layout = {"tokens_per_step": 900, "micro_batch": 4, "seq_len": 128, "max_steps": 6, "learning_rate": 5e-3}
    path = make_recipe(
        method={"type": "dpo"},
        data={"train": [source], "eval": {"fraction": 0.25}},
        train={**layout, "device": "cpu", "eval_every": 3},
    )
    script = [str(ROOT / "finetune" / "train.py"), str(path), "--set", f"output={tmp_path / 'two'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, *script], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("loading") == 1, "one process speaks"
    alone = run_train(path, "--set", f"output={tmp_path / 'one'}", "--set", "train.micro_batch=8")
    assert alone.returncode == 0, alone.stderr
    logs = {}
    for name in ("one", "two"):
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert plan["rows_per_step"] == 8 and plan["world_size"] == (2 if name == "two" else 1)
        logs[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert len(logs["one"]) == len(logs["two"]) == 8
    for one, two in zip(logs["one"], logs["two"], strict=True):
        for key in ("loss", "reward_margin", "eval_loss"):
            assert one.get(key) == pytest.approx(two.get(key), abs=1e-4), (one["step"], key)
    results = [json.loads((tmp_path / name / "eval.json").read_text())["metrics"] for name in ("one", "two")]
    for metric in ("reward_accuracy", "loss"):
        one, two = (result[metric]["tuned"]["value"] for result in results)
        assert one == pytest.approx(two, abs=1e-4), metric
