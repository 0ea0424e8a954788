"""Semantic duplicates: mean-pooled embeddings of texts, and rows whose embeddings point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.near_dup import Forest
from data_prep.tokens import fetch
from recipes.errors import RecipeError
from recipes.refs import parse_ref

BATCH = 32  # texts of a forward pass
BLOCK = 4096  # rows compared with each other at once: 64 MiB of similarities


@lru_cache(maxsize=1)
def _encoder(reference: str) -> tuple[Any, Any, int]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = fetch(parse_ref(reference), True, "data.steps")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(f"{reference} cannot be loaded: {reason}", "data.steps", "name an encoder") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(getattr(model.config, "max_position_embeddings", 512), 512)
    return model, tokenizer, longest


def embed(texts: Sequence[str], reference: str) -> NDArray[np.float16]:
    """Unit vectors, float16 (texts, width): the mean of an encoder's last hidden states over the first tokens of each
    text (at most 512). A text's vector does not depend on the texts beside it, apart from rounding.

    Raises:
        RecipeError: the encoder cannot be fetched or loaded.
    """
    import torch

    model, tokenizer, longest = _encoder(reference)
    vectors = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        vectors.append(torch.nn.functional.normalize(mean, dim=-1).to(torch.float16).numpy())
    return np.concatenate(vectors)


def join_close(
    forest: Forest, parts: Sequence[NDArray[np.float16]], alive: NDArray[np.bool_], threshold: float
) -> None:
    """Join rows whose cosine similarity reaches the threshold. Every pair is compared, block by block: the time grows
    with the square of the rows (100,000 rows of width 384: some minutes on a processor)."""
    rows = np.flatnonzero(alive)
    if len(rows) < 2:
        return
    vectors = np.concatenate(parts)
    for i in range(0, len(rows), BLOCK):
        left = _unit(vectors[rows[i : i + BLOCK]])
        for j in range(i, len(rows), BLOCK):
            close = left @ _unit(vectors[rows[j : j + BLOCK]]).T >= threshold
            if i == j:
                close &= np.tri(len(close), dtype=bool).T & ~np.eye(len(close), dtype=bool)
            one, other = np.nonzero(close)
            forest.join(np.stack([rows[i + one], rows[j + other]], axis=1))


def _unit(vectors: NDArray[np.float16]) -> NDArray[np.float32]:
    """Float32 vectors of length 1: rounding to float16 has changed the lengths by up to a thousandth."""
    wide = vectors.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-6)
