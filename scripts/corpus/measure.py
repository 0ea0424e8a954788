"""Numbers that say what an embedded model can do: held-out loss, arithmetic, copying, and the legal tasks."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.corpus.grammar import coin_word
from scripts.corpus.training import answer, loss_of


@torch.inference_mode()
def heldout_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Mean next-token loss in nats over windows of shape (n, seq)."""
    model.eval()
    losses = [loss_of(model, (part.long(), part.long())).item() for part in windows.split(8)]
    return sum(losses) / len(losses)


def last_number_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]]
) -> float:
    """Share of rows whose greedy answer ends in the right number, with or without worked steps before it."""
    answers = answer(model, tokenizer, [row["messages"][:-1] for row in rows])
    right = 0
    for row, text in zip(rows, answers, strict=True):
        numbers = re.findall(r"\d+", text)
        right += bool(numbers) and numbers[-1] == row["answer"]
    return right / len(rows)


def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Share of rows whose greedy answer equals the last message: `legal_exact_match`, and by the rows' `task`."""
    answers = answer(model, tokenizer, [row["messages"][:-1] for row in rows])
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, answers, strict=True):
        hit = text == row["messages"][-1]["content"].strip()
        hits["legal_exact_match"].append(hit)
        hits[f"legal_{row['task']}"].append(hit)
    return {name: sum(found) / len(found) for name, found in sorted(hits.items())}


def copy_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 64) -> float:
    """Share of tokens of a second, identical list of coined words that the model predicts from the first."""
    rng = random.Random(7)
    right = total = 0
    for _ in range(count):
        line = ", ".join(coin_word(rng) for _ in range(10))
        head = tokenizer(f"First list: {line}.\nSecond list, the same as the first:")["input_ids"]
        ids = torch.tensor([head + tokenizer(f" {line}")["input_ids"]])
        with torch.inference_mode():
            predicted = model(input_ids=ids).logits[0, len(head) + 3 : -1].argmax(-1)
        right += int((predicted == ids[0, len(head) + 4 :]).sum())
        total += len(predicted)
    return right / total
