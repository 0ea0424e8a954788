"""What wandb is told of a whole run: stages in one group, artefacts by lineage, alerts, no secrets; and the FLOPs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, missing_real_part, run_cli, run_train, write_rows

from finetune import flops, series, tracking
from finetune.callbacks import WATCHED
from finetune.guards import FIRST, Guarding
from recipes.lineage import write_manifest
from recipes.load import load_recipe
from recipes.schema import Guards
from scripts import wandb_dashboard as dashboard

FAKE = {
    "WANDB_API_KEY": "5f1d7c0a94e2b83d6c5f1d7c0a94e2b83d6ca1b2",
    "HF_TOKEN": "hf_QxLpZvTrNwMkYdBsGhJcFaRtUe",
    "OPENAI_API_KEY": "sk-proj-7Yq2Wm9Xt4Rb6Zc1Kd8N",
}
IDS = {"prepare": "-prepare", "generate": "-generate", "train": "", "export": "-export"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb reads the environment once in a process: whichever test comes first decides for the others."""
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, by wandb's own protocol buffers.

    The file is LevelDB's log after a head of 7 bytes: blocks of 32 KiB, per piece a checksum, its length and its kind
    (1 whole, 2 first, 3 middle, 4 last piece of a record).
    """
    from wandb.proto import wandb_internal_pb2

    data, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        pieces = piece if kind in (1, 2) else pieces + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record


def whole(path: Path) -> list[Any]:
    """The records of a run that was closed: wandb's service writes the last ones shortly after finish() returns."""
    for _ in range(300):
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def told(run_dir: Path, run_id: str, stage: str) -> SimpleNamespace:
    """What the one wandb run of a stage holds."""
    (path,) = run_dir.glob(f"wandb/offline-run-*/run-{run_id}{IDS[stage]}.wandb")
    found = SimpleNamespace(run=None, config={}, summary={}, history=[], made={}, used={}, alerts=[], files={})
    for record in whole(path):
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
            case "summary":
                updates = record.summary.update
                found.summary |= {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates}
            case "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                found.history.append({k: v for k, v in items.items() if not k.startswith("_")})
            case "artifact" if record.artifact.type != "run_table":
                kind = found.used if record.artifact.use_after_commit else found.made
                kind[record.artifact.name] = record.artifact.digest
                found.files[record.artifact.name] = {entry.path: entry for entry in record.artifact.manifest.contents}
            case "alert":
                found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
    return found


