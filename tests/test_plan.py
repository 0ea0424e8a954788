"""What `retort plan` says before anything is prepared: every format counted, estimates of the texts, marked as such."""

from __future__ import annotations

import csv
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, colour_rows, write_rows

from data_prep.prepare import prepare
from recipes.errors import DataError
from recipes.load import load_recipe
from scripts.plan import describe, make_plan

PAIRS = [
    {"prompt": f"What is {n} times three?", "completion": f"It is {3 * n}.", "note": "x" * 400} for n in range(900)
]


def written(path: Path) -> Path:
    """The same 900 rows in the format of the ending."""
    text = "".join(json.dumps(row) + "\n\n" for row in PAIRS)
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(text)
    elif path.suffix == ".json":
        path.write_text(json.dumps(PAIRS, indent=1))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(PAIRS), path)
    else:
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, PAIRS[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(PAIRS)
    return path


def planned(folder: Path, data: dict[str, Any], **sections: Any) -> dict[str, Any]:
    recipe = {"name": "x", "output": str(folder / "run"), "model": {"base": "embedded:tiny"}, "data": data, **sections}
    (folder / "r.yaml").write_text(json.dumps(recipe))
    return make_plan(load_recipe(folder / "r.yaml"))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet"])
def test_rows_of_every_format_are_counted_and_their_texts_alone_estimated(ending: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"rows{ending}")
    plan = planned(tmp_path, {"train": [{"path": str(path)}], "eval": {"fraction": 0.1}})
    assert plan["data"]["sources"] == {str(path): 900} and plan["data"]["train_rows"] == 810
    # two turns of 5 tokens, and about 8 and 4 tokens of text; the 400 letters of `note` are not trained
    assert 18 < plan["data"]["mean_tokens"] < 32
    said = "\n".join(describe(plan))
    assert "steps    about " in said and "in 810 training rows, estimated from 2" in said
    few = planned(tmp_path, {"train": [{"path": str(path), "limit": 7}]})["data"]
    assert (few["train_rows"], few["sampled_rows"]) == (7, 7)


def test_the_estimate_of_the_main_job_is_what_its_run_does() -> None:
    """1,020 steps of 6 rows; the syntax of JSON once counted as text, and made a fifth more, of 5 of them."""
    plan = make_plan(load_recipe(ROOT / "recipes" / "legal.yaml", ["output=/nonexistent/run"]))
    assert plan["layout"]["rows_per_step"] == 6 and abs(plan["layout"]["steps"] - 1020) <= 20


@pytest.mark.parametrize("policy", ["drop", "truncate"])
@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("sft", PAIRS[:80]),
        ("dpo", [{"prompt": f"Count to {n}.", "chosen": "one " * (n % 9 + 1), "rejected": "no"} for n in range(80)]),
        ("kto", [{"prompt": f"Count to {n}.", "chosen": "one " * (n % 9 + 1), "rejected": "no"} for n in range(80)]),
    ],
)
def test_the_estimate_is_near_what_preparation_counts(
    method: str, rows: list[dict[str, Any]], policy: str, tmp_path: Path
) -> None:
    answer = "chosen" if "chosen" in rows[0] else "completion"
    long = [{**rows[0], answer: f"{n} word" * 200} for n in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *long])
    data = {"train": [{"path": str(path)}], "too_long": policy}
    about = planned(tmp_path, data, method=method, train={"seq_len": 64})["data"]
    recipe = load_recipe(tmp_path / "r.yaml")
    counts = prepare(recipe, recipe.run_dir).counts
    assert about["train_rows"] == counts["train_rows"]
    assert about["mean_tokens"] == pytest.approx(counts["train_tokens"] / counts["train_rows"], rel=0.15)
    assert make_plan(recipe)["data"]["prepared"]


def test_what_cannot_be_counted_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.md").write_text("# A\n\nSome words.\n")
    data = {"train": [{"hub": "a/b@main"}, {"path": str(tmp_path / "text.md")}]}
    plan = planned(tmp_path, data, method={"type": "sft", "on": "text"})
    said = "\n".join(describe(plan))
    assert "a/b@main: unknown rows (on the hub)" in said and "text.md: unknown rows (documents" in said
    assert "steps    not known before the rows are counted, nor are tokens and layout: `retort prepare` does" in said


def test_a_row_that_preparation_stops_at_is_named_and_one_that_it_drops_is_not_counted(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "mixed.jsonl", [*colour_rows(30), *({"text": "plain"} for _ in range(10))])
    data: dict[str, Any] = {"train": [{"path": str(path)}]}
    with pytest.raises(DataError, match=r"mixed.jsonl:31: is plain text without an assistant turn"):
        planned(tmp_path, data)
    assert planned(tmp_path, {**data, "on_bad_row": "drop"})["data"]["train_rows"] == 30


def test_rows_are_not_read_for_a_verdict_that_is_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text((json.dumps(PAIRS[0]) + "\n") * 60_000)
    data = {"train": [{"path": str(path), "license": "CC0-1.0"}]}
    taken = []
    for sections in ({}, {"use": {"purpose": "internal", "distribute": False}}):
        start = time.monotonic()
        plan = planned(tmp_path, data, **sections)
        taken.append(time.monotonic() - start)
        assert (plan["verdict"]["verdict"] == "not judged") is not bool(sections)
    assert taken[0] < taken[1] / 2, taken
