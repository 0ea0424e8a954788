"""How the next token is chosen: penalties, the cuts of the distribution, and a draw that belongs to the request alone.

Transformers draws all rows of a batch from one stream of random numbers, so an answer depends on its neighbours and on
all batches before. Here each request has numbers of its own, one for each token, made from its key, and a token is the
one at which the cumulative distribution passes that number. So a sampled answer comes out the same in another batch, in
the other way of batching, after a crash, and as the beginning of a longer one. (What is left of the neighbours is the
rounding of the matrix products, as for greedy answers.)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distill.teachers import Request

CHUNK = 256  # numbers made at a time


class Uniforms:
    """The random numbers of a request: float32 in [0, 1), one for each token of the answer."""

    def __init__(self, request: Request) -> None:
        digest = hashlib.sha256(f"{request.seed} {request.key}".encode()).digest()
        self._source = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        self._made = array("f")

    def __getitem__(self, place: int) -> float:
        while place >= len(self._made):
            self._made.frombytes(self._source.random(CHUNK, dtype=np.float32).tobytes())
        return self._made[place]


def is_drawn(sampling: Mapping[str, float]) -> bool:
    """Whether answers are drawn; temperature 0, or nothing that asks for draws, is greedy."""
    if "temperature" in sampling:
        return sampling["temperature"] > 0
    return bool(sampling.keys() & {"top_p", "top_k", "min_p"})


def looks_back(sampling: Mapping[str, float]) -> bool:
    """Whether a choice depends on the tokens before it, and not on the logits alone."""
    return sampling.get("repetition_penalty", 1) != 1 or sampling.get("presence_penalty", 0) != 0


def penalties(sampling: Mapping[str, float], width: int, padding: Sequence[int], device: torch.device) -> list:
    """Processors of the penalties that are on.

    Args:
        width: of the padded prompts. padding: tokens that each prompt is padded by, on the left.
    """
    found: list = []
    if (penalty := sampling.get("repetition_penalty", 1)) != 1:  # over prompt and answer, as everywhere
        found.append(RepetitionPenaltyLogitsProcessor(penalty, torch.tensor(list(padding), device=device)))
    if (penalty := sampling.get("presence_penalty", 0)) != 0:
        found.append(Presence(penalty, width))
    return found


def cuts(sampling: Mapping[str, float]) -> list:
    """Processors of temperature, top_k, top_p and min_p, in transformers' order; empty where nothing is drawn."""
    if not is_drawn(sampling):
        return []
    found: list = []
    if (temperature := sampling.get("temperature", 1)) != 1:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if k := int(sampling.get("top_k", 0)):
        found.append(TopKLogitsWarper(k))
    if (p := sampling.get("top_p", 1)) < 1:
        found.append(TopPLogitsWarper(float(p)))
    if low := sampling.get("min_p", 0):
        found.append(MinPLogitsWarper(float(low)))
    return found


class Presence(LogitsProcessor):
    """Lowers the logits of tokens that the answer has already, once, by `penalty` (as OpenAI's API defines it)."""

    def __init__(self, penalty: float, width: int) -> None:
        self.penalty, self.width = penalty, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self.width :]
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, written, True)
        return scores - self.penalty * seen


class Draw(LogitsProcessor):
    """The last processor: all but the drawn token get -inf, so that the likeliest token is the drawn one.

    Args:
        numbers: of the requests, in the order of the rows.
        width: of the padded prompts.
    """

    def __init__(self, numbers: Sequence[Uniforms], width: int) -> None:
        self.numbers, self.width = numbers, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.width
        return only(scores, torch.tensor([own[place] for own in self.numbers], device=scores.device))


def only(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Scores (rows, V) in which the token that a number of `numbers` (rows,) hits is 0, all others -inf.

    Summed up in float64: the rounding of float32 could hit a token of probability 0.
    """
    mass = scores.softmax(-1).double().cumsum(-1)
    total = mass[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    hit = torch.searchsorted(mass, torch.minimum(numbers.double()[:, None] * total, below), right=True)
    return torch.full_like(scores, -torch.inf).scatter_(1, hit, 0.0)
