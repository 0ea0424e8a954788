"""Models and data from the Hub, through the command line and a real server that speaks the Hub's protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from conftest import ROOT, colour_rows, run_cli, run_train
from hub import Files, Hub, folder_files, running

from recipes.refs import EMBEDDED

pytestmark = pytest.mark.slow
CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
ROWS = "".join(json.dumps(row) + "\n" for row in colour_rows(12)).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server


@pytest.fixture
def tiny() -> Files:
    files = folder_files(EMBEDDED / "tiny")
    return {name: content for name, content in files.items() if name != "manifest.json"} | {"README.md": CARD}


def recipe_file(folder: Path, **sections: Any) -> Path:
    content = {
        "name": "hub",
        "output": str(folder / "run"),
        "use": {"purpose": "commercial", "distribute": True, "name": "acme"},
        "model": {"base": "acme/tiny@main", "license": "apache-2.0"},
        "adapter": {"r": 2},
        "data": {"train": [{"hub": "acme/rows", "license": "mit"}], "eval": None},
        "train": {"tokens_per_step": 256, "seq_len": 128, "max_steps": 1, "device": "cpu"},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


def line(done: CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_model_and_data_of_the_hub_and_branches_that_move(hub: Hub, tiny: Files, tmp_path: Path) -> None:
    model = hub.push("models/acme/tiny", tiny)
    rows = hub.push("datasets/acme/rows", {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": ROWS})
    recipe, environment = recipe_file(tmp_path), hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    assert run_cli("prepare", str(recipe), cwd=tmp_path, env=environment).returncode == 0
    data = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert data["base"]["commit"] == model
    assert [(i["ref"], i["revision"]) for i in data["inputs"]] == [("acme/rows", rows)]

    moved = hub.push("models/acme/tiny", tiny | {"README.md": CARD + b"Moved.\n"})
    stopped = run_train(recipe, env=environment)
    assert stopped.returncode == 4
    assert f"acme/tiny@main (commit {model}, now {moved})" in line(stopped), stopped.stderr
    pinned = ["--set", f"model.base=acme/tiny@{model}", "--set", f"output={tmp_path / 'pinned'}"]
    trained = run_train(recipe, *pinned, env=environment)
    assert trained.returncode == 0, trained.stderr
    inputs = json.loads((tmp_path / "pinned" / "manifest.json").read_text())["inputs"]
    assert {i["ref"]: i["revision"] for i in inputs} == {f"acme/tiny@{model}": model, "acme/rows": rows}
    verdict = json.loads((tmp_path / "pinned" / "manifest.json").read_text())["verdict"]
    assert not verdict["provisional"] and verdict["verdict"].startswith("allow")

    # The data moves on after the training: neither is the run taken for one of the new rows, nor handed over as one.
    hub.push("datasets/acme/rows", {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": ROWS * 2})
    text = ["--licence-text", str(ROOT / "LICENSE")]
    refused = run_cli("export", str(recipe), *pinned, *text, cwd=tmp_path, env=environment)
    assert refused.returncode == 4 and "have changed since: acme/rows" in line(refused), refused.stderr


def test_a_base_that_moves_between_training_and_merging(hub: Hub, tiny: Files, tmp_path: Path) -> None:
    hub.push("models/acme/tiny", tiny)
    source = tmp_path / "rows.jsonl"
    source.write_bytes(ROWS)
    data = {"train": [{"path": str(source), "license": "mit"}], "eval": None}
    recipe, environment = recipe_file(tmp_path, data=data), hub.environment(tmp_path / "home")
    environment["PYTHONPATH"] = str(ROOT)
    trained = run_train(recipe, env=environment)
    assert trained.returncode == 0, trained.stderr
    weights = bytearray(tiny["model.safetensors"])
    weights[-1] ^= 1
    hub.push("models/acme/tiny", tiny | {"model.safetensors": bytes(weights)})
    text = ["--licence-text", str(ROOT / "LICENSE")]
    refused = run_cli("export", str(recipe), "--merged", *text, cwd=tmp_path, env=environment)
    assert refused.returncode == 4 and "acme/tiny@main (commit" in line(refused), refused.stderr


def test_what_the_hub_does_not_give(hub: Hub, tiny: Files, tmp_path: Path) -> None:
    hub.push("models/acme/closed", tiny, gated=True)
    hub.push("datasets/acme/closed", {"train.jsonl": ROWS}, gated=True)
    hub.push("datasets/acme/rows", {"train.jsonl": ROWS})
    recipe, environment = recipe_file(tmp_path), hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    for override, code, says in (
        (
            "model.base=acme/closed",
            2,
            f"acme/closed is gated: its owner gives it to those who ask; accept its terms on {hub.url}",
        ),
        ("model.base=acme/nowhere", 2, "acme/nowhere cannot be fetched: 404"),
        ("data.train=[{hub: acme/closed, license: mit}]", 4, "acme/closed: is gated"),
        ("data.train=[{hub: acme/nowhere, license: mit}]", 4, "acme/nowhere: cannot be loaded"),
    ):
        done = run_cli("prepare", str(recipe), "--set", override, cwd=tmp_path, env=environment)
        assert done.returncode == code and says in line(done), (override, done.stderr)
