"""The engine `transformers`: the teacher in this process.

Two ways of batching. `plain`: requests of like length side by side, padded on the left, the next batch when the longest
answer of this one has ended. `continuous`: transformers' continuous batching, where a request takes the place of one
that has ended. Greedy answers are the same in both. Drawn ones too: every request draws by random numbers of its own,
made from its key (drawing.py). In both cases up to the rounding of matrix products, whose shapes the neighbours decide:
where two tokens are as good as equal (in bfloat16 more often than in float32), another batch can turn the choice. On
the same machine, the same requests in the same order under `plain` give the same answers bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from data_prep.completions import completion_text
from data_prep.logit_cache import Sparse
from distill.continuous import Continuous, Stopped
from distill.drawing import Draw, Uniforms, cuts, is_drawn, looks_back, penalties
from distill.local_model import PLACE, free_bytes, load_model, release
from distill.local_scores import Kept, Scorer
from distill.teachers import CUT, Completion, Request
from recipes.errors import EngineError, MemoryFitError, out_of_memory
from recipes.schema import Recipe
from recipes.schema_teacher import TransformersEngine

WINDOW = 1024  # requests that are sorted by length together
SIDE = {"cpu": 16, "cuda": 256}  # most answers side by side in a plain batch; more make a processor no faster
COPIES = 8  # of a row of logits (float32) that choosing a token needs
PROBE = 2  # batches of each way that are timed where the recipe leaves the choice


@dataclass
class Way:
    """How requests are answered, and the time that was measured (seconds, tokens of answers)."""

    name: str
    seconds: float = 0.0
    tokens: int = 0

    @property
    def speed(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class TransformersTeacher:
    """A causal language model of transformers that answers and scores.

    Requests of equal sampling parameters should come together: each run of equal ones is batched by itself.

    Args:
        recipe: with a teacher section.
        tokenizer: the teacher's, of transformers.

    Attributes:
        batching: the way that is used: `plain` or `continuous`; `auto` until it was decided by measurement.
        speeds: tokens of answers a second of each way, where they were measured.
        notes: what a reader of the log should know.

    Raises:
        EngineError: there is no tokenizer. RecipeError, MemoryFitError: see `local_model.load_model`.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any | None) -> None:
        assert recipe.teacher is not None
        if tokenizer is None:
            raise EngineError(
                f"the tokenizer of {recipe.teacher.model} is not at hand",
                "teacher.tokenizer",
                "name a folder or a repository that has it",
            )
        self.recipe, self.tokenizer = recipe, tokenizer
        self.options = recipe.teacher.engine.transformers or TransformersEngine()
        self.name, self.logits = recipe.teacher.model, recipe.teacher.logits
        self.notes: list[str] = []
        self.speeds: dict[str, float] = {}
        self._identity: dict[str, Any] | None = None
        self.model, self.facts = load_model(self.name, self.options, tokenizer)
        self.batching: str = self.options.batching
        if self.batching == "auto" and self.device.type == "cuda":
            self.batching = "continuous"
        self._side = self.options.batch_size or SIDE[self.device.type]
        self._halved = 0  # how often memory ran out under continuous batching
        self._scorer: Scorer | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def identity(self) -> dict[str, Any]:
        if self._identity is None:
            from data_prep.identity import model_identity

            self._identity = model_identity(self.recipe)
        return self._identity

    # Answers

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answers as they finish; see teachers.Teacher.

        An answer that would not fit into the model's context is cut there; a prompt that leaves no room gets an empty,
        cut answer. Under `plain` answers come with their sparse distributions where the recipe keeps them while
        generating (kind `topk`; `sampled` is scored later, so that it does not depend on how the answer came about).

        Raises:
            EngineError: a request has no prompt, or the library failed. MemoryFitError: one answer alone is too much.
        """
        for _, run in groupby(requests, key=lambda request: sorted(request.sampling.items())):
            yield from self._run(run)

    def _run(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """Requests of equal sampling."""
        first = next(requests)
        requests = chain([first], requests)
        if looks_back(first.sampling) and self.batching != "plain":
            self._note("penalties look back at the answer, which continuous batching cannot: batches are plain")
            yield from self._plainly(requests)
        elif self.batching == "plain":
            yield from self._plainly(requests)
        elif self.batching == "continuous":
            yield from self._continuously(requests)
        else:
            yield from self._measuring(requests)

    def _measuring(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """Answer the first requests half in each way, and the rest in the faster one. Nothing is written twice."""
        probe = sorted(islice(requests, 2 * PROBE * self._side), key=_length)
        if len(probe) < 2 * PROBE * self._side:  # too few to be worth it
            yield from self._plainly(iter(probe))
            return
        plain, continuous = Way("plain"), Way("continuous")
        yield from self._plainly(iter(probe[::2]), plain)
        yield from self._continuously(iter(probe[1::2]), continuous)
        if self.batching == "auto":  # else continuous batching failed, and plain is decided
            self.speeds = {way.name: way.speed for way in (plain, continuous)}
            self.batching = max(self.speeds, key=self.speeds.__getitem__)
            told = ", ".join(f"{name} {speed:,.0f}" for name, speed in self.speeds.items())
            self._note(f"answers are written in {self.batching} batches (tokens a second: {told})")
        if (following := next(requests, None)) is not None:
            yield from self._run(chain([following], requests))

    def _answerable(self, requests: Iterable[Request], empty: list[Completion]) -> Iterator[Request]:
        """The requests with room for an answer; those without are answered with nothing, in `empty`."""
        for request in requests:
            if not request.prompt_ids:
                raise EngineError(
                    f"the request {request.key[:12]} has no prompt tokens", "teacher", "render its prompt"
                )
            if self._limit(request) > 0:
                yield request
                continue
            self._note(f"prompts of {self.facts.context:,} tokens and more leave no room for an answer")
            empty.append(self._completion(request, [], 0.0))

    def _limit(self, request: Request) -> int:
        """Longest answer, in tokens: what is asked for, as far as the context has room."""
        return min(request.max_tokens, self.facts.context - _length(request))

    def _completion(
        self, request: Request, ids: Sequence[int], seconds: float, sparse: Sparse | None = None
    ) -> Completion:
        return Completion(
            key=request.key,
            text=completion_text(ids, self.tokenizer, request.prompt_ids or ()) if ids else "",
            finish="stop" if ids and ids[-1] in self.facts.end_ids else CUT,
            token_ids=tuple(ids),
            prompt_tokens=_length(request),
            completion_tokens=len(ids),
            seconds=seconds,
            model=self.name,
            max_tokens=request.max_tokens,
            sparse=sparse,
        )

    # Plain batches

    def _plainly(self, requests: Iterator[Request], timed: Way | None = None) -> Iterator[Completion]:
        while window := list(islice(requests, WINDOW)):
            empty: list[Completion] = []
            ready = sorted(self._answerable(window, empty), key=_length, reverse=True)
            yield from empty
            while ready:
                size = self._fitting(ready[0])
                batch, ready = ready[:size], ready[size:]
                yield from self._whole(batch, timed)

    def _fitting(self, request: Request) -> int:
        """Answers of this length that fit side by side."""
        if self.options.batch_size is not None:
            return self._side  # halved where memory ran out
        prompt = _length(request)
        row = (prompt + self._limit(request)) * self.facts.cached + prompt * self.facts.passing
        row += COPIES * 4 * self.facts.vocabulary
        return max(1, min(self._side, free_bytes(self.device) // row))

    def _whole(self, batch: list[Request], timed: Way | None) -> Iterator[Completion]:
        """Answer a batch, in halves where memory does not suffice."""
        started = time.perf_counter()
        written: tuple[list[list[int]], list[Sparse] | None] | None = None
        try:
            written = self._write(batch)
        except Exception as error:
            if not out_of_memory(error):
                reason = " ".join(str(error).split())[:200]
                raise EngineError(f"generation failed ({type(error).__name__}: {reason})", PLACE) from error
        if written is not None:
            seconds = time.perf_counter() - started
            ids, sparse = written
            if timed is not None:
                timed.seconds += seconds
                timed.tokens += sum(map(len, ids))
            for i, request in enumerate(batch):
                yield self._completion(request, ids[i], seconds, sparse[i] if sparse is not None else None)
            return
        if len(batch) == 1:
            raise self._too_large(batch[0])
        release(self.device)
        half = self._side = (len(batch) + 1) // 2
        self._note(f"memory ran out: {half} answers side by side from now on")
        yield from self._whole(batch[:half], timed)
        yield from self._whole(batch[half:], timed)

    def _too_large(self, request: Request) -> MemoryFitError:
        tokens = _length(request) + self._limit(request)
        return MemoryFitError(
            f"an answer of {tokens:,} tokens, its prompt included, does not fit on {self.device}",
            PLACE,
            "lower teacher.sampling.max_tokens, set quantization: nf4, or take the engine vllm",
        )

    def _write(self, batch: list[Request]) -> tuple[list[list[int]], list[Sparse] | None]:
        """Token ids of the answers, and their distributions where they are kept."""
        prompts = [list(request.prompt_ids or ()) for request in batch]
        limits = [self._limit(request) for request in batch]
        width, sampling, facts = max(map(len, prompts)), batch[0].sampling, self.facts
        padding = [width - len(prompt) for prompt in prompts]
        rows = [[*[facts.pad_id] * pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        kept = Kept(self.logits, width, limits, facts.end_ids) if self._keeps and self.logits else None
        chosen = [*([kept] if kept else []), *penalties(sampling, width, padding, self.device), *cuts(sampling)]
        if is_drawn(sampling):
            chosen.append(Draw([Uniforms(request) for request in batch], width))
        with torch.no_grad():
            output = self.model.generate(
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(limits),
                    do_sample=False,  # what draws, draws as a processor
                    eos_token_id=list(facts.end_ids),
                    pad_token_id=facts.pad_id,
                ),
                logits_processor=LogitsProcessorList(chosen),
            )
            sparse = kept.finish(output) if kept else None
        lines = output[:, width:].tolist()
        return [self._until_end(line[:limit]) for line, limit in zip(lines, limits, strict=True)], sparse

    def _until_end(self, ids: list[int]) -> list[int]:
        return next((ids[: i + 1] for i, token in enumerate(ids) if token in self.facts.end_ids), ids)

    @property
    def _keeps(self) -> bool:
        return self.logits is not None and self.logits.while_generating and self.logits.kind == "topk"

    # Continuous batching

    def _continuously(self, requests: Iterator[Request], timed: Way | None = None) -> Iterator[Completion]:
        """Answers as they finish. What is left when it fails goes into plain batches, unless the recipe pins it."""
        ahead = list(islice(requests, WINDOW))
        empty: list[Completion] = []
        requests = self._answerable(chain(ahead, requests), empty)
        longest = max(map(_length, ahead)), max(map(self._limit, ahead))
        side = self.options.batch_size or (None if self.device.type == "cuda" else self._side)
        pinned = self.options.batching == "continuous"
        while True:
            sampling = ahead[0].sampling
            stream = Continuous(self.model, self.facts, sampling, self._limit, side, longest, self._halved)
            reason, memory = "", False
            try:
                with closing(stream.answers(requests)) as answers:
                    for answer in answers:
                        if timed is not None:
                            timed.tokens += len(answer.ids)
                            timed.seconds = stream.ended - stream.began
                        yield self._completion(answer.request, answer.ids, answer.seconds)
            except Stopped as stopped:
                reason, memory = stopped.reason, stopped.memory
            yield from empty
            if not reason:
                return
            empty.clear()
            requests = chain(list(stream.waiting.values()), requests)
            if memory and stream.width > 1:
                release(self.device)
                self._halved += 1
                self._note(f"memory ran out: {stream.width // 2} answers side by side from now on")
            elif pinned and memory:
                raise self._too_large(max(ahead, key=_length))
            elif pinned:
                raise EngineError(f"continuous batching stopped ({reason})", f"{PLACE}.batching", "set it to plain")
            else:
                self.batching = "plain"
                self._note(f"continuous batching stopped ({reason}): batches are plain from now on")
                yield from self._plainly(requests)
                return

    # Distributions

    def score(self, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[Sparse]:
        """Distributions at the marked tokens; see teachers.Teacher and local_scores.Scorer.

        Raises:
            EngineError: the recipe does not say what is kept. MemoryFitError: one sequence alone is too much.
        """
        if self.logits is None:
            raise EngineError("nothing is said of the distributions to keep", "teacher.logits", "set it ({} will do)")
        if self._scorer is None:
            self._scorer = Scorer(self.model, self.facts, self.logits)
        yield from self._scorer.scores(sequences)

    def close(self) -> None:
        """Free the model. The teacher answers no more."""
        device = self.device
        self._scorer = None
        self.model = None
        release(device)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _length(request: Request) -> int:
    return len(request.prompt_ids or ())
