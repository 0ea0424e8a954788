"""The training loops of the embedded models: next-token pretraining and answer-only fine-tuning, on the CPU.

Hidden matrices are optimised with Muon (orthogonalised momentum, https://kellerjordan.github.io/posts/muon/),
embeddings and norms with AdamW. Steps are small (about 2,000 tokens): 700,000 tokens in 341 steps ended at a loss of
1.56, in 170 steps at 2.15.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.corpus.tokens import IGNORE, batches_by_length, pad_batch

WARMUP = 40  # steps
MUON_RATE, ADAM_RATE = 0.02, 3e-3  # peak learning rates of pretraining; fine-tuning states a share of them
HEAD_ROWS = 256  # positions of the output head are a multiple of it
Batch = tuple[torch.Tensor, torch.Tensor]


class Optimisers:
    """Muon for the hidden matrices and AdamW for embeddings and norms, on one linear schedule with warm-up."""

    def __init__(self, model: LlamaForCausalLM, steps: int, scale: float = 1.0) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        muon = torch.optim.Muon(matrices, lr=MUON_RATE * scale, weight_decay=0.0, momentum=0.95)
        adam = torch.optim.AdamW(others, lr=ADAM_RATE * scale, betas=(0.9, 0.98), weight_decay=0.0)
        self.parts = (muon, adam)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(part, lambda step: min((step + 1) / WARMUP, (steps - step) / steps))
            for part in self.parts
        ]

    def step(self) -> None:
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy (scalar) of (ids, labels), each (batch, seq), in bfloat16 autocast: twice as fast here."""
    ids, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        targets = labels[:, 1:].flatten()
        places = (targets != IGNORE).nonzero().squeeze(1)
        count = len(places)
        if count < len(targets):  # answers alone: their number rounded up, so that shapes repeat
            places = torch.cat([places, places.new_zeros(-count % HEAD_ROWS)])
        logits = model.lm_head(hidden.flatten(0, 1)[places])
    return torch.nn.functional.cross_entropy(logits[:count].float(), targets[places[:count]])


def window_batches(windows: torch.Tensor, rows: int, seed: int) -> Iterator[Batch]:
    """Batches of `rows` windows in random order, each window once."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(rows):
        ids = windows[chosen].long()
        yield ids, ids


def row_batches(
    pairs: Sequence[tuple[list[int], list[int]]], tokens: int, epochs: int, pad_id: int, seed: int
) -> list[Batch]:
    """Padded batches of chat rows for `epochs` passes."""
    rng = random.Random(seed)
    return [pad_batch(batch, pad_id) for _ in range(epochs) for batch in batches_by_length(pairs, tokens, rng)]


def fit(
    model: LlamaForCausalLM, batches: Iterator[Batch] | list[Batch], steps: int, name: str, scale: float = 1.0
) -> dict[str, Any]:
    """Train on `steps` batches; prints progress with the time left.

    Returns:
        {"steps", "tokens", "seconds", "tokens_per_second", "loss"}; loss is the mean of the last 5% of the steps.
    """
    model.train()
    optimisers = Optimisers(model, steps, scale)
    losses: list[float] = []
    tokens, start = 0, time.monotonic()
    for step, batch in zip(range(steps), batches, strict=False):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimisers.step()
        losses.append(loss.item())
        tokens += batch[0].numel()
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
            _progress(name, step + 1, steps, losses, tokens, time.monotonic() - start)
    seconds = time.monotonic() - start
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        "steps": len(losses),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "loss": round(sum(tail) / len(tail), 4),
    }


def _progress(name: str, done: int, steps: int, losses: list[float], tokens: int, seconds: float) -> None:
    recent = losses[-max(1, steps // 20) :]
    left = seconds / done * (steps - done)
    print(
        f"{name}: step {done}/{steps}  loss {sum(recent) / len(recent):.3f}  {tokens / seconds:,.0f} tokens/s"
        f"  {left / 60:.1f} min left",
        flush=True,
    )


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[dict[str, str]]],
    limit: int = 64,
) -> list[str]:
    """Greedy answers to chat prompts, decoded without special tokens (the think tags stay), at most `limit` tokens."""
    model.eval()
    answers: list[str] = []
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], return_tensors="pt", padding=True, padding_side="left")
        batch.pop("token_type_ids", None)
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        out = model.generate(
            **batch, max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        made = out[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    return answers
