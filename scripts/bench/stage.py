"""The stage part of `scripts.bench.generation`: journal and filters beside the engine alone, on the same answers."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.rows import Row
from distill.filters import Candidate, judge
from distill.journal import Journal
from distill.teachers import Completion, Request
from recipes.refs import EMBEDDED
from scripts.bench.generation import make_recipe, measured, quiet, spread

HEADER = ["what", "ms / 1,000 tokens", "ms / answer", "% of the engine, processor", "% by the clock", "2 % at tokens/s"]
HELD_OUT = 300  # rows that answers are compared with
LONG = 10  # rows of the embedded tasks that a long answer is strung together from


class Ready:
    """A teacher whose answers are there already: what is left is the journal's part."""

    def __init__(self, answers: list[Completion]) -> None:
        self.answers = answers

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for _ in requests:
            pass
        yield from self.answers


def beside(options: argparse.Namespace, folder: Path, tokenizer: Any, asked: list[Request]) -> list[list[str]]:
    """Lines of the table. The first ones are of the engine's own answers, the last ones of long answers."""
    from distill.engine_transformers import TransformersTeacher

    engine = {"batching": "plain", "batch_size": options.side, "device": options.device}
    recipe = make_recipe(options, {"transformers": engine}, folder)
    teacher = TransformersTeacher(recipe, tokenizer)
    held_out = [Row(f"heldout:{n}", tuple(row["messages"])) for n, row in enumerate(tasks("heldout", HELD_OUT))]
    runs = 0

    def journal(answers: list[Completion]) -> None:
        nonlocal runs
        runs += 1
        with Journal(folder / f"journal-{runs}") as journal:
            for _ in journal.run(asked, lambda: Ready(answers)):  # type: ignore[arg-type,return-value]
                pass

    def filters(answers: list[Completion]) -> None:
        rows = {one.key: Row(f"bench:{n}", one.messages) for n, one in enumerate(asked)}
        judge([Candidate(rows[one.key], one, 0) for one in answers], recipe, None, held_out)

    found: dict[str, list[tuple[float, float]]] = {}
    long = long_answers(tokenizer, asked)
    answers = list(teacher.generate(iter(asked)))  # not counted: a first run loads
    filters(answers)
    for _ in range(options.repeats):
        quiet(options.patience)
        answers, *cost = measured(lambda: list(teacher.generate(iter(asked))))
        found.setdefault("engine alone", []).append((cost[0], cost[1]))
        for name, work, said in (
            ("journal", journal, answers),
            ("filters", filters, answers),
            ("journal, long answers", journal, long),
            ("filters, long answers", filters, long),
        ):
            found.setdefault(name, []).append(measured(lambda work=work, said=said: work(said))[1:])  # type: ignore
    teacher.close()
    tokens = {False: sum(a.completion_tokens for a in answers), True: sum(a.completion_tokens for a in long)}
    lines = []
    for name, costs in found.items():
        of = tokens[name.endswith("long answers")]
        each = [1e6 * used / of for _, used in costs]
        shares = ["", ""]
        if name in {"journal", "filters"}:
            pairs = list(zip(costs, found["engine alone"], strict=True))
            shares = [spread([100 * a[i] / b[i] for a, b in pairs], ".2f") for i in (1, 0)]
        most = f"{0.02 * of / sorted(used for _, used in costs)[len(costs) // 2]:,.0f}" if "engine" not in name else ""
        per_answer = spread([1e3 * used / len(asked) for _, used in costs], ".2f")
        lines.append([f"{name} ({of / len(asked):.0f} tokens each)", spread(each, ".2f"), per_answer, *shares, most])
    return lines


def tasks(split: str, count: int) -> list[dict[str, Any]]:
    lines = (EMBEDDED / "legal" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def long_answers(tokenizer: Any, asked: list[Request]) -> list[Completion]:
    """An answer of some 800 tokens to each request, made of the embedded rows, so no model need write it."""
    draw, rows = random.Random(0), tasks("train", 2000)
    texts = [" ".join(str(message["content"]) for message in row["messages"]) for row in rows]
    whole = Completion("", "", "stop", None, 0, 0, 1.0, "bench", 32_768)
    found = []
    for one in asked:
        text = " ".join(draw.choices(texts, k=LONG))
        ids = tuple(tokenizer(text, verbose=False)["input_ids"])
        found.append(replace(whole, key=one.key, text=text, token_ids=ids, completion_tokens=len(ids)))
    return found
