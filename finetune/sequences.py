"""Token sequences through a model, in bounded memory: log-probabilities of their trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch

from data_prep.model_files import FIGURES, cached_of
from data_prep.progress import progress
from data_prep.tokens import Tokenizer
from finetune.heads import base_of, hidden_states, separable_head
from finetune.losses import token_log_probabilities

LOGIT_BYTES = 1 << 29  # of one forward's float32 logits, where they are made of whole rows
MOST = 8192  # padded tokens in one forward
CACHE_BYTES = 1 << 31  # of the keys and values of one batch of answers
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


def tokens_per_forward(model: Any, example: Sequence[int]) -> int:
    """How many padded tokens one forward of `log_probabilities` holds; `example` is a row, to try the head with."""
    with evaluating(model), torch.inference_mode():
        return _tokens_per_forward(model, separable_head(model, example))


def _tokens_per_forward(model: Any, head: Any) -> int:
    if head is not None:
        return MOST
    return max(256, min(MOST, LOGIT_BYTES // (4 * model.get_input_embeddings().num_embeddings)))


def log_probabilities(
    model: Any, tokenizer: Tokenizer, sequences: Sequence[Sequence_], what: str
) -> list[torch.Tensor]:
    """Per sequence the log-probabilities of its trained tokens in nats, float32, (trained tokens,).

    The first token is never among them: nothing predicts it. Logits are made of a slice of the trained positions at a
    time; only of a model whose head cannot be told apart are they made of whole rows.

    Args:
        what: shown beside the progress bar.
    """
    results: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    if not sequences:
        return results
    lengths = [len(ids) for ids, _ in sequences]
    with evaluating(model), torch.inference_mode():
        head = separable_head(model, sequences[0][0])
        batches = batches_of(lengths, _tokens_per_forward(model, head))
        for batch in progress(batches, what, len(batches)):
            ids, mask = padded([list(sequences[i][0]) for i in batch], tokenizer, model.device, left=False)
            trained = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
            for row, i in enumerate(batch):
                counts = torch.tensor(list(sequences[i][1])[1:], dtype=torch.bool)
                trained[row, : len(counts)] = counts.to(ids.device)
            actual = ids[:, 1:][trained]
            if head is not None:
                states = hidden_states(base_of(model), input_ids=ids, attention_mask=mask)[:, :-1]
                states = states[trained.to(states.device)].to(head.weight)
                found = token_log_probabilities(states, head, actual.to(states.device))
            else:
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                logits = logits[trained.to(logits.device)].float()
                found = -torch.nn.functional.cross_entropy(logits, actual.to(logits.device), reduction="none")
            for i, line in zip(batch, found.cpu().split(trained.sum(1).tolist()), strict=True):
                results[i] = line
    return results


def cached_tokens(model: Any) -> int:
    """How many padded tokens, of prompts and answers, one batch of answers may hold, by their keys and values: a step's
    logits are of one position a row."""
    config = model.config.get_text_config()
    each = cached_of({name: getattr(config, name, None) for name in FIGURES}) * model.dtype.itemsize
    return max(1, min(2 * MOST, CACHE_BYTES // each))


def scores_of(model: Any, tokenizer: Tokenizer, sequences: Sequence[Sequence[int]], what: str) -> list[float]:
    """Scores of a reward model for whole sequences (prompt and answer), float32."""
    results = [0.0] * len(sequences)
    batches = batches_of([len(ids) for ids in sequences], MOST)
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
