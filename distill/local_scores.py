"""A local model's distributions, sparse: of text that is there already, and of answers while they are written.

No tensor of (batch, positions, vocabulary) is made: the hidden states of the marked positions go through the output
head a piece at a time. Models that do something after the head (softcapping, scaling) are found out once and go through
their own forward.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from data_prep.logit_cache import Sparse, join, scored_positions
from distill.local_model import Facts, release
from distill.logits import sparsify
from recipes.errors import MemoryFitError, out_of_memory
from recipes.schema_teacher import Logits

WINDOW = 256  # sequences that are sorted by length together
PASS = {"cpu": 4096, "cuda": 32768}  # tokens of a forward
PIECE = 1 << 25  # logits that are held at a time (128 MiB in float32)
LOOK = 32  # positions on which the head alone is compared with the whole model

Sequence_ = tuple[Sequence[int], Sequence[bool]]


class Scorer:
    """Scores sequences with a model.

    Args:
        spec: what is kept of the distributions.

    Attributes:
        head_alone: whether the output head gives the model's own logits; None before the first forward.
    """

    def __init__(self, model: Any, facts: Facts, spec: Logits) -> None:
        self.model, self.spec = model, spec
        self.tokens = PASS[model.device.type]
        self.piece = max(1, PIECE // facts.vocabulary)
        self.pad = facts.pad_id
        self.head_alone: bool | None = None

    def scores(self, sequences: Iterable[Sequence_]) -> Iterator[Sparse]:
        """Distributions at the marked tokens, one Sparse for each sequence, in order.

        Draws of kind `sampled` come from a generator that is seeded by the sequence itself: they are the same in any
        order and any company.

        Raises:
            MemoryFitError: one sequence alone is too much for the device.
        """
        source = iter(sequences)
        while window := [_marked(*one) for one in islice(source, WINDOW)]:
            found: list[Sparse | None] = [None] * len(window)
            for batch in self._batches(window):
                for place, sparse in zip(batch, self._whole([window[i] for i in batch]), strict=True):
                    found[place] = sparse
            yield from (one if one is not None else join([], sampled=self.spec.kind == "sampled") for one in found)

    def _batches(self, window: Sequence[Any]) -> Iterator[list[int]]:
        """Row numbers of like length, the longest first, as many as make one forward."""
        order = sorted((i for i, (_, places) in enumerate(window) if places), key=lambda i: -len(window[i][0]))
        while order:
            size = max(1, self.tokens // len(window[order[0]][0]))
            yield order[:size]
            order = order[size:]

    def _whole(self, rows: list[Any]) -> list[Sparse]:
        """Score a batch, in halves where memory does not suffice."""
        try:
            return self._forward(rows)
        except Exception as error:
            if not out_of_memory(error):
                raise
            longest = len(rows[0][0])
        if len(rows) == 1:
            raise MemoryFitError(f"a sequence of {longest} tokens cannot be scored", "teacher", "shorten the rows")
        release(self.model.device)
        half = (len(rows) + 1) // 2
        self.tokens = max(1, half * longest)
        return self._whole(rows[:half]) + self._whole(rows[half:])

    @torch.no_grad()
    def _forward(self, rows: list[Any]) -> list[Sparse]:
        if self.head_alone is None:
            self.head_alone = self._compare(rows[-1][0])
        if not self.head_alone:
            return [self._own(ids, places) for ids, places in rows]
        # Padding on the right needs no mask: nothing looks at what comes after it.
        device = self.model.device
        width = len(rows[0][0])
        padded = [[*ids, *[self.pad] * (width - len(ids))] for ids, _ in rows]
        tensor = torch.tensor(padded, device=device)
        hidden = _states(self.model.base_model(input_ids=tensor, use_cache=False))
        row = torch.tensor([r for r, (_, places) in enumerate(rows) for _ in places], device=device)
        place = torch.tensor([p for _, places in rows for p in places], device=device)
        hidden, actual = hidden[row, place - 1], tensor[row, place]
        lengths = [len(places) for _, places in rows]
        head = self.model.get_output_embeddings()
        if self.spec.kind == "topk":
            parts = [sparsify(head(h), a, self.spec) for h, a in self._pieces(hidden, actual)]
            return split(join(parts), lengths)
        found, start = [], 0
        for (ids, places), count in zip(rows, lengths, strict=True):
            generator = _generator(ids, places)
            own = self._pieces(hidden[start : start + count], actual[start : start + count])
            found.append(join([sparsify(head(h), a, self.spec, generator) for h, a in own]))
            start += count
        return found

    def _pieces(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        yield from zip(*(tensor.split(self.piece) for tensor in tensors), strict=True)

    def _own(self, ids: Sequence[int], places: Sequence[int]) -> Sparse:
        """One sequence through the model's own forward, a piece of the positions at a time."""
        tensor = torch.tensor([ids], device=self.model.device)
        generator = _generator(ids, places) if self.spec.kind == "sampled" else None
        chosen = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        parts = []
        for (place,) in self._pieces(torch.tensor(places, device=self.model.device)):
            if chosen:
                logits = self.model(input_ids=tensor, use_cache=False, logits_to_keep=place - 1).logits[0]
            else:
                logits = self.model(input_ids=tensor, use_cache=False).logits[0, place - 1]
            parts.append(sparsify(logits, tensor[0, place], self.spec, generator))
        return join(parts)

    def _compare(self, ids: Sequence[int]) -> bool:
        """Whether the output head alone gives the same numbers, bit for bit, as the model gives with all that it does
        after the head; on the beginning of one sequence."""
        base, head = self.model.base_model, self.model.get_output_embeddings()
        if base is self.model or head is None:
            return False
        seen: list[Any] = []
        hook = base.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
        try:
            whole = self.model(input_ids=torch.tensor([ids[:LOOK]], device=self.model.device), use_cache=False).logits
        finally:
            hook.remove()
        states = _states(seen[-1]) if seen else None
        if not isinstance(states, torch.Tensor) or states.shape[:-1] != whole.shape[:-1]:
            return False
        return torch.equal(head(states).float(), whole.float())


