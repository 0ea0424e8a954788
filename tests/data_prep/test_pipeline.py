"""The whole preparation: order of steps, cache, crashes, workers, splits and mixtures. Rows in = rows out + dropped."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import colour_rows, run_cli, write_rows

from data_prep import cache as work_cache
from data_prep.assemble import read_rows, shards
from data_prep.prepare import begin, prepare
from data_prep.tokens import load_tokenizer, shared_tokenizer
from recipes.errors import DataError, RetortError
from recipes.load import load_recipe
from recipes.schema import Model

WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti") for b in ("bel", "dor", "fin", "gam", "hul")
]


def texts(count: int, seed: int = 0, low: int = 20, high: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(low, high))) for _ in range(count)]


def chat(prompt: str, answer: str = "red", **extra: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def run(make_recipe: Callable[..., Path], folder: Path, **data: Any) -> Any:
    train = {"seq_len": 256, "tokens_per_step": 512, "max_steps": 2, "device": "cpu"}
    prepared = prepare(load_recipe(make_recipe(data=data, train=train)), folder)
    counts = prepared.counts
    assert counts["rows_in"] == counts["rows_out"] + sum(counts["dropped"].values())
    lines = (prepared.folder / "dropped.jsonl").read_text().splitlines()
    assert len(lines) == sum(counts["dropped"].values())
    return prepared


def ids(prepared: Any, part: str = "train") -> list[str]:
    return [row["_id"] for row in read_rows(prepared.folder, part)]


def content(prepared: Any) -> dict[str, bytes]:
    names = ("dropped.jsonl", "statistics.json")
    files = [*prepared.folder.glob("*.parquet"), *(prepared.folder / name for name in names)]
    return {path.name: path.read_bytes() for path in files}


def test_steps_run_in_order_and_every_drop_has_its_reason(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    a, b, c, d = texts(4)
    near = a.replace(a.split()[5], "zzz", 1)
    rows = [
        chat(a),
        chat(b),
        chat(a),
        chat(near),
        chat(c + " write to ann@example.com"),
        chat("ab"),
        chat(d + "\u200b\x07"),
    ]
    path = write_rows(tmp_path / "r.jsonl", rows)
    steps = ["clean", "exact_dedup", {"near_dedup": {"threshold": 0.7}}, {"length": {"min_tokens": 8}}, "pii"]
    prepared = run(make_recipe, tmp_path / "run", train=[{"path": str(path)}], steps=steps)
    assert prepared.counts["dropped"] == {"exact_duplicate": 1, "length": 1, "near_duplicate": 1}
    dropped = {d["reason"]: d for d in map(json.loads, (prepared.folder / "dropped.jsonl").open())}
    assert (
        dropped["exact_duplicate"]["_source"] == f"{path}:3" and dropped["exact_duplicate"]["detail"] == f"of {path}:1"
    )
    assert dropped["near_duplicate"]["_source"] == f"{path}:4" and dropped["near_duplicate"]["detail"] == f"of {path}:1"
    assert json.loads(dropped["near_duplicate"]["row"]["messages"])[0]["content"] == near
    kept = [row["messages"][0]["content"] for row in read_rows(prepared.folder, "train")]
    assert kept == [a, b, c + " write to [EMAIL_1]", d]


def test_a_comparison_sees_rows_as_they_are_when_its_turn_comes(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (a,) = texts(1)
    path = write_rows(tmp_path / "r.jsonl", [chat(a), chat(a + "\x07")])
    for steps, left in ((["exact_dedup", "clean"], 2), (["clean", "exact_dedup"], 1)):
        prepared = run(make_recipe, tmp_path / f"run{left}", train=[{"path": str(path)}], steps=steps)
        assert prepared.counts["train_rows"] == left
    # A row that a later step drops still counts as the first of its copies.
    path = write_rows(tmp_path / "s.jsonl", [chat("ab"), chat("ab"), chat(a)])
    steps = ["exact_dedup", {"length": {"min_tokens": 8}}]
    prepared = run(make_recipe, tmp_path / "later", train=[{"path": str(path)}], steps=steps)
    assert prepared.counts["dropped"] == {"exact_duplicate": 1, "length": 1}


def test_duplicates_across_sources_and_by_prompt(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    a, b = texts(2)
    one = write_rows(tmp_path / "one.jsonl", [chat(a, "red")])
    two = write_rows(tmp_path / "two.jsonl", [chat(a, "blue"), chat(b, "red")])
    sources = [{"path": str(one)}, {"path": str(two)}]
    prepared = run(make_recipe, tmp_path / "rows", train=sources, steps=["exact_dedup"])
    assert prepared.counts["dropped"] == {}
    prepared = run(make_recipe, tmp_path / "prompts", train=sources, steps=[{"exact_dedup": {"on": "prompt"}}])
    assert prepared.counts["dropped"] == {"exact_duplicate": 1}
    statistics = json.loads((prepared.folder / "statistics.json").read_text())
    assert statistics["sources"][1]["dropped"] == {"exact_duplicate": 1}
    assert statistics["clusters"] == [{"reason": "exact_duplicate", "size": 2, "places": [f"{one}:1", f"{two}:1"]}]


def test_groups_documents_and_near_prompts_never_straddle(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    base = texts(60, seed=3)
    rows = []
    for i, text in enumerate(base):
        rows.append(chat(text, "red", case=i // 3))
        rows.append(chat(text.replace(text.split()[0], "zzz", 1), "blue"))  # a near copy without a group
    random.Random(1).shuffle(rows)
    path = write_rows(tmp_path / "r.jsonl", rows)
    source = {"path": str(path), "group": "case"}
    with pytest.raises(DataError, match="has no column 'case'"):
        run(make_recipe, tmp_path / "missing", train=[source], eval={"fraction": 0.2})
    for row in rows:
        row.setdefault("case", f"own {row['messages'][0]['content']}")
    write_rows(path, rows)
    prepared = run(make_recipe, tmp_path / "run", train=[source], eval={"fraction": 0.2})
    sides = [read_rows(prepared.folder, part) for part in ("train", "eval")]
    assert len(sides[1]) == 24  # four groups of six: three texts and their near copies
    cases = [{row["extra"]["case"] for row in side if isinstance(row["extra"]["case"], int)} for side in sides]
    assert len(cases[1]) == 4 and not cases[0] & cases[1]
    tails = [{row["messages"][0]["content"].split(" ", 1)[1] for row in side} for side in sides]
    assert not tails[0] & tails[1]
    statistics = json.loads((prepared.folder / "statistics.json").read_text())
    assert statistics["groups"] == {"rows": 120, "groups": 20, "largest_share": 0.05}


def test_training_rows_stay_apart_from_given_held_out_rows(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    a, b, c, d = texts(4, seed=8)
    near = c.replace(c.split()[5], "zzz", 1)
    held = write_rows(tmp_path / "held.jsonl", [chat(a), chat(b, group="g"), chat(c), *(chat("x?") for _ in range(3))])
    rows = [chat(a), chat(a, "blue"), chat("Why?", group="g"), chat(near), chat(d), chat("Why?", group="h")]
    many = [chat("x?", text) for text in texts(30, seed=9)]  # an instruction, no question
    path = write_rows(tmp_path / "r.jsonl", [*rows, *many])
    data = {"train": [{"path": str(path)}], "eval": [{"path": str(held)}]}
    shared = {f"{path}:1": "the same as a held-out row", f"{path}:2": "the same prompt as a held-out row"}
    shared |= {f"{path}:3": "the same group as a held-out row"}
    prepared = run(make_recipe, tmp_path / "plain", **data)
    found = {line["_source"]: line["detail"] for line in map(json.loads, (prepared.folder / "dropped.jsonl").open())}
    assert found == shared and prepared.counts["dropped"] == {"in_eval": 3} and prepared.counts["eval_rows"] == 6
    prepared = run(make_recipe, tmp_path / "near", **data, steps=[{"near_dedup": {"threshold": 0.7}}])
    dropped = list(map(json.loads, (prepared.folder / "dropped.jsonl").open()))
    found = {line["_source"]: line["detail"] for line in dropped if line["reason"] == "in_eval"}
    shared[f"{path}:4"] = "nearly the same as a held-out row"
    del shared[f"{path}:2"]  # dropped before, as nearly the same as the first
    # Beside it the second "Why?", and two of the held-out rows.
    assert found == shared and prepared.counts["dropped"] == {"in_eval": 3, "near_duplicate": 4}


def test_one_large_group_cannot_be_split(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [chat(text, group="g") for text in texts(9)])
    with pytest.raises(DataError, match=r"data\.eval: too few rows or groups to hold any out \(9 of 9 rows"):
        run(make_recipe, tmp_path / "run", train=[{"path": str(path)}], eval={"fraction": 0.2})


def test_training_rows_that_overlap_are_dropped(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    questions = texts(6, seed=5, low=18, high=24)
    held = write_rows(tmp_path / "held.jsonl", [chat(questions[0])])
    known = tmp_path / "known.csv"
    known.write_text(f"question,answer\n{questions[1]},yes\n")
    told = " ".join(["well", *questions[2].split()[:5], "so", *questions[2].split()[5:]])
    rows = [chat(f"Please: {questions[0]}"), chat(questions[1]), chat(told), chat(questions[3])]
    path = write_rows(tmp_path / "r.jsonl", rows)
    benchmark = {"path": str(known), "columns": {"text": "question"}}
    step = {"decontaminate": {"against": ["eval", benchmark], "similarity": None}}
    data = {"train": [{"path": str(path)}], "eval": [{"path": str(held)}], "steps": [step]}
    prepared = run(make_recipe, tmp_path / "run", **data)
    assert prepared.counts["dropped"] == {"contaminated": 2} and prepared.counts["eval_rows"] == 1
    details = [json.loads(line)["detail"] for line in (prepared.folder / "dropped.jsonl").open()]
    assert details[0].startswith(f"n-gram of {held}:1, 100%: {questions[0].split()[0]}"), details
    assert details[1].startswith(f"n-gram of {known}:2, 100%: ")
    assert [i["role"] for i in prepared.manifest["inputs"]] == ["data", "eval", "benchmark"]
    # Rows held out of the training sources themselves are compared with as well.
    own, other = texts(40, seed=6, low=18, high=20), texts(40, seed=7, low=18, high=20)
    both = [chat(f"{there} {' '.join(here.split()[:14])}") for here, there in zip(own, other, strict=True)]
    path = write_rows(tmp_path / "s.jsonl", [*map(chat, own), *both])
    data = {"train": [{"path": str(path)}], "eval": {"fraction": 0.2, "near": None}, "steps": ["decontaminate"]}
    prepared = run(make_recipe, tmp_path / "split", **data)
    assert prepared.counts["eval_rows"] == 16 and 8 <= prepared.counts["dropped"]["contaminated"] <= 16


def test_a_mixture_keeps_its_proportions(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [chat(t) for t in texts(90, seed=1)])
    two = write_rows(tmp_path / "two.jsonl", [chat(t) for t in texts(20, seed=2)])
    sources = [{"path": str(one), "weight": 3.0}, {"path": str(two), "weight": 1.0}]
    prepared = run(make_recipe, tmp_path / "run", train=sources)
    assert prepared.counts["dropped"] == {"mixture": 30}
    by_source = json.loads((prepared.folder / "statistics.json").read_text())["sources"]
    assert [line["train"] for line in by_source] == [60, 20]
    with pytest.raises(RetortError, match="either every training source has a weight, or none"):
        run(make_recipe, tmp_path / "other", train=[sources[0], {"path": str(two)}])


def test_long_texts_are_split_into_windows_that_hold_every_token(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"text": t} for t in texts(3, low=200, high=300)])
    data = {"train": [{"path": str(path)}], "too_long": "split"}
    recipe = load_recipe(make_recipe(data=data, method={"type": "sft", "on": "text"}))
    prepared = prepare(recipe, tmp_path / "run")
    rows = read_rows(prepared.folder, "train")
    assert prepared.counts["rows_out"] == 3 and prepared.counts["train_rows"] == len(rows) > 9
    assert all(len(row["input_ids"]) <= 128 and all(row["loss_mask"]) for row in rows)
    tokenizer = prepared.tokenizer.backend
    for text in (json.loads(line)["text"] for line in path.open()):
        whole = [row for row in rows if row["text"] == text]
        assert [row["_id"].rsplit("-", 1)[1] for row in whole] == [str(n) for n in range(len(whole))]
        assert tokenizer.decode([t for row in whole for t in row["input_ids"]]) == text + "<|im_end|>"
        assert {row["_group"] for row in whole} == {whole[0]["_id"].rsplit("-", 1)[0]}


def made_entries(folder: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in folder.glob("*/*/*/rows.parquet")} | {
        str(p): p.stat().st_mtime_ns for p in folder.glob("*/*/*/train.parquet")
    }


def test_an_edited_file_redoes_only_what_depends_on_it(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a", "b", "c"):
        # larger than what small files share a piece up to
        write_rows(folder / f"{name}.jsonl", [chat("x?", t) for t in texts(2500, seed=ord(name), low=80, high=120)])
    data = {"train": [{"path": str(folder)}], "steps": ["exact_dedup"], "too_long": "truncate"}
    first = run(make_recipe, tmp_path / "one", **data)
    entries = made_entries(tmp_path / ".retort-cache")
    assert len(entries) == 6  # three files, two passes
    write_rows(folder / "b.jsonl", [chat("x?", t) for t in texts(2500, seed=9, low=80, high=120)])
    second = run(make_recipe, tmp_path / "two", **data)
    assert content(first) != content(second)
    after = made_entries(tmp_path / ".retort-cache")
    assert len(after) == 8 and all(after[path] == when for path, when in entries.items())
    # Another chat template: tokens are made anew, rows are not.
    template = tmp_path / "other.jinja"
    tokenizer = first.tokenizer.backend
    template.write_text(tokenizer.chat_template.replace("<|im_start|>", "<|im_end|><|im_start|>"))
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"model.chat_template={template}"])
    prepare(recipe, tmp_path / "three")
    names = [Path(path).name for path in made_entries(tmp_path / ".retort-cache").keys() - after.keys()]
    assert names == ["train.parquet"] * 3


STEPS = ["clean", {"near_dedup": {"threshold": 0.8}}, "exact_dedup", {"decontaminate": {"similarity": None}}]


@pytest.mark.parametrize(
    ("change", "rows", "tokens"),
    [
        ({}, 0, 0),
        ({"steps": [*STEPS[:3], {"decontaminate": {"words": 12, "similarity": None}}]}, 0, 3),
        ({"steps": STEPS[:3]}, 0, 3),
        ({"steps": [STEPS[0], {"near_dedup": {"threshold": 0.801}}, *STEPS[2:]]}, 0, 0),
        ({"steps": [STEPS[0], {"near_dedup": {"threshold": 0.3}}, *STEPS[2:]]}, 3, 0),  # other bands
        ({"steps": [STEPS[0], {"near_dedup": {"threshold": 0.8, "words": 2}}, *STEPS[2:]]}, 3, 0),
        ({"steps": STEPS[1:]}, 3, 0),
        ({"too_long": "drop"}, 0, 3),
        ({"on_bad_row": "drop"}, 3, 3),
    ],
)
def test_what_is_made_anew_after_a_change(
    change: dict[str, Any], rows: int, tokens: int, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", [chat(t) for t in texts(20, seed=n)]) for n in range(3)]
    data = {"train": [{"path": str(p)} for p in paths[:2]], "eval": [{"path": str(paths[2])}], "steps": STEPS}
    data |= {"too_long": "truncate"}
    run(make_recipe, tmp_path / "one", **data)
    before = made_entries(tmp_path / ".retort-cache")
    run(make_recipe, tmp_path / "two", **{**data, **change})
    made = [Path(path).name for path in made_entries(tmp_path / ".retort-cache").keys() - before.keys()]
    assert (made.count("rows.parquet"), made.count("train.parquet")) == (rows, tokens)


def test_any_number_of_workers_gives_the_same_bytes(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(t) for t in texts(3000, low=30, high=60)]
    paths = [write_rows(tmp_path / f"{n}.jsonl", rows[n::3] + rows[:50]) for n in range(3)]
    steps = ["clean", "exact_dedup", {"near_dedup": {"threshold": 0.7}}]
    data = {"train": [{"path": str(p), "limit": 2000} for p in paths], "steps": steps, "eval": {"fraction": 0.1}}
    found = []
    for count in (1, 3):
        monkeypatch.setenv("RETORT_WORKERS", str(count))
        monkeypatch.setenv("RETORT_CACHE", str(tmp_path / f"cache{count}"))
        found.append(content(run(make_recipe, tmp_path / f"run{count}", **data)))
    assert found[0] == found[1]


def loads_a_tokenizer(_: int) -> tuple[int, int, bool]:
    """Modules that a process imports for its first tokenizer, and how it looks for cycles."""
    before = set(sys.modules)
    load_tokenizer(Model(base="embedded:tiny"))
    return len(set(sys.modules) - before), gc.get_threshold()[0], gc.get_freeze_count() > 100_000


def test_processes_begin_with_all_that_they_need() -> None:
    found = list(work_cache.run_jobs(loads_a_tokenizer, [1, 2], 2, "loading"))
    assert found == [(0, work_cache.GC_THRESHOLD, True)] * 2
    before = gc.get_threshold()
    ((_, threshold, _),) = work_cache.run_jobs(loads_a_tokenizer, [1], 1, "loading")
    assert threshold == work_cache.GC_THRESHOLD
    assert gc.get_threshold() == before


def test_a_process_loads_a_tokenizer_once_while_its_files_stay(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    first = shared_tokenizer(Model(base=str(folder)))
    assert shared_tokenizer(Model(base=str(folder))) is first
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    second = shared_tokenizer(Model(base=str(folder)))
    assert second.backend.chat_template == first.backend.chat_template + " "
    assert second.fingerprint != first.fingerprint


def test_an_error_in_a_worker_is_the_first_in_order(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_WORKERS", "2")
    paths = [write_rows(tmp_path / f"{n}.jsonl", [chat("x"), {"messages": n}]) for n in range(3)]
    data = {"train": [{"path": str(p), "limit": 9} for p in paths]}
    with pytest.raises(DataError, match=r"0\.jsonl:2: 'messages' must be a list"):
        run(make_recipe, tmp_path / "run", **data)


def test_a_dropped_row_is_kept_whatever_it_holds(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a \\ud800 b", "completion": "c"}\n' + json.dumps(chat("x?")) + "\n")
    prepared = run(make_recipe, tmp_path / "run", train=[{"path": str(path)}], on_bad_row="drop")
    (line,) = map(json.loads, (prepared.folder / "dropped.jsonl").open())
    assert line["reason"] == "bad_row" and "surrogate" in line["detail"]
    assert line["record"] == {"prompt": "a \ud800 b", "completion": "c"}


def test_old_entries_are_swept(tmp_path: Path) -> None:
    old, young = tmp_path / "rows" / "aa" / "aa1", tmp_path / "rows" / "bb" / "bb1"
    for folder in (old, young):
        folder.mkdir(parents=True)
    month = time.time() - 40 * 86_400
    os.utime(old, (month, month))
    work_cache.sweep(tmp_path)
    assert not old.exists() and young.exists()


def test_a_full_disk_while_preparing_is_one_line(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.write_text("a file where the cache should be")
    done = run_cli(
        "prepare", str(make_recipe()), cwd=tmp_path, env={**os.environ, "RETORT_CACHE": str(locked / "cache")}
    )
    assert done.returncode == 1 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_shards_are_cut_at_a_number_of_rows(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.assemble.SHARD_ROWS", 100)
    paths = [write_rows(tmp_path / f"{n}.jsonl", [chat(t) for t in texts(120, seed=n)]) for n in range(3)]
    prepared = run(make_recipe, tmp_path / "run", train=[{"path": str(p), "limit": 500} for p in paths])
    assert [path.name for path in shards(prepared.folder, "train")] == [f"train-{n:05d}.parquet" for n in range(3)]
    assert len(ids(prepared)) == 360 and len(set(ids(prepared))) == 360
    assert len(read_rows(prepared.folder, "train", 7)) == 7


def test_a_large_file_is_read_in_parts_and_small_ones_share_a_piece(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.tables.PART_BYTES", 20_000)
    rows = colour_rows(900)
    whole = write_rows(tmp_path / "whole.jsonl", rows)
    recipe = load_recipe(make_recipe(data={"train": [{"path": str(whole)}]}))
    work = begin(recipe, tmp_path / "run")
    parts = [part for piece in work.scans[0][2].pieces for part in piece.parts]
    assert len(parts) > 5 and parts[0].start == 0
    assert all(a.end == b.start for a, b in pairwise(parts))
    stored = read_rows(prepare(recipe, tmp_path / "run").folder, "train")
    assert [row["_source"] for row in stored] == [f"{whole}:{n}" for n in range(1, 901)]
    assert [row["extra"]["number"] for row in stored] == list(range(900))
    many = tmp_path / "many"
    many.mkdir()
    for n in range(200):
        write_rows(many / f"{n:03}.jsonl", rows[n : n + 1])
    recipe = load_recipe(make_recipe(data={"train": [{"path": str(many)}]}))
    before = begin(recipe, tmp_path / "run").scans[0][2].pieces
    assert 2 <= len(before) <= 20
    write_rows(many / "100x.jsonl", rows[:1])
    after = begin(recipe, tmp_path / "run").scans[0][2].pieces
    assert len({p.key for p in after} - {p.key for p in before}) <= 2, "a new file changes its own group"
