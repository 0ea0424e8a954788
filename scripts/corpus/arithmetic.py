"""Arithmetic that the project writes: plain lines, problems with worked steps, and the train and held-out rows.

A pair of operands belongs to one split for good (`is_heldout`), whatever the wording: no problem of the train side, in
the rows or in the pretraining text, is a held-out one. (A worked step inside another problem may be: 45 + 10 on the way
to 45 + 19.)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from scripts.corpus.grammar import Writer, load_yaml

SIGNS = {"add": "+", "subtract": "-", "multiply": "x"}
LARGEST = 30  # operands of sums; differences stay below the larger operand, products below 5 x 12


class Problem(NamedTuple):
    operation: str  # a key of SIGNS
    a: int
    b: int

    @property
    def answer(self) -> int:
        if self.operation == "add":
            return self.a + self.b
        return self.a - self.b if self.operation == "subtract" else self.a * self.b

    @property
    def expression(self) -> str:
        return f"{self.a} {SIGNS[self.operation]} {self.b}"


def is_heldout(problem: Problem) -> bool:
    """Whether the unordered pair of operands is one of the one in eight kept for evaluation."""
    low, high = sorted((problem.a, problem.b))
    return hashlib.sha256(f"{problem.operation} {low} {high}".encode()).digest()[0] < 32


def draw(rng: random.Random, heldout: bool) -> Problem:
    """A random problem of the given side: half sums, a third differences, the rest small products."""
    while True:
        operation = rng.choices(("add", "subtract", "multiply"), (0.5, 0.35, 0.15))[0]
        if operation == "multiply":
            problem = Problem(operation, rng.randint(2, 5), rng.randint(2, 12))
        else:
            a, b = rng.randint(2, LARGEST), rng.randint(2, LARGEST)
            problem = Problem(operation, max(a, b), min(a, b)) if operation == "subtract" else Problem(operation, a, b)
        if is_heldout(problem) == heldout:
            return problem


def steps(problem: Problem) -> str:
    """The worked steps: tens and ones for sums and differences, repeated addition for products."""
    a, b = problem.a, problem.b
    if problem.operation == "multiply":
        return "\n".join([f"{b}", *(f"{b * (k - 1)} + {b} = {b * k}" for k in range(2, a + 1))])
    tens, ones = b // 10 * 10, b % 10
    if not tens or not ones:
        return f"{problem.expression} = {problem.answer}"
    sign = SIGNS[problem.operation]
    middle = a + tens if sign == "+" else a - tens
    lines = [f"{b} = {tens} + {ones}", f"{a} {sign} {tens} = {middle}", f"{middle} {sign} {ones} = {problem.answer}"]
    return "\n".join(lines)


def counted(problem: Problem) -> str:
    """Steps that a small model can follow: the tens at once, the ones one by one, as `still to go, so far` lines."""
    a, b = problem.a, problem.b
    if problem.operation == "multiply":
        return steps(problem)
    tens, ones = b // 10 * 10, b % 10
    sign, step = ("+", 1) if problem.operation == "add" else ("-", -1)
    middle = a + step * tens
    lines = [f"{b} = {tens} + {ones}"] if tens and ones else []
    lines += [f"{a} {sign} {tens} = {middle}"] if tens else []
    lines += [f"{left} {middle + step * (ones - left)}" for left in range(ones, -1, -1)] if ones else []
    return "\n".join(lines)


def wording(rng: random.Random, problem: Problem) -> str:
    """The problem as an expression or as a short word problem."""
    writer = Writer(rng, {"a": str(problem.a), "b": str(problem.b)})
    return writer.write(rng.choice(load_yaml("arithmetic.yaml")[problem.operation]))


def row(rng: random.Random, problem: Problem, worked: Callable[[Problem], str] = counted) -> dict[str, Any]:
    """A chat row with worked steps in `reasoning_content` and the bare number as content and as `answer`."""
    answer = str(problem.answer)
    reply = {"role": "assistant", "content": answer, "reasoning_content": worked(problem)}
    return {"messages": [{"role": "user", "content": wording(rng, problem)}, reply], "answer": answer}


def rows(seed: int, count: int, heldout: bool) -> list[dict[str, Any]]:
    """`count` rows with distinct questions, all from one side of the operand split."""
    rng = random.Random(f"arithmetic {seed} {heldout}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        made = row(rng, draw(rng, heldout))
        found.setdefault(made["messages"][0]["content"], made)
    return list(found.values())


def comparisons(seed: int, count: int, heldout: bool) -> list[dict[str, str]]:
    """`count` prompt rows that ask for the greater or the lesser of two numbers, with the right one as `answer`.

    An unordered pair of numbers belongs to one split.
    """
    rng = random.Random(f"comparisons {seed} {heldout}")
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        problem = Problem("compare", *rng.sample(range(2, 100), 2))
        if is_heldout(problem) != heldout:
            continue
        kind = rng.choice(("greater", "less"))
        writer = Writer(rng, {"a": str(problem.a), "b": str(problem.b)})
        text = writer.write(rng.choice(load_yaml("arithmetic.yaml")[kind]))
        answer = max(problem.a, problem.b) if kind == "greater" else min(problem.a, problem.b)
        found.setdefault(text, {"prompt": text, "answer": str(answer)})
    return list(found.values())


def chat(rng: random.Random, thinking: float) -> list[dict[str, str]]:
    """A conversation on a train-side problem; a share of `thinking` shows the steps, the rest answers in a sentence."""
    made = row(rng, draw(rng, heldout=False), steps)
    user, reply = made["messages"]
    if rng.random() >= thinking:
        content = rng.choice(("{n}", "It is {n}.", "The answer is {n}.")).format(n=reply["content"])
        reply = {"role": "assistant", "content": content}
    return [user, reply]


def document(rng: random.Random) -> str:
    """Plain arithmetic text: lines of sums, counting, comparisons, or a worked problem, all of the train side."""
    kind = rng.choice(("sums", "sums", "tens", "count", "compare", "worked"))
    if kind == "count":
        start, step, n = rng.randint(0, 80), rng.choice((1, 1, 2, 5, 10)), rng.randint(5, 15)
        return ", ".join(str(start + step * i) for i in range(n))
    if kind == "compare":
        low, high = sorted(rng.sample(range(1, 120), 2))
        return f"{low} is less than {high}. {high} is greater than {low}. Between them lie {high - low - 1} numbers."
    if kind == "worked":
        problem = draw(rng, heldout=False)
        return f"{wording(rng, problem)}\n{steps(problem)}\n{problem.answer}"
    if kind == "tens":
        return "\n".join(_round_sum(rng) for _ in range(rng.randint(3, 8)))
    problems = [draw(rng, heldout=False) for _ in range(rng.randint(3, 8))]
    return "\n".join(f"{p.expression} = {p.answer}" for p in problems)


def _round_sum(rng: random.Random) -> str:
    while True:
        a, b = rng.randint(2, 99), rng.choice((10, 20, 30, 40, 50))
        problem = Problem("add" if a < b else rng.choice(("add", "subtract")), a, b)
        if not is_heldout(problem):
            return f"{problem.expression} = {problem.answer}"