def _states(output: Any) -> Any:
    return getattr(output, "last_hidden_state", None)


def _marked(ids: Sequence[int], mask: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Tokens up to the last marked one, and the marked places; never the first, which nothing predicts."""
    places = scored_positions(mask)
    return (list(ids[: places[-1] + 1]), places) if places else ([], [])


def _generator(ids: Sequence[int], places: Sequence[int]) -> torch.Generator:
    content = np.asarray([len(ids), *ids, *places], np.int64).tobytes()
    seed = int.from_bytes(hashlib.sha256(content).digest()[:7], "little")
    return torch.Generator().manual_seed(seed)


def split(sparse: Sparse, lengths: Sequence[int]) -> list[Sparse]:
    """Cut into pieces of so many positions."""
    positions = np.cumsum([0, *lengths])
    entries = np.concatenate([[0], np.cumsum(sparse.counts, dtype=np.int64)])
    found = []
    for start, end in pairwise(positions):
        a, b = entries[start], entries[end]
        weights = None if sparse.weights is None else sparse.weights[a:b]
        found.append(
            Sparse(
                sparse.counts[start:end],
                sparse.ids[a:b],
                sparse.log_probs[a:b],
                weights,
                sparse.actual[start:end],
                sparse.tail[start:end],
            )
        )
    return found


class Kept(LogitsProcessor):
    """The first processor of a generation: it sees the raw logits and keeps the sparse form of those that count.

    What stands at a position is known one step later, so logits are held back, for several steps as long as they are
    small, and made sparse together.

    Args:
        width: of the padded prompts.
        limits: longest answer of each row.
        ends: tokens that end an answer; what comes after one is not kept.
    """

    def __init__(self, spec: Logits, width: int, limits: Sequence[int], ends: Sequence[int]) -> None:
        self.spec, self.width, self.limits, self.ends = spec, width, limits, ends
        self._held: list[torch.Tensor] = []
        self._first = 0  # place of the first that is held
        self._parts: list[list[Sparse]] = [[] for _ in limits]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self._held) * scores.numel() >= PIECE:
            self._flush(input_ids)
        self._held.append(scores)
        return scores

    def finish(self, output: torch.Tensor) -> list[Sparse]:
        """The distributions of each row's answer, given the whole output (rows, width + steps)."""
        self._flush(output)
        return [join(parts) for parts in self._parts]

    def _flush(self, input_ids: torch.Tensor) -> None:
        if not self._held:
            return
        steps = len(self._held)
        written = input_ids[:, self.width : self.width + self._first + steps]
        is_end = torch.isin(written, torch.tensor(list(self.ends), device=written.device))
        ended = is_end.cumsum(1) - is_end.long()  # end tokens before a place
        limits = torch.tensor(list(self.limits), device=written.device)[:, None]
        place = torch.arange(written.shape[1], device=written.device)[None]
        counts = ((ended == 0) & (place < limits))[:, self._first :]  # (rows, steps)
        row, step = counts.nonzero(as_tuple=True)  # by row, then by place
        logits = torch.stack(self._held)[step, row]
        sparse = sparsify(logits, written[row, self._first + step], self.spec)
        for parts, own in zip(self._parts, split(sparse, counts.sum(1).tolist()), strict=True):
            if len(own.counts):
                parts.append(own)
        self._first += steps
        self._held = []
