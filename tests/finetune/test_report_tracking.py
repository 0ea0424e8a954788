"""What the dashboard gets: every series of metrics.jsonl, under names that stay the same. The real wandb, offline."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.series import name_of
from finetune.tracking import Tracker

SFT = {"step": 1, "epoch": 0.1, "seconds": 2.5, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": None}
SPEED = {"tokens_per_second": 900.0, "tokens_seen": 4096, "memory_bytes": 2**30}
GRPO = {"reward": 0.25, "reward/math": 0.125, "reward/think": 0.5, "zero_variance_groups": 0.375, "clipped_share": 0.0}
MEASURED = {"step": 1, "eval_reward": 0.75, "eval_exact_match": 0.5, "eval_loss": 1.5}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "train/loss"),
        ("learning_rate", "train/learning_rate"),
        ("grad_norm", "train/grad_norm"),
        ("epoch", "train/epoch"),
        ("tokens_seen", "train/tokens_seen"),
        ("tokens_per_second", "speed/tokens_per_second"),
        ("memory_bytes", "memory/peak_bytes"),
        ("eval_loss", "eval/loss"),
        ("eval_reward_accuracy", "eval/reward_accuracy"),
        ("reward/math", "rewards/math"),
        ("reward", "train/reward"),
        ("reward_accuracy", "train/reward_accuracy"),
        ("kl", "train/kl"),
    ],
)
def test_names_in_the_dashboard(key: str, name: str) -> None:
    assert name_of(key) == name


def test_every_series_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="retort-test", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off"))
    tracker = Tracker(run)
    for line in (MEASURED, SFT | SPEED | GRPO, {"step": 2, "loss": 0.25}):  # a measurement comes before its step's line
        tracker.log(line)
    tracker.finish(None, [])
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # wandb's service writes the last records shortly after finish() returns
    while len(found := history(path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    first, second = found
    assert first == {
        "eval/reward": 0.75,
        "eval/exact_match": 0.5,
        "eval/loss": 1.5,
        "train/epoch": 0.1,
        "train/loss": 0.5,
        "train/learning_rate": 1e-4,
        "speed/tokens_per_second": 900.0,
        "train/tokens_seen": 4096,
        "memory/peak_bytes": 2**30,
        "train/reward": 0.25,
        "rewards/math": 0.125,
        "rewards/think": 0.5,
        "train/zero_variance_groups": 0.375,
        "train/clipped_share": 0.0,
    }
    assert second == {"train/loss": 0.25}


def history(path: Path) -> list[dict[str, Any]]:
    """The logged values per step of a short offline run, without what wandb adds.

    The file is LevelDB's log after a head of 7 bytes: per record a checksum, its length, and its kind (1: whole).
    """
    from wandb.proto import wandb_internal_pb2

    data, found, at = path.read_bytes(), [], 7
    while at + 7 <= min(len(data), 32768):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if kind != 1:
            break
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found
