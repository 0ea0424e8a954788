"""Token sequences through a model, in bounded memory: log-probabilities of their trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch

from data_prep.progress import progress
from data_prep.tokens import Tokenizer

LOGIT_BYTES = 1 << 29  # of one forward's float32 logits; they, not the weights, fill the memory of an evaluation
Sequence_ = tuple[Sequence[int], Sequence[bool]]  # token ids, and which of them count


@contextmanager
def evaluating(model: Any) -> Any:
    """The model without dropout and with a cache for generation, put back as it was afterwards."""
    training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        yield
    finally:
        model.train(training)
        model.config.use_cache = cached


@contextmanager
def kept_randomness() -> Any:
    """What is drawn inside leaves the generators as they were: the run's draws are those it would have had without."""
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []):
        yield


def batches_of(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices in batches of like length, longest first, each at most `most` padded tokens (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def tokens_per_forward(model: Any) -> int:
    """How many padded tokens one forward may hold, by the size of its logits."""
    return max(256, min(8192, LOGIT_BYTES // (4 * model.get_input_embeddings().num_embeddings)))


def log_probabilities(
    model: Any, tokenizer: Tokenizer, sequences: Sequence[Sequence_], what: str
) -> list[torch.Tensor]:
    """Per sequence the log-probabilities of its trained tokens in nats, float32, (trained tokens,).

    The first token is never among them: nothing predicts it.

    Args:
        what: shown beside the progress bar.
    """
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    batches = batches_of([len(ids) for ids, _ in sequences], tokens_per_forward(model))
    with evaluating(model), torch.inference_mode():
        for batch in progress(batches, what, len(batches)):
            ids, mask = padded([list(sequences[i][0]) for i in batch], tokenizer, model.device, left=False)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            for i, line in zip(batch, nll, strict=True):
                trained = torch.tensor(list(sequences[i][1])[1:], device=line.device)
                results[i] = -line[: len(trained)][trained].cpu()
    return results


def scores_of(model: Any, tokenizer: Tokenizer, sequences: Sequence[Sequence[int]], what: str) -> list[float]:
    """Scores of a reward model for whole sequences (prompt and answer), float32."""
    results = [0.0] * len(sequences)
    batches = batches_of([len(ids) for ids in sequences], 8192)
    with evaluating(model), torch.inference_mode():
        for batch in progress(batches, f"scores ({what})", len(batches)):
            ids, mask = padded([list(sequences[i]) for i in batch], tokenizer, model.device, left=False)
            for i, score in zip(batch, model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist(), strict=True):
                results[i] = score
    return results


def padded(
    sequences: list[list[int]], tokenizer: Tokenizer, device: torch.device, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (batch, longest)."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), tokenizer.backend.pad_token_id)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, place] = torch.tensor(sequence)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)
