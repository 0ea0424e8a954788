"""The sparse divergence from a teacher: its loss and gradient in one pass over slices of the logits.

The teacher's distribution p at a position is known at a few tokens K; p_t is the mass outside (data_prep.logit_cache).
With the student's distribution q at the same temperature T, and q_t = sum of q outside K,

    D = sum_K p_i (log p_i - log q_i) + p_t (log p_t - log q_t)

is the Kullback-Leibler divergence of p and q after all tokens outside K are put into one: never more than that over the
whole vocabulary (log-sum inequality; Cover and Thomas, Elements of Information Theory, theorem 2.7.1), and equal to it
where K is everything. A tail that is dropped and the rest renormalised instead (p_t = 0, sum_K p_i = 1) asks for a
student that is sure of K, which the teacher never was. Of draws, w_i with E[w_i] = p_i stand for p_i and there is no
tail: on average this is the divergence over the whole vocabulary. At each position the loss is

    (1 - c) T^2 D + c (-log q(actual token at temperature 1))

(Hinton et al. 2015, section 2, on the factor T^2). No tensor of (batch, seq, vocab) exists: the logits of a slice of
positions are made, become the loss and then, in their own memory, its gradient, which leaves as one of the hidden
states. With M = the sum of p_i (or w_i) and p_t, the gradient of D by the logits over T is

    M q_j - p_j              for j in K
    q_j (M q_t - p_t) / q_t  elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_prep.logit_cache import Sparse
from recipes.errors import DataError

BINS = 15  # of the calibration error
SUMS = ("positions", "divergence", "token_loss", "head_mass", "student_head_mass", "agreement")
_SLICE = 1 << 24  # logits of a slice (64 MiB in float32)
_RULED_OUT = -1e30  # log of no probability, as a number
_HALF_SCALE = 1024.0  # float16 gradients are small next to its smallest number


class Targets:
    """The teacher at n positions, every one with k places for tokens.

    No dataclass and no dict on purpose: what wraps a model for several devices casts the floats in those.

    Attributes:
        ids: token ids, int64 (n, k), the teacher's likeliest first. Where there are fewer than k, the first again.
        log_probs: the teacher's, finite (n, k); in the places that are not used -inf.
        mass: what stands for p_i in the loss, (n, k): probabilities, or weights of draws; 0 in places not used.
        tail: log of the mass outside, as it enters the loss, (n,); -inf where there is none, or none is counted.
        head: the teacher's mass on ids, (n,); for the metrics.
        actual: ids of the tokens that stand there, int64 (n,).
    """

    def __init__(self, **parts: Tensor) -> None:
        self.ids, self.log_probs, self.mass = parts["ids"], parts["log_probs"], parts["mass"]
        self.tail, self.head, self.actual = parts["tail"], parts["head"], parts["actual"]

    def __len__(self) -> int:
        return len(self.ids)

    def map(self, change: Any) -> Self:
        return type(self)(**{name: change(part) for name, part in vars(self).items()})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """On another device."""
        return self.map(lambda part: part.to(*args, **kwargs))

    def pin_memory(self, *_: Any) -> Self:
        return self.map(lambda part: part.pin_memory())


def targets_of(sparse: Sparse, actual: Sequence[int] | NDArray[Any], vocabulary: int | None = None) -> Targets:
    """From the cache to the loss; float32.

    Kind `topk` is normalised over tokens and tail together: float16 left their sum a little off 1, and the divergence
    from an equal student would be off by as much. That is no renormalisation of the head.

    Args:
        actual: ids of the tokens that stand at the positions, (n,).
        vocabulary: of the student. Ids beyond it (rows that pad the teacher's head) go to the tail.

    Raises:
        DataError: a position of which the student knows no token.
    """
    if vocabulary is not None and (sparse.ids >= vocabulary).any():
        sparse = _within(sparse, vocabulary)
    counts = sparse.counts.astype(np.int64)
    n, width = len(counts), int(counts.max(initial=1))
    used = torch.from_numpy(np.arange(width) < counts[:, None])

    def spread(values: NDArray[Any], empty: float) -> Tensor:
        out = torch.full((n, width), empty, dtype=torch.float32)
        return out.masked_scatter_(used, torch.from_numpy(values.astype(np.float32)))

    ids = torch.zeros((n, width), dtype=torch.int64)
    ids.masked_scatter_(used, torch.from_numpy(sparse.ids.astype(np.int64)))
    ids = torch.where(used, ids, ids[:, :1])
    # A token that the teacher rules out is in the head all the same: only places that are not used are -inf.
    log_probs = spread(np.nan_to_num(sparse.log_probs.astype(np.float32), neginf=_RULED_OUT), -torch.inf)
    tail = torch.from_numpy(sparse.tail.astype(np.float32))
    head = -torch.expm1(tail)
    if sparse.weights is None:
        whole = torch.logaddexp(log_probs.logsumexp(-1), tail)
        log_probs, tail = log_probs - whole[:, None], tail - whole
        mass = log_probs.exp()
    else:
        mass, tail = spread(sparse.weights, 0.0), torch.full_like(tail, -torch.inf)
    stands = torch.as_tensor(np.asarray(actual), dtype=torch.int64)
    return Targets(ids=ids, log_probs=log_probs, mass=mass, tail=tail, head=head, actual=stands)


def _within(sparse: Sparse, vocabulary: int) -> Sparse:
    kept, n = sparse.ids < vocabulary, len(sparse.counts)
    place = np.repeat(np.arange(n), sparse.counts)
    counts = np.bincount(place[kept], minlength=n)
    if (counts == 0).any():
        raise DataError("the teacher's tokens are not among the student's", "logits", "compare their tokenizers")
    lost = np.bincount(place[~kept], np.exp(sparse.log_probs[~kept].astype(np.float64)), minlength=n)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(sparse.tail.astype(np.float64)) + lost)
    return Sparse(
        counts=counts.astype(np.uint16),
        ids=sparse.ids[kept],
        log_probs=sparse.log_probs[kept],
        weights=None if sparse.weights is None else sparse.weights[kept],
        actual=sparse.actual,
        tail=tail.astype(np.float16),
    )


def renormalised(targets: Targets) -> Targets:
    """Top-k without its tail, scaled up to 1: what many tools train on. For comparison; the loss never does it."""
    log_probs = targets.log_probs - targets.log_probs.logsumexp(-1, keepdim=True)
    return Targets(
        **{**vars(targets), "log_probs": log_probs, "mass": log_probs.exp(), "tail": targets.tail - torch.inf}
    )


@dataclass(frozen=True)
class Head:
    """The last layer of a model: logits = cap(scale * (hidden weight^T + bias)), cap(z) = softcap tanh(z / softcap).

    Attributes:
        weight: (V, d). bias: (V,). Both are trained where they require a gradient.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V), in the precision of the model."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def slice_size(vocabulary: int) -> int:
    """Positions whose logits are made at a time."""
    return min(1024, max(256, _SLICE // vocabulary))


def token_log_probabilities(hidden: Tensor, head: Head, actual: Tensor) -> Tensor:
    """Log-probabilities of tokens in nats, float32 (n,), without gradient; a slice of the positions at a time.

    Args:
        hidden: last hidden states at the positions, (n, d). actual: the tokens that stand there, (n,).
    """
    size = slice_size(len(head.weight))
    parts = [
        -torch.nn.functional.cross_entropy(
            head.logits(hidden[start : start + size]).float(), actual[start : start + size], reduction="none"
        )
        for start in range(0, len(hidden), size)
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def sparse_divergence(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    cross_entropy: float = 0.0,
    temperature: float = 1.0,
    num_items: Tensor | int | None = None,
    positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss over positions, divided by `num_items`, and the sums behind the metrics (see `summary`).

    Args:
        hidden: last hidden states at the positions, (n, d).
        cross_entropy: c, the share of the plain loss on the actual tokens, which is at temperature 1.
        temperature: T of both softmaxes in the divergence; the targets must have been made at it.
        num_items: positions of the whole optimiser step, over micro-batches and processes (transformers'
            num_items_in_batch); default n.
        positions: of a slice; default by the size of the vocabulary.

    Returns:
        (loss (), sums (len(SUMS) + 3 BINS,) float32 without gradient).
    """
    size = positions or slice_size(len(head.weight))
    options = _Options(cross_entropy, temperature, head.scale, head.softcap, size, torch.is_grad_enabled())
    total, sums = _SparseDivergence.apply(hidden, head.weight, head.bias, targets, options)
    return total / (max(1, len(hidden)) if num_items is None else num_items), sums


@dataclass(frozen=True)
class _Options:
    share: float
    temperature: float
    scale: float
    softcap: float | None
    size: int
    gradient: bool


class _SparseDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, o: _Options) -> Any:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        half = _HALF_SCALE if dtype == torch.float16 else 1.0
        wide = torch.promote_types(dtype, torch.float32)  # of the softmax: float32, or float64 where all is
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            needs = [o.gradient and n for n in ctx.needs_input_grad[:3]]
            by_hidden = torch.empty_like(hidden) if needs[0] else None
            by_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
            by_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if needs[2] else None
            total = torch.zeros((), dtype=wide, device=hidden.device)
            sums = torch.zeros(len(SUMS) + 3 * BINS, device=hidden.device)
            for start in range(0, len(hidden), o.size):
                place = slice(start, start + o.size)
                states = hidden[place].to(dtype)
                logits = torch.nn.functional.linear(states, matrix, offset).to(wide)
                loss, gradient, seen = _slice(logits, targets.map(lambda part, p=place: part[p]), o, any(needs))
                total += loss
                sums += seen
                if by_bias is not None:
                    by_bias += gradient.sum(0)
                if any(needs):
                    gradient = gradient.mul_(half).to(dtype)
                if by_hidden is not None:
                    by_hidden[place] = (gradient @ matrix).to(wide).div_(half).to(hidden.dtype)
                if by_weight is not None:
                    by_weight += (gradient.T @ states).to(wide).div_(half)
        if by_weight is not None:
            by_weight = by_weight.to(weight.dtype)
        if by_bias is not None and bias is not None:
            by_bias = by_bias.to(bias.dtype)
        ctx.save_for_backward(by_hidden, by_weight, by_bias)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> Any:
        return (*[None if g is None else g * by_total.to(g.dtype) for g in ctx.saved_tensors], None, None)


def _slice(logits: Tensor, t: Targets, o: _Options, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), gradient by the head's own output (n, V) in the memory of `logits`, and sums of one slice."""
    share, temperature = o.share, o.temperature
    slope = None
    if o.scale != 1:
        logits.mul_(o.scale)
    if o.softcap is not None:
        squashed = logits.div_(o.softcap).tanh_()
        slope = 1 - squashed.square() if gradient else None
        logits = squashed.mul_(o.softcap)
    best, guess = logits.max(-1)
    stands = logits.gather(-1, t.actual[:, None])[:, 0]
    plain = None  # the softmax at temperature 1, where the divergence has another
    if temperature != 1:
        whole = logits.logsumexp(-1)
        token_loss, sure = whole - stands, (best - whole).exp()
        plain = (logits - whole[:, None]).exp_() if gradient and share else None
        logits.div_(temperature)
    at_head = logits.gather(-1, t.ids)
    used = t.log_probs != -torch.inf
    head = at_head.masked_fill(~used, -torch.inf).logsumexp(-1)
    # From here on `logits` is e^(logit - highest) of the tokens outside the head, 0 within it.
    logits.scatter_(-1, t.ids, -torch.inf)
    highest = logits.amax(-1)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    outside = logits.sub_(highest[:, None]).exp_().sum(-1)
    rest = highest + outside.log()
    whole = torch.logaddexp(head, rest)
    if temperature == 1:
        token_loss, sure = whole - stands, (best - whole).exp()
    log_q, log_tail = at_head - whole[:, None], rest - whole
    tail = t.tail.exp()
    entries = torch.where(t.mass > 0, t.mass * (t.log_probs - log_q), 0.0).sum(-1)
    divergence = entries + torch.where(tail > 0, tail * (t.tail - log_tail), 0.0)
    loss = ((1 - share) * temperature**2 * divergence + share * token_loss).sum()
    if gradient:
        pull, along = (1 - share) * temperature, share if temperature == 1 else 0.0
        mass = t.mass.sum(-1) + tail
        outer = pull * (mass * log_tail.exp() - tail) + along * log_tail.exp()
        logits.mul_(torch.where(outside > 0, outer / outside, 0.0)[:, None])
        inner = (pull * mass + along)[:, None] * log_q.exp() - pull * t.mass
        logits.scatter_(-1, t.ids, torch.where(used, inner, inner[:, :1]))  # places not used repeat the first
        if plain is not None:
            logits.add_(plain, alpha=share)
        if share:
            logits.scatter_add_(-1, t.actual[:, None], logits.new_full((len(logits), 1), -share))
        if slope is not None:
            logits.mul_(slope)
        if o.scale != 1:
            logits.mul_(o.scale)
    means = [divergence, token_loss, t.head, (head - whole).exp(), guess == t.ids[:, 0]]
    sums = [logits.new_tensor(float(len(t))), *(value.sum() for value in means)]
    calibration = logits.new_zeros(BINS, 3)
    right = (guess == t.actual).to(sure.dtype)
    bins = (sure * BINS).ceil().long().clamp_(1, BINS) - 1
    calibration.index_add_(0, bins, torch.stack([torch.ones_like(sure), sure, right], -1))
    return loss, logits, torch.cat([torch.stack([s.to(logits.dtype) for s in sums]), calibration.flatten()])


def summary(sums: Tensor) -> dict[str, float]:
    """Metrics from sums of `sparse_divergence` added up over batches (and processes).

    Returns:
        `divergence`: D per position, in nats, without T^2. `token_loss`: of the actual tokens, at temperature 1.
        `head_mass`: the teacher's on the tokens kept. `student_head_mass`: the student's on them. `agreement`: share of
        positions where the student's likeliest token is the teacher's. `calibration_error`: expected calibration error
        of the student's likeliest token against the actual one, 15 bins of equal width (Guo et al. 2017, section 2).
        `mean_token_accuracy`: share of positions where the student's likeliest token is the actual one.
    """
    values = sums.double().cpu()
    positions = float(values[0])
    if not positions:
        return {}
    found = {name: float(value) / positions for name, value in zip(SUMS[1:], values[1:], strict=False)}
    bins = values[len(SUMS) :].view(BINS, 3)
    found["calibration_error"] = float((bins[:, 1] - bins[:, 2]).abs().sum()) / positions
    found["mean_token_accuracy"] = float(bins[:, 2].sum()) / positions
    return found
