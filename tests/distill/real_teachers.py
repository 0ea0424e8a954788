"""What the tests of real engines share: prompts of the embedded legal data, and plain greedy decoding of them here.

It is also the process in which vLLM runs, under a Python of its own: `python real_teachers.py OUT.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.completions import completion_text
from data_prep.logit_cache import Sparse
from distill.teachers import Request
from recipes.refs import EMBEDDED
from recipes.schema import Recipe

MODEL = EMBEDDED / "tiny-teacher"
PROMPTS, SPACING = 40, 25  # of the 1038 held-out rows
GREEDY = {"temperature": 0.0}
DRAWN = {
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 50.0,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
}
LONGEST = 8  # tokens of an answer; some want more and are cut
WINDOW = 400  # tokens of prompt and answer, of vLLM in process
SIDE = 4  # answers side by side
K = 16


@dataclass(frozen=True)
class Answers:
    """Plain greedy answers, by the key of the request."""

    tokenizer: Any
    ids: dict[str, tuple[int, ...]]
    texts: dict[str, str]
    finishes: dict[str, str]
    prompt_tokens: dict[str, int]


def recipe_for(engine: Any, k: int | None = None, **teacher: Any) -> Recipe:
    """A recipe whose teacher is the embedded one; with `k` it keeps the likeliest tokens."""
    logits = {} if k is None else {"logits": {"k": k}}
    recipe = {
        "name": "real",
        "model": {"base": "embedded:tiny"},
        "data": {"train": [{"embedded": "legal"}]},
        "method": "distill",
        "teacher": {"model": "embedded:tiny-teacher", "engine": engine, **logits, **teacher},
        "use": {"purpose": "research", "distribute": False},
    }
    return Recipe.model_validate(recipe)


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def legal_requests(tokenizer: Any, **changes: Any) -> list[Request]:
    lines = (EMBEDDED / "legal" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for number in range(PROMPTS):
        messages = tuple(json.loads(lines[SPACING * number])["messages"][:1])
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"]
        found.append(Request(f"legal-{number:02}", messages, tuple(ids), GREEDY, 7, LONGEST))
    return [replace(request, **changes) for request in found]


def load_model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def plain_answers() -> Answers:
    """One prompt at a time by transformers' own generate, in float32."""
    import torch

    model, tokenizer = load_model(), load_tokenizer()
    ids, prompts = {}, {}
    for request in legal_requests(tokenizer):
        prompt = torch.tensor([request.prompt_ids])
        row = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LONGEST, do_sample=False)
        ids[request.key] = tuple(row[0, prompt.shape[1] :].tolist())
        prompts[request.key] = prompt.shape[1]
    ends = set(model.generation_config.eos_token_id)
    texts = {key: completion_text(found, tokenizer) for key, found in ids.items()}
    finishes = {key: "stop" if found[-1] in ends else "length" for key, found in ids.items()}
    return Answers(tokenizer, ids, texts, finishes, prompts)


def sequences(answers: Answers) -> list[tuple[list[int], list[bool]]]:
    """Prompts with their answers, and the answers' tokens marked; every third one whole, its first token too."""
    found = []
    for number, request in enumerate(legal_requests(answers.tokenizer)):
        assert request.prompt_ids is not None
        prompt, answer = list(request.prompt_ids), list(answers.ids[request.key])
        found.append((prompt + answer, [number % 3 == 0] * len(prompt) + [True] * len(answer)))
    return found


