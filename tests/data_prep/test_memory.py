"""Preparation holds batches of rows, never a file of them; a batch is small where rows are large."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, write_rows
from test_pipeline import chat, content, run, texts

from data_prep.assemble import read_rows

PEAK = """
import re, sys
from pathlib import Path
from data_prep.prepare import prepare
from recipes.load import load_recipe
kept = prepare(load_recipe(Path(sys.argv[1])), Path(sys.argv[2])).counts["train_rows"]
print(kept, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
STEPS = ["clean", "exact_dedup", "near_dedup"]


def test_rows_are_the_same_however_few_are_held(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(text, extra="x" * (n % 7 * 100)) for n, text in enumerate(texts(60, seed=2))]
    path = write_rows(tmp_path / "r.jsonl", [*rows, *rows[:9]])
    data = {"train": [{"path": str(path)}], "eval": {"fraction": 0.1}, "steps": STEPS}
    found: list[Any] = []
    for number, characters in enumerate((1 << 20, 1500, 1)):
        monkeypatch.setattr("data_prep.read_pass.CHARACTERS", characters)
        monkeypatch.setenv("RETORT_CACHE", str(tmp_path / f"cache{number}"))
        prepared = run(make_recipe, tmp_path / f"run{number}", **data)
        groups = pq.ParquetFile(prepared.folder / "train-00000.parquet").num_row_groups
        kept = {name: bytes_ for name, bytes_ in content(prepared).items() if not name.endswith("parquet")}
        found.append((read_rows(prepared.folder, "train"), read_rows(prepared.folder, "eval"), kept, groups))
    assert found[0][:3] == found[1][:3] == found[2][:3]
    assert found[0][3] == 1 and 10 < found[1][3] < 40 and found[2][3] == len(found[2][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_large_rows_take_no_more_memory_than_small_ones(
    kind: str, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    rng = random.Random(0)
    words = ["the", "house", "is", "red", "and", "old"]
    rows = [{"prompt": f"q{n}?", "completion": " ".join(rng.choices(words, k=25_000))} for n in range(100)]
    path = tmp_path / f"r.{kind}"
    if kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}x\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    recipe = make_recipe(data={"train": [{"path": str(path)}], "steps": ["exact_dedup"], "too_long": "truncate"})
    command = [sys.executable, "-c", PEAK, str(recipe), str(tmp_path / "run")]
    environment = {**os.environ, "RETORT_WORKERS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    kept, peak = map(int, done.stdout.split())
    assert kept == 100
    # The libraries alone take about 450 MiB. All rows together, 10 MB, took over a GiB.
    assert peak < 850 * 1024, f"{peak} KiB"
