"""The engine `transformers` with real models: the shipped teacher, and tiny ones of other shapes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model

from data_prep.logit_cache import Sparse, join
from distill.drawing import only
from distill.engine_transformers import TransformersTeacher
from distill.local_scores import Kept, Scorer, split
from distill.teachers import Completion, Request, open_teacher
from recipes.errors import EngineError, MemoryFitError, RecipeError
from recipes.load import load_recipe
from recipes.refs import EMBEDDED
from recipes.schema_teacher import Logits

GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 2.5, "top_p": 0.95, "top_k": 200, "min_p": 0.001}
LIMIT = 24
HALF = 2e-3  # relative difference of two float16 of nearly the same number
Open = Callable[..., TransformersTeacher]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED / "tiny-teacher")


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """48 prompts of different lengths."""
    rows = []
    for task in ("legal", "arithmetic"):
        lines = (EMBEDDED / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line)["messages"][:1] for line in lines[:24]]
    return [tuple(tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"]) for m in rows]


@pytest.fixture(scope="module")
def alone(prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy answers of the library itself, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny-teacher", dtype=torch.float32)
    return [_library(model, prompt, max_new_tokens=LIMIT) for prompt in prompts]


def _library(model: Any, prompt: Sequence[int], **how: Any) -> tuple[int, ...]:
    output = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, **how)
    return tuple(output[0, len(prompt) :].tolist())


@pytest.fixture
def open_one(make_recipe: Callable[..., Path], tokenizer: Any) -> Iterator[Open]:
    """Opens the shipped teacher on the processor; keyword arguments are the engine's options."""
    opened: list[TransformersTeacher] = []

    def open_it(
        model: str = "embedded:tiny-teacher", own: Any = None, logits: dict[str, Any] | None = None, **options: Any
    ) -> TransformersTeacher:
        engine = {"transformers": {"device": "cpu", "batch_size": 8, **options}}
        teacher = {"model": model, "engine": engine, "logits": logits}
        recipe = load_recipe(make_recipe(method={"type": "distill"}, teacher=teacher))
        found = open_teacher(recipe, own or tokenizer)
        assert isinstance(found, TransformersTeacher)
        opened.append(found)
        return found

    yield open_it
    for teacher in opened:
        teacher.close()
    assert [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon] == []


