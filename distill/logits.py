"""Teacher logits -> the few entries of a distribution that are kept (data_prep.logit_cache.Sparse).

Two kinds. `topk` keeps the likeliest tokens and the log of the mass of all others: the student learns the head exactly
and how much lies outside, and is never told that nothing does. `sampled` keeps draws from the whole distribution with
importance weights, so that a loss over them equals the loss over the whole vocabulary on average (random sampling KD:
Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.logit_cache import MOST, Sparse, join
from recipes.errors import EngineError
from recipes.schema_teacher import Logits

WORK = 1 << 25  # logits that are worked on at a time (128 MiB in float32)
HALF_MAX = 65504.0  # largest float16
BELOW_ONE = 1.0 - 2.0**-53  # largest float64 under 1


def sparsify(
    logits: torch.Tensor, actual: torch.Tensor, spec: Logits, generator: torch.Generator | None = None
) -> Sparse:
    """The kept part of the distributions softmax(logits / spec.temperature).

    Args:
        logits: (n, V), of any float type and device; worked on in float32.
        actual: token ids that stand at the n positions, (n,).
        spec: what is kept. A k above V is V, and nothing is left outside then.
        generator: of the draws of kind `sampled`, on any device; default the CPU's own. Seeded alike it draws alike,
            whatever device the logits are on, up to the rounding of their softmax.

    Raises:
        EngineError: logits that are NaN or infinite upwards, or more entries at a position than the cache can count.
    """
    size = logits.shape[-1]
    if spec.kind == "topk" and min(spec.k, size) > MOST:
        raise EngineError(f"at most {MOST:,} tokens of a position are kept", "teacher.logits.k", "lower it")
    rows = max(1, WORK // size)
    parts = [
        _sparsify(logits[i : i + rows], actual[i : i + rows], spec, generator) for i in range(0, len(logits), rows)
    ]
    return join(parts) if parts else join([], sampled=spec.kind == "sampled")


@torch.no_grad()
def _sparsify(logits: torch.Tensor, actual: torch.Tensor, spec: Logits, generator: torch.Generator | None) -> Sparse:
    scaled = logits.float() / spec.temperature
    log_probs = scaled.log_softmax(-1)
    stands = log_probs.gather(-1, actual.to(log_probs.device).long()[:, None])[:, 0]
    if bool(log_probs.isnan().any()):
        raise EngineError("the teacher's logits are not numbers", None, "check its precision (teacher.engine dtype)")
    if spec.kind == "topk":
        k = min(spec.k, log_probs.shape[-1])
        head, ids = log_probs.topk(k, dim=-1, sorted=True)
        rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
        counts = torch.full((len(ids),), k)
        return _packed(counts, ids.flatten(), head.flatten(), None, stands, rest)
    row, ids, times = _draw(scaled, spec, generator)
    kept = log_probs[row, ids]
    order = kept.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # the likeliest of each position first
    row, ids, times, kept = row[order], ids[order], times[order], kept[order]
    # p / q of the tokens drawn: their own normalisations, so that E[weight of i] = p_i
    drawn_from = (scaled / spec.spread).log_softmax(-1)[row, ids] if spec.spread != 1 else kept
    weights = times / spec.draws * (kept - drawn_from).exp()
    rest = log_probs.index_put((row, ids), log_probs.new_tensor(-torch.inf)).logsumexp(-1)
    counts = torch.bincount(row, minlength=len(log_probs))
    return _packed(counts, ids, kept, weights, stands, rest)


def _draw(scaled: torch.Tensor, spec: Logits, generator: torch.Generator | None) -> tuple[torch.Tensor, ...]:
    """Position, token and number of draws of every token drawn, (m,) each.

    The draws are stratified: [0, 1) is cut into `draws` equal pieces, one uniform number from each goes through the
    inverse of the cumulative distribution. A token of probability q is drawn draws x q times on average, as by
    independent draws, but the number strays by less than two, so likely tokens get nearly exact weights.
    """
    n, device = len(scaled), scaled.device
    uniform = torch.rand(
        (n, spec.draws), dtype=torch.float64, generator=generator, device=generator.device if generator else "cpu"
    )
    points = (torch.arange(spec.draws, dtype=torch.float64, device=uniform.device) + uniform) / spec.draws
    points = points.clamp_(max=BELOW_ONE).to(device)
    cumulative = (scaled / spec.spread).softmax(-1).to(torch.float64).cumsum(-1)
    cumulative /= cumulative[:, -1:].clone()
    ids = torch.searchsorted(cumulative, points, right=True)  # ascending: the points are
    place = torch.arange(n, device=device)[:, None] * scaled.shape[-1] + ids
    place, times = torch.unique_consecutive(place.flatten(), return_counts=True)
    return place // scaled.shape[-1], place % scaled.shape[-1], times


def _packed(
    counts: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    weights: torch.Tensor | None,
    actual: torch.Tensor,
    tail: torch.Tensor,
) -> Sparse:
    return Sparse(
        counts=_numpy(counts).astype(np.uint16),
        ids=_numpy(ids).astype(np.uint32),
        log_probs=_half(_numpy(log_probs)),
        weights=None if weights is None else _half(_numpy(weights)),
        actual=_half(_numpy(actual)),
        tail=_half(_numpy(tail)),
    )


def sparse_from_topk(ids: NDArray[Any], log_probs: NDArray[Any], actual: NDArray[Any]) -> Sparse:
    """The same of an engine that returns the likeliest tokens itself.

    Args:
        ids: token ids, (n, k), in any order; below 0: no token, for positions with fewer.
        log_probs: theirs, (n, k), normalised over the whole vocabulary.
        actual: log-probability of the token that stands at each position, (n,).

    Raises:
        EngineError: log-probabilities that are none: NaN, or with a sum well above 1.
    """
    ids, logs = np.asarray(ids, np.int64), np.asarray(log_probs, np.float64)
    if ids.size == 0:
        ids, logs = ids.reshape(len(actual), 0), logs.reshape(len(actual), 0)
    logs = np.where(ids < 0, -np.inf, logs)
    order = np.argsort(-logs, axis=1, kind="stable")
    order = np.take_along_axis(order, np.argsort(np.take_along_axis(ids, order, 1) < 0, axis=1, kind="stable"), 1)
    ids, logs = np.take_along_axis(ids, order, 1), np.take_along_axis(logs, order, 1)
    mass = np.exp(logs).sum(1)
    if np.isnan(mass).any() or (mass > 1.02).any() or np.isnan(actual).any():
        raise EngineError(
            f"returned log-probabilities that are none (they sum to {float(mass.max()):.3g})",
            None,
            "ask for log-probabilities before penalties and cuts are applied",
        )
    kept = ids >= 0
    with np.errstate(divide="ignore"):
        tail = np.where(mass < 1, np.log1p(-np.minimum(mass, 1)), -np.inf)
    return Sparse(
        counts=kept.sum(1).astype(np.uint16),
        ids=ids[kept].astype(np.uint32),
        log_probs=_half(logs[kept]),
        weights=None,
        actual=_half(np.asarray(actual, np.float64)),
        tail=_half(tail),
    )


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def _half(values: NDArray[Any]) -> NDArray[np.float16]:
    """Float16; log-probabilities too small for it stay finite where they were."""
    return np.where(np.isfinite(values), np.clip(values, -HALF_MAX, HALF_MAX), values).astype(np.float16)
