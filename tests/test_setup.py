"""Cards and the torch that suits them: what scripts/setup installs, and what a run says when the two do not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_cli

# A python3 and a pip that only write down what they are asked: what is tested is which of it scripts/setup asks for.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"-m venv "*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    *"torch.version.cuda"*) [ -e "$TORCH_FOR_CPU" ] ;;
    *"uninstall"*) rm "$TORCH_FOR_CPU"; echo "uninstall" >>"$LOG" ;;
    *"+cpu"* | *whl/cpu*) touch "$TORCH_FOR_CPU"; echo "install for processors" >>"$LOG" ;;
    *"install"*"torch=="*) echo "install for cards" >>"$LOG" ;;
    *"install"*) echo "install retort" >>"$LOG" ;;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """A folder with the driver's program, as a machine with a card has it."""
    return program(tmp_path / "driver" / "nvidia-smi", '#!/bin/sh\necho "24564, NVIDIA GeForce RTX 4090"\n').parent


@pytest.fixture
def setup(tmp_path: Path) -> Callable[..., list[str]]:
    """A function that runs a copy of scripts/setup and says what it installed."""
    root, log = tmp_path / "house", tmp_path / "log"
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    program(tmp_path / "bin" / "python3", PYTHON)

    def run(*options: str, driver: Path | None = None) -> list[str]:
        log.write_text("")
        path = [str(p) for p in (driver, tmp_path / "bin", "/usr/bin", "/bin") if p is not None]
        env = {"PATH": ":".join(path), "LOG": str(log), "TORCH_FOR_CPU": str(tmp_path / "cpu-build")}
        done = subprocess.run([str(root / "scripts" / "setup"), *options], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    return run


@pytest.mark.skipif(bool(shutil.which("nvidia-smi", path="/usr/bin:/bin")), reason="this machine has a driver")
def test_an_environment_made_before_the_driver_gets_the_torch_for_cards(
    setup: Callable[..., list[str]], card: Path
) -> None:
    assert setup() == ["install for processors", "install retort"]
    assert setup() == []
    assert setup(driver=card) == ["uninstall", "install for cards", "install retort"]
    assert setup(driver=card) == [] and setup() == [], "a torch for cards serves a machine without one"
    assert setup("--dev", driver=card) == ["install for cards", "install retort"]
    assert setup(driver=card) == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for cards")
@pytest.mark.parametrize(
    ("visible", "sets", "code", "says"),
    [
        (None, (), 2, "NVIDIA GeForce RTX 4090 answers, but the torch installed here cannot use it; run scripts/setup"),
        (None, ("train.device=cpu",), 0, ""),
        ("0", (), 2, "cannot use it"),
        ("", (), 0, ""),
        ("-1", (), 0, ""),
        ("", ("train.device=cuda",), 2, "no NVIDIA card answers (CUDA_VISIBLE_DEVICES is '')"),
    ],
)
def test_a_driver_beside_a_torch_for_processors_is_one_line(
    visible: str | None, sets: tuple[str, ...], code: int, says: str, card: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(
        "name: x\nmodel: {base: embedded:tiny}\ndata: {train: [{path: rows.jsonl}]}\ntrain: {seq_len: 64}\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    env |= {"PATH": f"{card}:{env['PATH']}"} | ({"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {})
    options = [part for text in sets for part in ("--set", text)]
    done = run_cli("plan", "r.yaml", *options, cwd=tmp_path, env=env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and says in done.stderr
    if not code:
        assert "processor cores" in done.stdout