@pytest.mark.slow
def test_a_run_is_told_stage_by_stage_in_one_group_and_no_file_holds_a_secret(
    make_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    train = {"tokens_per_step": 512, "seq_len": 128, "learning_rate": 5e-3, "max_steps": 4, "device": "cpu"}
    recipe = make_recipe(
        track={"wandb": {"project": "retort-test", "tags": ["one"], "mode": "offline"}},
        train={**train, "eval_every": 0.5},
        use={"purpose": "internal", "distribute": False},
        model={"base": str(tiny_model), "license": "apache-2.0"},
        data={"train": [{"path": str(tmp_path / "rows.jsonl"), "license": "own"}], "eval": {"fraction": 0.2}},
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | FAKE
    done = run_train(recipe, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    run_id = json.loads((run / "state.json").read_text())["id"]
    prepare, trained = told(run, run_id, "prepare"), told(run, run_id, "train")
    assert [(x.run.run_group, x.run.job_type) for x in (prepare, trained)] == [(run_id, "prepare"), (run_id, "train")]
    assert list(trained.run.tags) == ["one"] and trained.run.project == "retort-test"
    assert trained.config == load_recipe(recipe).resolved() | {"_wandb": trained.config["_wandb"]}

    # Every line of metrics.jsonl, under its name.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        named = {series.name_of(k): v for k, v in line.items() if k not in series.OWN and v is not None}
        steps.setdefault(line["step"], {}).update(named)
    assert trained.history == list(steps.values()) and len(steps) == 4
    assert {"train/loss", "speed/tokens_per_second", "memory/peak_bytes", "eval/loss"} <= steps[2].keys()

    # Quality with intervals, memory, funnel and verdict.
    measured = json.loads((run / "eval.json").read_text())
    for name, metric in measured["metrics"].items():
        for who in ("base", "tuned"):
            ends = [trained.summary[f"eval/{name}/{who}{end}"] for end in ("", "_low", "_high")]
            assert ends == [metric[who][key] for key in ("value", "low", "high")]
    assert trained.summary["eval/rows"] == 8 and trained.summary["eval/intervals"]["nrows"] == 8
    plan, probe = (json.loads((run / name).read_text()) for name in ("plan.json", "preflight.json"))
    assert trained.summary["memory/predicted_bytes"] == plan["estimated_bytes"] > 0
    assert trained.summary["memory/longest_batch_bytes"] == probe["probe"]["peak_memory_bytes"] > 0
    funnel = {"data/rows_in": 64, "data/rows_out": 64, "data/train_rows": 52, "data/eval_rows": 12}
    assert funnel.items() <= prepare.summary.items() and funnel.items() <= trained.summary.items()
    assert prepare.summary["gate/verdict"] == trained.summary["gate/verdict"] == "allow"
    stray = {n for n in trained.summary if "/" in n and n != "_wandb/runtime"} - {
        name for line in trained.history for name in line
    }
    assert all(in_summary(name) for name in stray), stray

    # Lineage: what preparation made is what training used; rows and weights are referred to, papers are kept.
    assert prepare.made.keys() == {"tiny-data"} and trained.used == prepare.made
    assert trained.made.keys() == {"tiny-model", "tiny-papers"}
    weights = trained.files["tiny-model"]["adapter/adapter_model.safetensors"]
    assert weights.ref == (run / "adapter" / "adapter_model.safetensors").as_uri() and not weights.local_path
    assert prepare.files["tiny-data"]["data/train-00000.parquet"].ref
    kept = trained.files["tiny-papers"]["report.html"]
    assert Path(kept.local_path).is_relative_to(run) and kept.size == (run / "report.html").stat().st_size

    made = run_cli("export", str(recipe), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    exported = told(run, run_id, "export")
    assert (exported.run.run_group, exported.run.job_type) == (run_id, "export")
    assert exported.used == {"tiny-model": trained.made["tiny-model"]} and exported.made.keys() == {"tiny-export"}

    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, (run / "wandb").glob("offline-run-*"))],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert "Would sync 3 run(s)" in listed.stdout + listed.stderr

    scanned = [path for path in run.rglob("*") if path.is_file()]
    assert len(scanned) > 30
    for path in scanned:
        content = path.read_bytes()
        for name, secret in FAKE.items():
            assert secret.encode() not in content, f"{path} holds {name}"


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_asked_once_and_the_run_goes_on_offline(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    train = {"tokens_per_step": 512, "seq_len": 128, "max_steps": 1, "device": "cpu"}
    recipe = make_recipe(track={"wandb": {"project": "retort-test"}}, train=train)
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | FAKE
    env |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    done = run_train(recipe, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("tracking goes on offline") == 1 and "Traceback" not in done.stderr
    run = tmp_path / "run"
    run_id = json.loads((run / "state.json").read_text())["id"]
    assert told(run, run_id, "train").used == told(run, run_id, "prepare").made
    assert told(run, run_id, "train").summary["eval/rows"] == 8
    assert not [
        path for path in run.rglob("*") if path.is_file() and FAKE["WANDB_API_KEY"].encode() in path.read_bytes()
    ]


def test_the_teachers_rows_stand_between_the_data_and_the_training(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(make_recipe(track={"wandb": {"project": "p", "mode": "offline"}}))
    run = tmp_path / "run"
    left: dict[str, Any] = {"prompts": {"rows_in": 9, "dropped": {"length": 2}}, "teacher/rows": {}, "teacher": {}}
    for folder, counts in left.items():
        (run / folder).mkdir(parents=True, exist_ok=True)
        write_rows(run / folder / "rows.jsonl", [{"a": 1}])
        write_manifest(run / folder, {"counts": counts, "verdict": {"verdict": "allow", "obligations": [{}, {}]}})
    figures = {"candidates": 8, "kept": 6, "rejected": {"empty": 2}, "prompt_tokens": 50, "seconds": 1.5, "cost": 0.25}
    (run / "teacher" / "summary.json").write_text(json.dumps(figures))
    for _ in range(2):  # the second time as a run that goes on: the stages before it are not told again
        tracking.start(recipe, run, "abc").close()
    assert len(list(run.glob("wandb/offline-run-*-abc-prepare"))) == 1
    assert len(list(run.glob("wandb/offline-run-*-abc-generate"))) == 1
    prepare, generate = told(run, "abc", "prepare"), told(run, "abc", "generate")
    assert prepare.summary["data/rows_in"] == 9 and prepare.summary["data/dropped/length"] == 2
    assert prepare.summary["gate/verdict"] == "allow" and prepare.summary["gate/obligations"] == 2
    wanted = {"teacher/candidates": 8, "teacher/kept": 6, "teacher/rejected/empty": 2, "teacher/cost": 0.25}
    assert wanted.items() <= generate.summary.items() and all(map(in_summary, wanted))
    first = next(iter(run.glob("wandb/offline-run-*/run-abc.wandb")))
    (uses,) = [r.artifact for r in whole(first) if r.WhichOneof("record_type") == "artifact"]
    assert generate.used == prepare.made and generate.made == {"tiny-teacher": uses.digest} and uses.use_after_commit
    assert {"teacher/summary.json", "rows/rows.jsonl"} <= generate.files["tiny-teacher"].keys()


def test_what_holds_a_secret_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", FAKE["OPENAI_API_KEY"])
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    clean, dirty = tmp_path / "recipe.yaml", tmp_path / "eval.json"
    clean.write_text("name: x")
    dirty.write_text(f"text: {FAKE['OPENAI_API_KEY']}")
    made = tracking._artifact("a", "report", [], [clean, dirty])
    assert list(made.manifest.entries) == ["recipe.yaml"]
    value = {"a": [f"x {FAKE['OPENAI_API_KEY']} y"], "b": 3}
    assert tracking.redacted(value) == {"a": ["x (OPENAI_API_KEY) y"], "b": 3}
    monkeypatch.setenv("SOME_TOKEN", "short")
    assert tracking.redacted("a short text") == "a short text"


def test_a_guard_that_fires_alerts_once(tmp_path: Path) -> None:
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    tracker = tracking.Tracker(wandb.init(project="p", id="guarded", dir=str(tmp_path), settings=settings))
    guarding = Guarding(Guards(window=2), tracker)
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    for kl in [0.01] * FIRST + [11.0] * 4:
        guarding.on_log(None, None, control, logs={"loss": 0.5, "kl": kl})
    tracker.finish(None)
    (alert,) = told(tmp_path, "guarded", "train").alerts
    assert alert[0] == "stopped by a guard" and alert[1] == guarding.found and alert[2] == "ERROR"
    assert control.should_training_stop


def test_without_wandb_nothing_is_told(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe())
    tracker = tracking.start(recipe, tmp_path / "run", "abc")
    tracker.log({"step": 1, "loss": 0.5})
    tracker.alert("a", "b")
    tracker.finish(None)
    tracking.record_export(recipe, tmp_path)
    assert tracker.run is None and not (tmp_path / "run" / "wandb").exists()


def in_summary(name: str) -> bool:
    """Whether a name is one of the summary's; `*` stands for one part of the path."""
    parts = name.split("/")
    patterns = [pattern.split("/") for pattern in series.SUMMARY]
    return any(len(p) == len(parts) and all(a in ("*", b) for a, b in zip(p, parts, strict=True)) for p in patterns)


def test_every_series_has_one_name_and_a_unit_and_the_page_says_so() -> None:
    logged = {"epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_seen", "memory_bytes"}
    assert logged | set(WATCHED.values()) | {"mfu"} == series.SERIES.keys()
    names = [name for name, _, _ in series.SERIES.values()]
    assert len(set(names)) == len(names) and all(unit for _, unit, _ in series.SERIES.values())
    page = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
    for key, (name, unit, meaning) in series.SERIES.items():
        assert f"| `{name}` | `{key}` | {unit} | {meaning} |" in page
    for name, (unit, meaning) in series.SUMMARY.items():
        assert f"| `{name}` | {unit} | {meaning} |" in page


def test_the_dashboard_shows_only_what_is_logged() -> None:
    names = {name for name, _, _ in series.SERIES.values()}
    shown = [m for panels in dashboard.SECTIONS.values() for p in panels if p.kind != "pattern" for m in p.metrics]
    assert len(shown) > 60
    assert not [name for name in (*shown, *dashboard.COLUMNS) if name not in names and not in_summary(name)]
    # All that a domain team asked for is there.
    asked = {"train/loss", "train/kl", "train/reward", "speed/tokens_per_second", "speed/mfu", "teacher/cost"}
    asked |= {"memory/predicted_bytes", "memory/peak_bytes", "data/rows_in", "data/train_rows", "eval/intervals"}
    assert asked <= set(shown) and "gate/verdict" in dashboard.COLUMNS


def test_a_dry_run_prints_the_view_and_sends_nothing(tmp_path: Path) -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        missing_real_part("wandb-workspaces is not installed")
    env = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "scripts.wandb_dashboard", "legal", "--entity", "team", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["project"], made["entity"], made["displayName"]) == ("legal", "team", "Retort")
    sections = made["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == list(dashboard.SECTIONS)
    for section, panels in zip(sections, dashboard.SECTIONS.values(), strict=True):
        for got, asked in zip(section["panels"], panels, strict=True):
            config = got["config"]
            if asked.kind == "pattern":
                assert config["metricRegex"] == asked.metrics[0] and config["useMetricRegex"] is True
            elif asked.kind != "table":
                assert tuple(config["metrics"]) == asked.metrics and config["chartTitle"] == asked.title
    env = {k: v for k, v in env.items() if k != "WANDB_API_KEY"} | {"NETRC": str(tmp_path / "none")}
    refused = subprocess.run(command[:-1], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert refused.returncode == 1 and "no wandb key is configured" in refused.stderr


# FLOPs, by hand. The test model: 2 layers, width 48, 4 heads of 12 and 2 key-value heads, feed-forward 96.
LAYER = 48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 96  # q, k and v, o, the three of the feed-forward: 20,736


def test_a_frozen_weight_costs_four_flops_and_a_trained_one_six() -> None:
    frozen, adapter = 1_000, 10
    assert flops.training_flops(flops.Work(frozen, 0, 0, 0), 0) == 4_000
    assert flops.training_flops(flops.Work(0, frozen, 0, 0), 0) == 6_000
    assert flops.training_flops(flops.Work(frozen, adapter, 0, 0), 0) == 4_060
    # Attention over 8 positions on average in 3 layers of width 16: forward 2 products x 2 x 16 x 8, three times that.
    assert flops.training_flops(flops.Work(0, 0, 3, 16), 8) == 3 * 3 * (2 * 2 * 16 * 8) == 4_608


def test_a_token_looks_back_half_its_row_on_average() -> None:
    assert flops.mean_context([1]) == 1.0
    assert flops.mean_context([4]) == (1 + 2 + 3 + 4) / 4
    assert flops.mean_context([4, 2]) == (10 + 3) / 6
    assert flops.mean_context([]) == 0.0


def test_the_work_of_a_real_model_with_and_without_an_adapter(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    head = 48 * model.config.vocab_size
    assert flops.work_of(model) == flops.Work(0, 2 * LAYER + head, 2, 48), "the input embedding is looked up"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    sides = (48 + 48) + 2 * (48 + 24) + (48 + 48) + 2 * (48 + 96) + (96 + 48)
    assert flops.work_of(adapted) == flops.Work(2 * LAYER + head, 2 * 4 * sides, 2, 48)
    whole = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    saved = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), whole)
    assert flops.work_of(saved) == flops.Work(2 * LAYER, 2 * 4 * 96 + head, 2, 48), "the kept copy is never called"


def test_tied_embeddings_are_multiplied_once_and_of_many_experts_the_chosen_count() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64}
    tied = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True))
    assert flops.work_of(tied) == flops.Work(0, 4 * 16 * 16 + 3 * 16 * 32 + 64 * 16, 1, 16)
    experts = MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)
    mixture = AutoModelForCausalLM.from_config(experts)
    router, chosen = 8 * 16, 2 * 3 * 16 * 32
    assert flops.work_of(mixture) == flops.Work(0, 4 * 16 * 16 + router + chosen + 64 * 16, 1, 16)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5e12),
        ("NVIDIA H200", "float16", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362.05e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("Tesla T4", "float16", 65e12),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("2 processor cores", "bfloat16", None),
    ],
)
def test_peaks_are_known_by_name_and_never_guessed(name: str, dtype: str, peak: float | None) -> None:
    assert flops.peak_flops(name, dtype) == peak


def test_utilisation_by_hand(tiny_model: Path) -> None:
    # 10,000 tokens/s of an 8B frozen base: 3.2e14 FLOP/s of two cards with 312e12 each.
    assert flops.utilisation(10_000, 4 * 8e9, 312e12, 2) == pytest.approx(3.2e14 / 6.24e14)
    assert flops.utilisation(10_000, 4 * 8e9, None) is None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    per_token = 6 * (2 * LAYER + 48 * model.config.vocab_size) + 12 * 2 * 48 * 2.5
    on_card = flops.Utilisation(model, [4, 4], "bfloat16", device="NVIDIA L4")
    assert on_card.flops_per_token == per_token and on_card(1e6) == pytest.approx(1e6 * per_token / 121e12)
    two = flops.Utilisation(model, [4, 4], "bfloat16", 2, "NVIDIA L4")
    assert two(1e6) == pytest.approx(1e6 * per_token / 242e12)
    assert flops.Utilisation(model, [4, 4], "float32", device="2 processor cores")(1e6) is None
    pair = {"input_ids": [1, 2, 3], "rejected_ids": [1, 2]}
    assert list(flops.row_lengths([pair, {"input_ids": [1], "rejected_ids": None}])) == [3, 2, 1]