def log_probs(model: Any, ids: list[int]) -> NDArray[np.float64]:
    """What the model predicts at every position but the first: (tokens - 1, V), in nats."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    found: NDArray[np.float64] = logits.double().log_softmax(-1).numpy()
    return found


def as_json(sparse: Sparse | None) -> dict[str, list[float]] | None:
    names = ("counts", "ids", "log_probs", "actual", "tail")
    return None if sparse is None else {name: getattr(sparse, name).tolist() for name in names}


def from_json(sparse: dict[str, list[float]]) -> Sparse:
    kinds = {"counts": np.uint16, "ids": np.uint32, "log_probs": np.float16, "actual": np.float16, "tail": np.float16}
    arrays = {name: np.array(sparse[name], kind) for name, kind in kinds.items()}
    return Sparse(weights=None, **arrays)


def distance(found: Sparse, exact: NDArray[np.float64], actual: list[int], k: int) -> float:
    """How far the k likeliest at n positions, whoever found them, are from the exact log-probabilities (n, V).

    Returns:
        Largest distance in nats, of the likeliest tokens and of the actual ones (n,). What is below -16, where float16
        goes in steps of 0.016, does not count. The mass of the rest is what 1 lacks, so it is checked as a probability.
    """
    n = len(exact)
    assert found.counts.tolist() == [k] * n and found.actual.shape == found.tail.shape == (n,)
    ids, logs = found.ids.reshape(n, k).astype(int), found.log_probs.astype(float).reshape(n, k)
    ranked = np.sort(exact, axis=1)[:, ::-1]
    rest = np.exp(ranked[:, k:]).sum(axis=1)
    assert np.abs(np.exp(found.tail.astype(float)) - rest).max() < 1e-6 + 2e-3 * rest.max()
    pairs = [
        (logs, np.take_along_axis(exact, ids, 1)),  # each token has its own log-probability
        (logs, ranked[:, :k]),  # and no likelier one was left out
        (found.actual.astype(float), exact[np.arange(n), actual]),
    ]
    return max(float(np.abs(np.where(right > -16, got - right, 0)).max()) for got, right in pairs)


def in_vllm(out: Path) -> None:
    """All that is asked of vLLM in process, in one start of it; what came of it is written to `out`."""
    from distill.engine_vllm import VllmTeacher
    from recipes.errors import EngineError

    tokenizer = load_tokenizer()
    options = {"dtype": "float32", "max_model_len": WINDOW, "extra": {"enforce_eager": True, "max_num_seqs": SIDE}}
    teacher = VllmTeacher(recipe_for({"vllm": options}, k=K), tokenizer)
    requests, taken, found = legal_requests(tokenizer), [], {}

    def answers(asked: Iterable[Request]) -> list[dict[str, Any]]:
        return [{**vars(c), "sparse": as_json(c.sparse)} for c in teacher.generate(asked)]

    def error(work: Callable[[], Any]) -> str:
        try:
            work()
        except EngineError as wrong:
            return str(wrong)
        return "none"

    stream = teacher.generate(taken.append(request) or request for request in requests)
    next(stream)
    found["taken"] = len(taken)
    stream.close()
    found["left"] = teacher._engine.get_num_unfinished_requests()
    found["greedy"] = answers(requests)
    marked = [(ids, [n >= start for n in range(len(ids))]) for ids, start in _texts(requests, found["greedy"])]
    marked.append(([5, 6, 7], [True, False, True]))  # the first token is never scored
    marked.append(([5, 6, 7], [True, False, False]))
    found["scored"] = [as_json(sparse) for sparse in teacher.score(marked)]
    drawn = [replace(r, sampling=DRAWN) for r in requests[:12]]
    found["drawn"], found["again"] = answers(drawn), answers(drawn)
    found["otherwise"] = answers(replace(request, seed=8) for request in drawn)
    long = (requests[0].prompt_ids or ()) * 9
    found["window"] = answers([replace(requests[0], key=str(n), prompt_ids=long[:n]) for n in (WINDOW - 4, WINDOW)])
    found["too long"] = error(lambda: list(teacher.score([(list(long[:WINDOW]), [True] * WINDOW)])))
    found["no ids"] = error(lambda: list(teacher.generate([replace(requests[0], prompt_ids=None)])))
    found["bad sampling"] = error(lambda: list(teacher.generate([replace(requests[0], sampling={"top_p": 7.0})])))
    found["after"] = answers(requests[:2])
    found["identity"] = teacher.identity
    out.write_text(json.dumps(found), encoding="utf-8")
    teacher.close()


def _texts(requests: list[Request], found: list[dict[str, Any]]) -> Iterator[tuple[list[int], int]]:
    """Prompt and answer, and where the answer begins."""
    answer = {one["key"]: one["token_ids"] for one in found}
    for request in requests:
        prompt = list(request.prompt_ids or ())
        yield [*prompt, *answer[request.key]], len(prompt)


if __name__ == "__main__":
    in_vllm(Path(sys.argv[1]))