def requests(
    prompts: Sequence[Sequence[int]], sampling: dict[str, float] = GREEDY, limit: int = LIMIT, samples: int = 1
) -> list[Request]:
    return [
        Request(f"{number:03d}/{sample}", (), tuple(prompt), sampling, 7, limit)
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def answers(teacher: TransformersTeacher, asked: Sequence[Request]) -> dict[str, Completion]:
    """By key; each request is answered once."""
    found = list(teacher.generate(iter(asked)))
    assert sorted(completion.key for completion in found) == sorted(request.key for request in asked)
    return {completion.key: completion for completion in found}


def ids_of(teacher: TransformersTeacher, asked: Sequence[Request]) -> dict[str, tuple[int, ...] | None]:
    return {key: completion.token_ids for key, completion in answers(teacher, asked).items()}


# Greedy answers


@pytest.mark.parametrize("way", ["plain", "continuous"])
def test_greedy_answers_are_those_of_each_prompt_alone(
    way: str, open_one: Open, prompts: list[tuple[int, ...]], alone: list[tuple[int, ...]], tokenizer: Any
) -> None:
    assert len({len(prompt) for prompt in prompts}) > 20 and len(set(alone)) > 24
    teacher, asked = open_one(batching=way), requests(prompts)
    found = answers(teacher, asked)
    for request, prompt, ids in zip(asked, prompts, alone, strict=True):
        completion = found[request.key]
        assert completion.token_ids == ids
        assert completion.finish == ("stop" if ids[-1] in {3, 1} else "length")
        assert (completion.prompt_tokens, completion.completion_tokens) == (len(prompt), len(ids))
        assert completion.max_tokens == LIMIT and completion.model == "embedded:tiny-teacher"
        assert completion.text == tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        assert completion.seconds > 0


@pytest.mark.parametrize("way", ["plain", "continuous"])
def test_a_cut_answer_has_exactly_so_many_tokens_and_says_so(
    way: str, open_one: Open, prompts: list[tuple[int, ...]], alone: list[tuple[int, ...]]
) -> None:
    limits = [1 + number % 5 for number in range(len(prompts))]  # different ones in one batch
    asked = [Request(str(n), (), p, GREEDY, 7, limits[n]) for n, p in enumerate(prompts)]
    found = answers(open_one(batching=way), asked)
    cut = [n for n, ids in enumerate(alone) if len(ids) > limits[n]]
    assert 10 < len(cut) < len(prompts)
    for number, ids in enumerate(alone):
        completion = found[str(number)]
        assert completion.token_ids == ids[: limits[number]]
        assert completion.truncated == (number in cut)
        assert completion.finish == ("length" if number in cut else "stop")


def test_auto_measures_both_ways_once_and_writes_nothing_twice(
    open_one: Open, prompts: list[tuple[int, ...]], alone: list[tuple[int, ...]]
) -> None:
    teacher, asked = open_one(batching="auto", batch_size=4), requests(prompts[:24])
    assert [ids for _, ids in sorted(ids_of(teacher, asked).items())] == alone[:24]
    assert set(teacher.speeds) == {"plain", "continuous"} and min(teacher.speeds.values()) > 0
    assert teacher.batching == max(teacher.speeds, key=teacher.speeds.__getitem__)
    assert teacher.notes[0].startswith(f"answers are written in {teacher.batching} batches")
    speeds = dict(teacher.speeds)
    answers(teacher, asked[:4])
    assert teacher.speeds == speeds
    few = open_one(batching="auto", batch_size=16)
    answers(few, asked[:8])
    assert few.batching == "auto" and not few.speeds  # too few to measure with


def test_requests_are_taken_as_they_are_needed(open_one: Open, prompts: list[tuple[int, ...]]) -> None:
    taken = []

    def endless() -> Iterator[Request]:
        number = 0
        while True:
            taken.append(number)
            yield Request(str(number), (), prompts[number % len(prompts)], GREEDY, 7, 2)
            number += 1

    for way in ("plain", "continuous"):
        taken.clear()
        stream = open_one(batching=way).generate(endless())
        assert isinstance(next(stream), Completion)
        assert len(taken) <= 1100
        stream.close()  # type: ignore[attr-defined]  # the fixture sees that no thread is left


# Sampling


@pytest.mark.slow
def test_drawn_answers_depend_on_the_request_alone(open_one: Open, prompts: list[tuple[int, ...]]) -> None:
    asked = requests(prompts[24:36], DRAWN, limit=12, samples=3)
    found = ids_of(open_one(batching="plain"), asked)
    assert len(set(found.values())) > 24
    differing = sum(len({found[f"{n:03d}/{s}"] for s in range(3)}) > 1 for n in range(12))
    assert differing >= 10
    again = open_one(batching="plain", batch_size=5)
    assert ids_of(again, asked[::-1]) == found  # other neighbours, after nothing else
    assert ids_of(again, asked[7:9]) == {request.key: found[request.key] for request in asked[7:9]}
    assert ids_of(open_one(batching="continuous"), asked) == found
    longer = ids_of(again, [Request(r.key, (), r.prompt_ids, r.sampling, r.seed, LIMIT) for r in asked])
    assert all((longer[key] or ())[: len(ids or ())] == ids for key, ids in found.items())
    other = ids_of(again, [Request(r.key, (), r.prompt_ids, r.sampling, 8, 12) for r in asked])
    assert sum(other[key] != found[key] for key in found) > 24


def test_without_room_to_choose_a_draw_is_greedy(
    open_one: Open, prompts: list[tuple[int, ...]], alone: list[tuple[int, ...]]
) -> None:
    for way in ("plain", "continuous"):
        teacher = open_one(batching=way)
        for sampling in ({"temperature": 1.5, "top_k": 1.0}, {"top_p": 1e-6}, {"temperature": 1.0, "min_p": 1.0}, {}):
            found = ids_of(teacher, requests(prompts[:4], sampling, limit=8))
            assert [found[f"{n:03d}/0"] for n in range(4)] == [ids[:8] for ids in alone[:4]]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    chances = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    count = 40_000
    numbers = torch.from_numpy(np.random.default_rng(3).random(count, dtype=np.float32))
    drawn = torch.bincount(only(chances.log().expand(count, -1), numbers).argmax(1), minlength=7).double()
    allowed = chances > 0
    assert drawn[~allowed].sum() == 0
    expected = chances[allowed].double() * count
    assert float(((drawn[allowed] - expected) ** 2 / expected).sum()) < 16.3  # chi-squared, 3 degrees: 1 in 1000
    edges = only(chances.log().expand(3, -1), torch.tensor([0.0, 1 - 2**-24, 1.0])).argmax(1)
    assert edges.tolist() == [1, 5, 5]


def test_penalties_are_those_of_the_library_and_of_openai(open_one: Open, prompts: list[tuple[int, ...]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny-teacher", dtype=torch.float32)
    wanted = [_library(model, p, max_new_tokens=LIMIT, repetition_penalty=1.3) for p in prompts[16:32]]
    teacher = open_one(batching="continuous")
    found = answers(teacher, requests(prompts[16:32], {"temperature": 0.0, "repetition_penalty": 1.3}))
    assert [found[f"{n:03d}/0"].token_ids for n in range(16)] == wanted
    assert len(teacher.notes) == 1 and "batches are plain" in teacher.notes[0]
    free = answers(teacher, requests(prompts[24:40]))
    bound = answers(teacher, requests(prompts[24:40], {"temperature": 0.0, "presence_penalty": 1e4}))
    repeats = [len(c.token_ids or ()) - len(set(c.token_ids or ())) for c in free.values()]
    assert sum(repeats) > 16  # sums repeat digits
    assert all(len(c.token_ids or ()) == len(set(c.token_ids or ())) for c in bound.values())


# Distributions


def full(teacher: TransformersTeacher, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (tokens - 1, V) of what follows each token, by the whole model at once."""
    with torch.no_grad():
        logits = teacher.model(input_ids=torch.tensor([list(ids)])).logits[0, :-1]
    return (logits.float() / temperature).log_softmax(-1)


def assert_is(sparse: Sparse, log_probs: torch.Tensor, actual: torch.Tensor, k: int) -> None:
    """A Sparse of kind topk against whole distributions (n, V)."""
    head, _ = log_probs.topk(k, dim=-1)
    rest = (1 - head.double().exp().sum(-1)).log()
    assert sparse.counts.tolist() == [k] * len(log_probs)
    ids = torch.from_numpy(sparse.ids.astype(np.int64)).view(-1, k)
    kept = torch.from_numpy(sparse.log_probs.astype(np.float32)).view(-1, k)
    torch.testing.assert_close(kept, head, rtol=HALF, atol=HALF)
    torch.testing.assert_close(log_probs.gather(-1, ids), head, rtol=1e-4, atol=1e-4)
    stands = log_probs.gather(-1, actual[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(sparse.actual.astype(np.float32)), stands, rtol=HALF, atol=HALF)
    clear = rest > -9  # below it 1 - sum is all rounding in this test, not in the code under test
    found = torch.from_numpy(sparse.tail.astype(np.float64))
    torch.testing.assert_close(found[clear], rest[clear], rtol=HALF, atol=0.02)
    assert bool((found[~clear] < -8).all())


def test_what_is_kept_while_generating_is_what_scoring_finds(
    open_one: Open, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(prompts[16:36], {**DRAWN, "repetition_penalty": 1.2})  # of which nothing may show in what is kept
    teacher = open_one(batching="plain", logits={"k": 16})
    found = answers(teacher, asked)
    sequences = [_sequence(request, found[request.key]) for request in asked]
    scored = list(teacher.score(sequences))
    assert sum(len(one.counts) for one in scored) > 200
    for request, (ids, _), one in zip(asked, sequences, scored, strict=True):
        kept = found[request.key].sparse
        assert kept is not None and len(kept.counts) == found[request.key].completion_tokens
        for values in ("log_probs", "actual", "tail"):
            np.testing.assert_allclose(getattr(kept, values), getattr(one, values), rtol=HALF, atol=HALF)
        start = len(request.prompt_ids or ())
        assert_is(kept, full(teacher, ids)[start - 1 :], torch.tensor(ids[start:]), 16)
    monkeypatch.setattr("distill.local_scores.PIECE", 8 * 2048)  # made sparse after every step
    pieces = answers(teacher, asked)
    for key, completion in found.items():
        one, other = completion.sparse, pieces[key].sparse
        assert one is not None and other is not None and np.array_equal(one.log_probs, other.log_probs)


def _sequence(request: Request, completion: Completion) -> tuple[list[int], list[bool]]:
    prompt, own = list(request.prompt_ids or ()), list(completion.token_ids or ())
    return prompt + own, [False] * len(prompt) + [True] * len(own)


def test_distributions_come_with_answers_only_where_they_can(open_one: Open, prompts: list[tuple[int, ...]]) -> None:
    asked = requests(prompts[:8])
    for logits, way in (
        ({"k": 4}, "continuous"),
        ({"k": 4, "while_generating": False}, "plain"),
        ({"kind": "sampled"}, "plain"),
        (None, "plain"),
    ):
        found = answers(open_one(batching=way, logits=logits), asked)
        assert all(completion.sparse is None for completion in found.values())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_scores_are_those_of_the_whole_model(
    temperature: float, open_one: Open, prompts: list[tuple[int, ...]]
) -> None:
    teacher = open_one(logits={"k": 32, "temperature": temperature})
    generator = np.random.default_rng(5)
    sequences = [(list(p), (generator.random(len(p)) < 0.3).tolist()) for p in prompts[::4]]
    sequences[2][1][:] = [True] * len(sequences[2][1])  # the first token is not scored even so
    sequences[4][1][:] = [False] * len(sequences[4][1])
    found = list(teacher.score(iter(sequences)))
    assert len(found) == len(sequences)
    for (ids, mask), sparse in zip(sequences, found, strict=True):
        places = torch.tensor([i for i, on in enumerate(mask) if on and i], dtype=torch.long)
        assert len(sparse.counts) == len(places)
        if len(places):
            assert_is(sparse, full(teacher, ids, temperature)[places - 1], torch.tensor(ids)[places], 32)
    assert len(found[2].counts) == len(sequences[2][0]) - 1 and len(found[4].counts) == 0
    assert teacher._scorer is not None and teacher._scorer.head_alone is True


def test_sampled_scores_do_not_depend_on_order_company_or_pieces(
    open_one: Open, prompts: list[tuple[int, ...]]
) -> None:
    teacher = open_one(logits={"kind": "sampled", "draws": 20})
    sequences = [(p, [True] * len(p)) for p in prompts[:12]]
    forth, back = list(teacher.score(sequences)), list(teacher.score(sequences[::-1]))[::-1]
    assert teacher.logits is not None
    small = Scorer(teacher.model, teacher.facts, teacher.logits)
    small.tokens, small.piece = 200, 7
    pieces = list(small.scores(sequences[3:5]))
    for one, other in (*zip(forth, back, strict=True), *zip(forth[3:5], pieces, strict=True)):
        assert one.weights is not None and other.weights is not None
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.counts, other.counts)
        np.testing.assert_allclose(one.weights, other.weights, rtol=HALF, atol=HALF)
    assert len({one.ids.tobytes() for one in forth}) == 12


def test_pieces_of_a_sparse_join_again() -> None:
    counts = np.array([2, 0, 3, 1], np.uint16)
    values = np.arange(6, dtype=np.float16)
    whole = Sparse(
        counts, np.arange(6, dtype=np.uint32), values, values + 10, np.arange(4, dtype=np.float16), values[:4]
    )
    parts = split(whole, [0, 1, 3, 0])
    assert [part.ids.tolist() for part in parts] == [[], [0, 1], [2, 3, 4, 5], []]
    again = join(parts)
    assert again.weights is not None and again.weights.tolist() == [10, 11, 12, 13, 14, 15]
    assert again.counts.tolist() == counts.tolist() and again.actual.tolist() == [0, 1, 2, 3]


def gemma(folder: Path) -> Path:
    """A model that caps its logits after the head, and looks back over a window in every second layer."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    build_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(2)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=16,
        final_logit_softcapping=3.0,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_that_caps_its_logits_is_scored_by_its_own_forward(open_one: Open, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = gemma(tmp_path / "gemma")
    own = AutoTokenizer.from_pretrained(folder)
    texts = [f"The house is {'very ' * n}red. What colour is it?" for n in range(8)]
    prompts = [own(text)["input_ids"] for text in texts]
    teacher = open_one(str(folder), own, logits={"k": 8}, batching="plain")
    asked = requests(prompts, DRAWN, limit=12)
    found = answers(teacher, asked)
    sequences = [_sequence(request, found[request.key]) for request in asked]
    for request, (ids, _), scored in zip(asked, sequences, teacher.score(sequences), strict=True):
        start, kept = len(request.prompt_ids or ()), found[request.key].sparse
        truth, actual = full(teacher, ids)[start - 1 :], torch.tensor(ids[start:])
        assert kept is not None
        assert_is(scored, truth, actual, 8)
        assert_is(kept, truth, actual, 8)
    assert teacher._scorer is not None and teacher._scorer.head_alone is False
    assert ids_of(open_one(str(folder), own, batching="continuous"), asked) == {
        k: c.token_ids for k, c in found.items()
    }


# What goes wrong


def too_much(teacher: TransformersTeacher, dimension: int, most: int) -> list[int]:
    """Let the device run out of memory where the input is larger than `most`. Returns the sizes that came."""
    sizes: list[int] = []

    def hook(_module: Any, arguments: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        sizes.append(ids.shape[dimension])
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")

    teacher.model.register_forward_pre_hook(hook, with_kwargs=True)
    teacher.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return sizes


@pytest.mark.parametrize(("way", "dimension", "most"), [("plain", 0, 3), ("continuous", 1, 400)])
def test_where_memory_runs_out_fewer_answers_are_written_side_by_side(
    way: str,
    dimension: int,
    most: int,
    open_one: Open,
    prompts: list[tuple[int, ...]],
    alone: list[tuple[int, ...]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    teacher, asked = open_one(batching=way), requests(prompts[:24])
    sizes = too_much(teacher, dimension, most)
    assert [ids for _, ids in sorted(ids_of(teacher, asked).items())] == alone[:24]
    assert max(sizes) > most and any("memory ran out" in note for note in teacher.notes)
    sizes.clear()
    answers(teacher, asked[:8])
    assert max(sizes) <= most  # it remembers
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("way", "dimension"), [("plain", 0), ("continuous", 1)])
def test_one_answer_that_does_not_fit_ends_the_run(
    way: str, dimension: int, open_one: Open, prompts: list[tuple[int, ...]]
) -> None:
    teacher = open_one(batching=way, batch_size=4)
    too_much(teacher, dimension, 0)
    with pytest.raises(MemoryFitError, match=r"tokens, its prompt included, does not fit on cpu; lower"):
        answers(teacher, requests(prompts[:6]))


def test_scoring_goes_on_with_smaller_batches(open_one: Open, prompts: list[tuple[int, ...]]) -> None:
    teacher = open_one(logits={"k": 4})
    sequences = [(p, [True] * len(p)) for p in prompts[:12]]
    before = list(teacher.score(sequences))
    sizes = too_much(teacher, 0, 2)
    after = list(teacher.score(sequences))
    assert max(sizes) > 2 and sizes[-1] <= 2
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=HALF, atol=HALF)
    too_much(teacher, 0, 0)
    with pytest.raises(MemoryFitError, match=r"cannot be scored"):
        list(teacher.score(sequences))


@pytest.mark.parametrize("way", ["continuous", "auto"])
def test_a_failure_of_continuous_batching_is_said_or_got_round(
    way: str, open_one: Open, prompts: list[tuple[int, ...]], alone: list[tuple[int, ...]]
) -> None:
    teacher = open_one(batching=way, batch_size=4)

    def hook(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        if "cache" in named and len(calls) > 3:
            raise RuntimeError("no kernel for this attention")
        calls.append(1)

    calls: list[int] = []
    teacher.model.register_forward_pre_hook(hook, with_kwargs=True)
    if way == "auto":
        assert [ids for _, ids in sorted(ids_of(teacher, requests(prompts[:24])).items())] == alone[:24]
        assert teacher.batching == "plain" and "no kernel for this attention" in " ".join(teacher.notes)
    else:
        with pytest.raises(EngineError, match=r"batching: .*no kernel for this attention.*; set it to plain"):
            answers(teacher, requests(prompts[:24]))


@pytest.mark.parametrize("way", ["plain", "continuous"])
def test_an_answer_ends_where_the_context_does(way: str, open_one: Open, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    teacher = open_one(str(tiny_model), AutoTokenizer.from_pretrained(tiny_model), batching=way)
    assert teacher.facts.context == 256
    lengths = {"full": 256, "over": 300, "close": 253, "roomy": 20}
    asked = [Request(key, (), (5,) * length, GREEDY, 7, 10) for key, length in lengths.items()]
    found = answers(teacher, asked)
    for key in ("full", "over"):
        assert (found[key].token_ids, found[key].text, found[key].finish) == ((), "", "length")
    assert found["close"].completion_tokens == 3 and found["close"].truncated
    assert found["close"].max_tokens == 10 and 3 < found["roomy"].completion_tokens <= 10
    assert len(teacher.notes) == 1 and "256 tokens" in teacher.notes[0]


def test_what_cannot_be_answered_or_opened_is_said(
    open_one: Open, make_recipe: Callable[..., Path], tokenizer: Any, tiny_model: Path
) -> None:
    recipe = load_recipe(make_recipe(method={"type": "distill"}, teacher={"model": "embedded:tiny-teacher"}))
    with pytest.raises(EngineError, match=r"^teacher.tokenizer: the tokenizer of embedded:tiny-teacher is not at hand"):
        open_teacher(recipe, None)
    with pytest.raises(RecipeError, match=r"^teacher.model: .*; a service has no weights: set teacher.engine to http"):
        open_one("openai:gpt-4o")
    with pytest.raises(
        RecipeError, match=r"^teacher.tokenizer: the tokenizer has token 2047, .* only 3\d\d embeddings"
    ):
        open_one(str(tiny_model))
    with pytest.raises(RecipeError, match=r"dtype: float16 runs on a GPU only; set it to"):
        open_one(dtype="float16")
    teacher = open_one()
    for batching in ("plain", "continuous"):
        teacher.batching = batching
        with pytest.raises(EngineError, match=r"the request k has no prompt tokens"):
            list(teacher.generate([Request("k", (), None, GREEDY, 7, 4)]))
    with pytest.raises(EngineError, match=r"^teacher.logits: nothing is said"):
        list(teacher.score([([5, 6], [True, True])]))


@pytest.mark.slow
def test_four_bit_weights_answer_nearly_as_well(
    open_one: Open, prompts: list[tuple[int, ...]], alone: list[tuple[int, ...]]
) -> None:
    teacher = open_one(quantization="nf4", batching="plain")
    assert sum(type(module).__name__ == "Linear4bit" for module in teacher.model.modules()) == 28
    found = answers(teacher, requests(prompts))
    same = sum(found[f"{n:03d}/0"].token_ids == ids for n, ids in enumerate(alone))
    assert same >= 16


def test_nothing_after_the_end_token_is_kept() -> None:
    spec = Logits(k=2)
    kept = Kept(spec, width=1, limits=[4, 4, 2], ends=[9])
    ids = torch.tensor([[1, 3, 9, 0, 0], [1, 4, 5, 6, 9], [1, 7, 8, 2, 2]])
    torch.manual_seed(0)
    steps = [torch.randn(3, 10) for _ in range(4)]
    for number, logits in enumerate(steps):
        assert kept(ids[:, : 1 + number], logits) is logits
    found = kept.finish(ids)
    assert [len(one.counts) for one in found] == [2, 4, 2]
    for row, own in enumerate(found):
        wanted = [float(steps[s][row].log_softmax(-1)[ids[row, 1 + s]]) for s in range(len(own.counts))]
        np.testing.assert_allclose(own.actual.astype(float), wanted, rtol=HALF)
