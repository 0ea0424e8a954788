"""The cache of sparse teacher distributions: what distill/ writes and finetune/ reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sparse:
    """Teacher distributions at n positions, each the few entries that were kept and the mass of the rest.

    Attributes:
        counts: entries of each position, uint16 (n,).
        ids: token ids, uint32 (m,), m the sum of counts; a position's likeliest first.
        log_probs: of those tokens, float16 (m,), in nats, at the temperature that was asked for.
        weights: kind `sampled`: share of the draws times their importance weight, float16 (m,); kind `topk`: None.
        actual: log-probability of the token that stands there, float16 (n,).
        tail: log of the mass outside ids, float16 (n,); -inf where nothing is left.
    """

    counts: NDArray[np.uint16]
    ids: NDArray[np.uint32]
    log_probs: NDArray[np.float16]
    weights: NDArray[np.float16] | None
    actual: NDArray[np.float16]
    tail: NDArray[np.float16]
