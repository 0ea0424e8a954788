"""The teacher in this process, through vLLM.

vLLM schedules and batches; this file feeds it a bounded number of requests at a time and hands on each answer in the
step in which it ends, so that a crash loses only what was under way. Prompts go in as token ids, and the text is made
from the answer's ids as under every other engine.

Its distributions are the model's own, before temperature, penalties and cuts (logprobs_mode raw_logprobs), as wide as
`teacher.logits.k`. What needs the whole vocabulary (kind sampled, another temperature) vLLM cannot give.

Run with vLLM 0.32. Its releases so far (0.33) want transformers below 5.21, so it lives in an environment of its own,
where Retort generates and does not train.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data_prep.completions import completion_text
from data_prep.identity import PLACE, model_identity, teacher_ref
from data_prep.logit_cache import Sparse, join, scored_positions
from data_prep.tokens import fetch
from distill.logits import sparse_from_topk
from distill.teachers import CUT, Completion, Request
from recipes.errors import EngineError, RecipeError
from recipes.refs import parse_ref
from recipes.schema import Recipe
from recipes.schema_teacher import Logits, Teacher, VllmEngine

KEY = "teacher.engine.vllm"
AHEAD = 4  # requests in flight for each that vLLM runs side by side: its queue never runs dry
SCORING = 64  # sequences in flight while scoring; each brings k + 1 numbers a token
CHUNK = 2048  # tokens of a step where distributions are wanted: each costs a float32 row of the vocabulary, or two
OURS = {
    "model": PLACE,
    "tokenizer": "teacher.tokenizer",
    "dtype": f"{KEY}.dtype",
    "max_model_len": f"{KEY}.max_model_len",
    "tensor_parallel_size": f"{KEY}.tensor_parallel",
    "gpu_memory_utilization": f"{KEY}.memory",
    "max_logprobs": "teacher.logits.k",
    "logprobs_mode": "teacher.logits",
}
PICKLED = {"auto", "hf", "pt", "npcache"}  # ways of loading that may fall back to pickled weights


@dataclass(frozen=True)
class _Job:
    """A prompt for vLLM; without parameters it is answered by nothing.

    Attributes:
        of: what it was made from.
    """

    prompt: list[int]
    params: Any | None
    of: Any


class VllmTeacher:
    """See `distill.teachers.Teacher`.

    Attributes:
        llm: vLLM itself.

    Args:
        tokenizer: the teacher's (transformers); loaded when None.

    Raises:
        EngineError: vLLM is missing, cannot start, or cannot give the distributions that the recipe asks for.
        RecipeError: the model cannot be fetched, or `extra` says what another key says.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any | None) -> None:
        teacher = recipe.teacher
        assert teacher is not None
        if teacher.logits is not None:
            _require_topk(teacher.logits)
        _require_extra(teacher.engine.options)
        vllm = _vllm()
        options = _arguments(teacher)
        self.identity = model_identity(recipe)
        self._name = teacher.model
        self._tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(options["tokenizer"])
        try:
            self.llm: Any = vllm.LLM(**options)
        except Exception as error:
            remedy = f"its messages above say more; {KEY}.memory, max_model_len and tensor_parallel decide what fits"
            raise EngineError(f"vLLM cannot start: {_words(error)}", PLACE, remedy) from None
        self._engine = self.llm.llm_engine
        config = self._engine.vllm_config
        self._longest = int(config.model_config.max_model_len)
        self._flight = AHEAD * int(config.scheduler_config.max_num_seqs)
        spec = teacher.logits
        self._width = min(spec.k, int(config.model_config.get_vocab_size())) if spec is not None else None
        self._capture = self._width if spec is not None and spec.while_generating else None
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        self._params = partial(vllm.SamplingParams, detokenize=False, flat_logprobs=True, output_kind=kinds.FINAL_ONLY)
        self._numbers = itertools.count()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """See the protocol. An answer ends at the latest one token before vLLM's window, so that it can be scored; a
        prompt that leaves no room for one is answered by nothing, cut."""
        for job, output, seconds in self._run(map(self._asked, requests), self._flight):
            yield self._completion(job, output, seconds)

    def score(self, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[Sparse]:
        """See the protocol."""
        if self._width is None:
            raise EngineError("nothing says what is kept of the distributions", "teacher.logits", "set it ({} will do)")
        found: dict[int, Sparse] = {}
        wanted = 0
        for job, output, _ in self._run(self._scored(sequences), SCORING):
            number, ids, places = job.of
            logprobs = output.prompt_logprobs if output is not None else None
            found[number] = self._sparse(logprobs, ids, places)
            while wanted in found:  # vLLM serves first come, first: few have to wait here
                yield found.pop(wanted)
                wanted += 1

    def close(self) -> None:
        """Give the card and the processes back."""
        self._engine.engine_core.shutdown()

    def _asked(self, request: Request) -> _Job:
        if request.prompt_ids is None:
            raise EngineError("vLLM in this process needs prompts as token ids", PLACE, "name teacher.tokenizer")
        limit = min(request.max_tokens, self._longest - 1 - len(request.prompt_ids))
        sampling = {name: int(value) if name == "top_k" else value for name, value in request.sampling.items()}
        params = None
        if limit > 0:
            with _failing("refuses the sampling", "teacher.sampling", ""):
                params = self._params(seed=request.seed, max_tokens=limit, logprobs=self._capture, **sampling)
        return _Job(list(request.prompt_ids), params, request)

    def _completion(self, job: _Job, output: Any, seconds: float) -> Completion:
        request = job.of
        answer = output.outputs[0] if output is not None else None
        ids = tuple(int(i) for i in answer.token_ids) if answer is not None else ()
        logprobs = answer.logprobs if answer is not None else None
        return Completion(
            key=request.key,
            text=completion_text(ids, self._tokenizer, job.prompt),
            finish=str(answer.finish_reason) if answer is not None else CUT,
            token_ids=ids,
            prompt_tokens=len(job.prompt),
            completion_tokens=len(ids),
            seconds=seconds,
            model=self._name,
            max_tokens=request.max_tokens,
            sparse=self._sparse(logprobs, ids, range(len(ids))) if self._capture is not None else None,
        )

    def _scored(self, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[_Job]:
        for number, (ids, marks) in enumerate(sequences):
            places = scored_positions(marks)
            if places and len(ids) >= self._longest:
                what = f"a sequence of {len(ids):,} tokens is longer than vLLM's window of {self._longest:,} less one"
                raise EngineError(what, f"{KEY}.max_model_len", "raise it, or lower train.seq_len")
            params = self._params(temperature=0.0, max_tokens=1, prompt_logprobs=self._width) if places else None
            yield _Job(list(ids), params, (number, ids, places))

    def _run(self, jobs: Iterable[_Job], most: int) -> Iterator[tuple[_Job, Any, float]]:
        """Each job with vLLM's output (None for one without parameters) and its seconds, as they finish.

        Args:
            most: jobs in flight.
        """
        todo, flying = iter(jobs), dict[str, tuple[_Job, float]]()
        try:
            while True:
                fresh = 0
                for job in itertools.islice(todo, most - len(flying)):
                    fresh += 1
                    if job.params is None:
                        yield job, None, 0.0
                        continue
                    name = str(next(self._numbers))
                    flying[name] = job, time.monotonic()
                    with _failing():
                        self._engine.add_request(name, {"prompt_token_ids": job.prompt}, job.params)
                if not flying and not fresh:
                    return
                if flying:
                    with _failing():
                        outputs = self._engine.step()
                    for output in outputs:
                        if output.finished and output.request_id in flying:
                            job, began = flying.pop(output.request_id)
                            yield job, output, time.monotonic() - began
        finally:
            if flying:  # nobody wants the rest
                with suppress(Exception):
                    self._engine.abort_request(list(flying))

    def _sparse(self, logprobs: Any, ids: Sequence[int], places: Sequence[int]) -> Sparse:
        """The distributions at some places of a sequence, from vLLM's flat lists: at every position the token that
        stands there, then the likeliest."""
        if not len(places):
            return join([])
        assert self._width is not None
        entries = np.asarray(logprobs.start_indices)[list(places), None] + np.arange(self._width + 1)
        tokens = np.asarray(logprobs.token_ids)[entries]
        logs = np.asarray(logprobs.logprobs)[entries]
        if not np.array_equal(tokens[:, 0], np.asarray(ids)[list(places)]):
            raise EngineError("vLLM's log-probabilities belong to other tokens", PLACE, "this version of it is unknown")
        return sparse_from_topk(tokens[:, 1:], logs[:, 1:], logs[:, 0])


def _require_topk(spec: Logits) -> None:
    if spec.kind == "topk" and spec.temperature == 1:
        return
    asked = f"kind: {spec.kind}" if spec.kind != "topk" else f"temperature: {spec.temperature}"
    what = f"vLLM tells the likeliest tokens at temperature 1, which is not enough for {asked}"
    raise EngineError(what, "teacher.logits", "use teacher.engine: transformers, or kind: topk at temperature 1")


def _vllm() -> Any:
    """The library, with its telemetry off and its chatter down to warnings."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            remedy = (
                "run `vllm serve` and use engine: http, or install vllm in an environment of its own, "
                "since it wants an older transformers than Retort trains with"
            )
            raise EngineError("vllm is not installed", "teacher.engine", remedy) from None
        raise EngineError(f"vllm cannot be imported: {_words(error)}", "teacher.engine", "mend its install") from None


def _require_extra(options: VllmEngine) -> None:
    for name in options.extra:
        if name in OURS:
            raise RecipeError(f"'{name}' is said elsewhere", f"{KEY}.extra", f"set {OURS[name]}")
    if options.extra.get("trust_remote_code"):
        raise RecipeError("a teacher's repository runs no code", f"{KEY}.extra", "leave trust_remote_code out")
    if options.extra.get("load_format") in PICKLED:
        raise RecipeError("weights are read from safetensors only", f"{KEY}.extra", "leave load_format out")


def _arguments(teacher: Teacher) -> dict[str, Any]:
    """What vllm.LLM is called with.

    Raises:
        RecipeError: the model cannot be fetched, or is a service.
    """
    options: VllmEngine = teacher.engine.options
    ref = teacher_ref(teacher.model)
    if ref is None:
        raise RecipeError(f"{teacher.model} is a service, and vLLM needs weights", PLACE, "use engine: http")
    folder = fetch(ref, True, PLACE)
    tokens = fetch(parse_ref(teacher.tokenizer), False, "teacher.tokenizer") if teacher.tokenizer else folder
    chunk = {} if teacher.logits is None else {"max_num_batched_tokens": CHUNK, "max_logprobs": teacher.logits.k}
    return {
        "model": str(folder),
        "tokenizer": str(tokens),
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "tensor_parallel_size": options.tensor_parallel,
        "gpu_memory_utilization": options.memory,
        "logprobs_mode": "raw_logprobs",
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        **chunk,
        **options.extra,
    }


def _load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@contextmanager
def _failing(
    what: str = "failed", place: str = PLACE, remedy: str = "run again; what was answered is kept"
) -> Iterator[None]:
    """Say in one line what vLLM says in many; its exceptions have no common base."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"vLLM {what}: {_words(error)}", place, remedy) from None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
