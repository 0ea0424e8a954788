"""Transformers' continuous batching, as a stream: requests go in as they come, answers come out as they finish."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.utils import WorkloadHints, logger

from distill.drawing import Uniforms, cuts, is_drawn, only
from distill.local_model import Facts
from distill.teachers import Request
from recipes.errors import out_of_memory

WAITING = 2  # requests inside for each that is being answered: the next ones are there when a place falls free
MOST = 1024  # answers side by side, by transformers' own default
PAGE = 32  # tokens of a page of the cache on a processor; cards have the library's own size
PASS = 2048  # tokens of a forward on a processor
SHARE = 0.25  # of a machine's free memory for the cache
CARD_PASS = 8192  # and on a card, once memory ran out; before that the library's own choice, which is the same
CARD_SHARE = 0.8  # of a card's free memory for the cache: choosing tokens among a large vocabulary needs some too
STOP = 60.0  # seconds that its thread gets to end


@dataclass
class Answer:
    """What came out: the request, the tokens of its answer, and the seconds from its hand-over to its end."""

    request: Request
    ids: list[int]
    seconds: float


class Stopped(Exception):
    """Continuous batching came to an end before all was answered.

    Attributes:
        reason: what the library said. memory: whether memory ran out; then fewer answers side by side may do.
    """

    def __init__(self, reason: str, memory: bool) -> None:
        super().__init__(reason)
        self.reason, self.memory = reason, memory


@dataclass
class Continuous:
    """One stream of answers.

    Args:
        limit: of a request: its longest answer, in tokens.
        side: answers written side by side; None: as many as the cache holds.
        halved: how often memory ran out before; each time the answers side by side, the tokens of a forward and the
            cache's share of the memory are less.
        longest: prompt and answer of the longest request that is known of, in tokens.

    Attributes:
        waiting: requests that went in and have no answer yet, by key.
        began, ended: clock of the first request's start and the last answer's end (time.perf_counter).
    """

    model: Any
    facts: Facts
    sampling: Mapping[str, float]
    limit: Callable[[Request], int]
    side: int | None
    longest: tuple[int, int]
    halved: int = 0
    waiting: dict[str, Request] = field(default_factory=dict)
    began: float = math.inf
    ended: float = 0.0

    @property
    def width(self) -> int:
        """Most answers side by side."""
        return max(1, (self.side or MOST) >> self.halved)

    def answers(self, requests: Iterator[Request]) -> Generator[Answer, None, None]:
        """Answers as they finish. Takes no more from `requests` than it needs to be busy.

        Raises:
            Stopped: `waiting` tells what it still owes. What `requests` raises passes unchanged.
        """
        inside = WAITING * self.width
        manager: Any = None
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # what goes wrong is raised here, in one line
        try:
            failure = None
            try:
                manager = self._start()
            except Exception as error:  # no cache for this model, or no room for it
                failure = _stopped(error)
            if failure is not None:
                raise failure  # outside of the clause, so that it does not hold the tensors of the other's frames
            while True:
                while len(self.waiting) < inside and (request := next(requests, None)) is not None:
                    self._put(manager, request)
                if not self.waiting:
                    return
                if (output := manager.get_result(timeout=1.0)) is not None:
                    yield self._take(manager, output)
                elif not manager.is_running() or manager.background_thread_status.fatal_error is not None:
                    raise _stopped(manager.background_thread_status.fatal_error)
        finally:
            if manager is not None:
                manager.stop(block=True, timeout=STOP, hard_stop=True)
                manager.destroy()
            logger.setLevel(level)

    def _start(self) -> Any:
        manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=list(self.facts.end_ids), pad_token_id=self.facts.pad_id
            ),
            continuous_batching_config=self.config(),
            workload_hints=WorkloadHints(*self.longest, self.width),
        )
        if is_drawn(self.sampling):
            self._draws = _Draws()
            listed = manager.logit_processor
            listed.logits_processor = LogitsProcessorList([*cuts(self.sampling), self._draws])
            listed.tensors_required, listed.do_processing = 1, True
        if self.model.device.type == "cuda":
            manager.warmup()
        manager.start()
        return manager

    def config(self) -> Any:
        """The library's settings: on a card its own, on a processor a cache for exactly so many answers."""
        # With the package `kernels` transformers would fetch attention kernels, which are code, from the hub.
        common = {"auto_switch_to_flash": importlib.util.find_spec("kernels") is None}
        side = self.width
        if self.model.device.type == "cuda":
            return ContinuousBatchingConfig(
                max_requests_per_batch=side if self.halved else self.side,
                max_batch_tokens=max(side, CARD_PASS >> self.halved) if self.halved else None,
                max_memory_percent=CARD_SHARE * 0.9**self.halved,
                **common,
            )
        return ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=side * (math.ceil(sum(self.longest) / PAGE) + 1),
            max_batch_tokens=max(PASS, side),
            max_requests_per_batch=side,
            max_memory_percent=SHARE,
            **common,
        )

    def _put(self, manager: Any, request: Request) -> None:
        assert request.prompt_ids is not None
        if is_drawn(self.sampling):
            self._draws.begin(request)
        self.waiting[request.key] = request
        taken = manager.add_request(
            list(request.prompt_ids),
            request_id=request.key,
            max_new_tokens=self.limit(request),
            eos_token_id=list(self.facts.end_ids),
        )
        if taken is None:
            raise _stopped(manager.background_thread_status.fatal_error)

    def _take(self, manager: Any, output: Any) -> Answer:
        if output.error is not None:
            raise _stopped(manager.background_thread_status.fatal_error or RuntimeError(output.error))
        request = self.waiting.pop(output.request_id)
        if is_drawn(self.sampling):
            self._draws.end(request)
        start, end = output.lifespan
        self.began, self.ended = min(self.began, start), max(self.ended, end)
        return Answer(request, list(output.generated_tokens), end - output.created_time)


def _stopped(error: BaseException | None) -> Stopped:
    reason = " ".join(str(error).split())[:160] if error is not None else "its thread ended"
    reason = reason or type(error).__name__
    memory = error is not None and (isinstance(error, MemoryError) or out_of_memory(error) or "out of memory" in reason)
    return Stopped(reason, memory)


class _Draws(ContinuousBatchingLogitsProcessor):
    """The draw of drawing.py for rows that come and go: a row's number is that of its request and its place.

    It works on tensors of fixed shapes without looking into them, so that it can be part of a CUDA graph.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class has it so
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._own: dict[str, tuple[Uniforms, int]] = {}

    def begin(self, request: Request) -> None:
        self._own[request.key] = Uniforms(request), len(request.prompt_ids or ())

    def end(self, request: Request) -> None:
        self._own.pop(request.key, None)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        numbers = [self._number(request.state) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=torch.float32).view(torch.int32)  # all arguments share one int32 tensor

    def _number(self, state: Any) -> float:
        own = self._own.get(state.request_id)
        if own is None:  # the library's own, to warm up, or one that ended meanwhile
            return 0.0
        numbers, prompt = own
        return numbers[state.position_offset - prompt]  # tokens read so far, those of this forward among them

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return only(scores, tensor_arg[: scores.shape[0]].view(torch.float32))
