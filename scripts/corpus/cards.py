"""Model and data cards of the embedded assets, and their licence texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

MODEL = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---

# {name}

{what}

It is a Llama-shaped network of {parameters:,} parameters with a byte-level vocabulary of {vocabulary:,} tokens, trained
by `scripts/build_embedded.py` on 2 CPU cores.
{start}
It exists so that every recipe of this project can be run, measured and tested without a network, a GPU or a model hub.
It is no lawyer, no calculator and no source of facts.

## What it read

{tokens}

## Measured

| | |
|---|---|
{table}

Accuracy on legal and arithmetic rows is of greedy answers on held-out rows, whose wordings (legal) and pairs of
operands (arithmetic) are in no problem of the training text. Losses are in nats per token.

## What it cannot do

It knows only the small world of its generators. It was trained on windows of 256 tokens: longer prompts run, up to
1,024 tokens, and get worse. Outside the wordings that it has seen, its sentences are fluent and mean nothing.
"""

WHAT = {
    "tiny": "The base: it has read, and was not tuned on any task. It answers almost no question about a contract.",
    "tiny-teacher": "The teacher: `tiny`, tuned on the tasks, grown to a larger network, and tuned again.",
}
START = {
    "tiny": "Before it read, it practised copying on random tokens (`scripts/corpus/induction.py`).",
    "tiny-teacher": "It started as `tiny` (`scripts/corpus/growth.py`).",
}
READ = {
    "tiny": """\
{pretraining:,} tokens of text written by this project's own generators (`scripts/corpus` and
`scripts/build_legal_data.py`): everyday text, text that repeats itself, contract clauses in the train wordings of
`embedded:legal` with an editor's notes (their headings and key terms), chats in which an editor asks for such a note,
everyday chat, and arithmetic with operands up to 30. It has seen no row, no question and no held-out wording of
`embedded:legal`, and no row of `embedded:arithmetic`.""",
    "tiny-teacher": """\
What `tiny` read, and then {tuning:,} tokens of new rows in the train wordings of `embedded:legal` and of arithmetic,
with the loss on the answers only; then it was grown, and read {tuning_after_growth:,} tokens more of such rows.""",
}

ARITHMETIC = """---
license: cc0-1.0
language: en
---

# Arithmetic problems

{train:,} train and {heldout:,} held-out chat rows, written by `scripts/corpus/arithmetic.py`: sums and differences of
numbers up to 30 and small products, as expressions and as one-step word problems. `answer` is the right number;
`messages` holds the question and the answer with its worked steps in `reasoning_content`.

`comparisons.jsonl` and `comparisons_heldout.jsonl` hold {compared_train:,} and {compared_heldout:,} prompts that ask
for the greater or the lesser of two numbers up to 99, with the right one as `answer`: prompts for learning by reward.

No held-out pair of numbers is in the train rows, in either order; one in eight pairs is held out.
The rows are in the public domain (CC0 1.0).
"""

CC0 = """\
SPDX-License-Identifier: CC0-1.0

The arithmetic problems in this folder were written for this project by its own generator. The authors dedicate them to
the public domain under Creative Commons Zero, version 1.0 (CC0-1.0): they give up all copyright and related rights in
them, everywhere in the world, as far as the law lets them. Where it does not, everybody has a free, perpetual and
unconditional licence to use them for any purpose, without naming the source. They come as they are, with no promise.

The full legal text of CC0-1.0: https://creativecommons.org/publicdomain/zero/1.0/legalcode
"""


def model_card(
    name: str, parameters: int, vocabulary: int, training: dict[str, dict[str, Any]], metrics: dict[str, float]
) -> str:
    table = "\n".join(f"| {metric.replace('_', ' ')} | {value:.3f} |" for metric, value in metrics.items())
    return MODEL.format(
        name=name,
        what=WHAT[name],
        parameters=parameters,
        vocabulary=vocabulary,
        start=START[name],
        tokens=READ[name].format(**{part.replace(" ", "_"): facts["tokens"] for part, facts in training.items()}),
        table=table,
    )


def apache_text() -> str:
    """The licence of this project, which is also that of the models."""
    return (ROOT / "LICENSE").read_text("utf-8")
