"""What our generation costs beside the engine's own: the same prompts, the same model, in one run.

    python -m scripts.bench.generation [--part engine] [--engine vllm] [--model REF] [--prompts N] [--max-tokens N]
                                       [--side N] [--repeats N] [--drawn] [--patience SECONDS]
    python -m scripts.bench.generation --part stage
    python -m scripts.bench.generation --part http --url http://127.0.0.1:8000/v1 --served-as NAME

Pairs of the engine part, each of them alternating, with tokens of answers a second:

- continuous: our `generate` behind the journal, against `model.generate_batch` called directly, with the same cache.
- plain: our `generate` behind the journal, against `model.generate` on the same padded batches.
- vLLM (in an environment that has it): our `generate` behind the journal, against `LLM.generate` of the same engine.

The http part has one pair: our client behind the journal, against a bare asyncio client of httpx that sends the same
bodies with the same concurrency to the same server (vLLM's, or that of `transformers serve`).

Ours renders no prompts (neither does the other side), but it decodes the answers and writes each to the disk before it
counts. A ratio is that of two runs that follow one another; the table shows the median of the ratios and their range,
by the clock and by the processor's time (all threads of this process and of those that it started), which other work on
the machine disturbs less. With --patience every run waits up to so long for the machine to be idle.

The stage part runs the engine alone, and then the journal and the filters (overlap with held-out rows and
near-duplicates among them) on what it answered, and tells what these take of the engine's time; and what they take of
answers as long as reasoning makes them, which no engine need write for that.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes.quiet import opt_out
from recipes.refs import EMBEDDED
from scripts.bench.data_prep import show

GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 1.0, "top_p": 0.95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["engine", "stage", "http"], default="engine")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--model", default="embedded:tiny-teacher")
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--side", type=int, default=16, help="answers side by side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--drawn", action="store_true", help="sampled answers instead of greedy ones")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--url", help="of the server, for the http part")
    parser.add_argument("--served-as", help="the name by which the server knows the model")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, each run")
    options = parser.parse_args()
    if options.part == "http" and not options.url:
        parser.error("--part http needs --url")
    opt_out()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    from data_prep.tokens import load_tokenizer
    from recipes.schema import Model

    tokenizer = load_tokenizer(Model(base=options.model)).backend
    asked = make_requests(tokenizer, options)
    title = f"{len(asked)} prompts, at most {options.max_tokens} tokens, {options.side} side by side, {options.model}"
    if options.part == "stage":
        from scripts.bench.stage import HEADER, beside

        show(title, HEADER, beside(options, folder, tokenizer, asked))
        return
    pairs = {"transformers": compare_transformers, "vllm": compare_vllm}[options.engine]
    pairs = compare_http if options.part == "http" else pairs
    columns = ["side", "tokens", "tokens/s (range)", "ratio (range)", "ratio by processor time (range)", "ms/answer"]
    show(title, columns, pairs(options, folder, tokenizer, asked))


def compare_transformers(
    options: argparse.Namespace, folder: Path, tokenizer: Any, asked: list[Any]
) -> list[list[str]]:
    """Our side against transformers' two ways of generating."""
    from distill.engine_transformers import TransformersTeacher

    lines = []
    for way, direct in (("continuous", generate_batch), ("plain", generate)):
        engine = {"batching": way, "batch_size": options.side, "device": options.device}
        teacher = TransformersTeacher(make_recipe(options, {"transformers": engine}, folder), tokenizer)
        runs = 0

        def ours(teacher: Any = teacher, way: str = way) -> int:
            nonlocal runs
            runs += 1
            return journalled(teacher, asked, folder / f"{way}-{runs}")

        sides: dict[str, Callable[[], int]] = {
            f"Retort, {way}": ours,
            direct.__name__: lambda teacher=teacher, direct=direct: direct(teacher, asked, options),  # type: ignore
        }
        lines += race(sides, options, len(asked))
        teacher.close()
    return lines


def compare_vllm(options: argparse.Namespace, folder: Path, tokenizer: Any, asked: list[Any]) -> list[list[str]]:
    """Our side against vLLM's own offline client; both send token ids and get them back."""
    import torch

    from distill.engine_vllm import VllmTeacher

    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; its own choice is a share of the machine
    extra = {"enforce_eager": not torch.cuda.is_available(), "enable_prefix_caching": False}
    engine = {"max_model_len": 512, "dtype": "float32", "extra": {**extra, "max_num_seqs": options.side}}
    teacher = VllmTeacher(make_recipe(options, {"vllm": engine}, folder), tokenizer)
    runs = 0

    def ours() -> int:
        nonlocal runs
        runs += 1
        return journalled(teacher, asked, folder / f"vllm-{runs}")

    def direct() -> int:
        params = [teacher._params(max_tokens=one.max_tokens, seed=one.seed, **one.sampling) for one in asked]
        prompts = [{"prompt_token_ids": list(one.prompt_ids)} for one in asked]
        outputs = teacher.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    try:
        return race({"Retort, vLLM": ours, "LLM.generate": direct}, options, len(asked))
    finally:
        teacher.close()


def compare_http(options: argparse.Namespace, folder: Path, tokenizer: Any, asked: list[Any]) -> list[list[str]]:
    """Our client against a bare one, which keeps as many requests open and reads nothing but the count of tokens."""
    import asyncio

    import httpx

    from distill.engine_http import HttpTeacher

    served = {"served_as": options.served_as} if options.served_as else {}
    engine = {"urls": [options.url], "parallel": options.side, **served}
    teacher = HttpTeacher(make_recipe(options, {"http": engine}, folder), tokenizer)
    calls = [teacher._call(one) for one in asked]
    runs = 0

    def ours() -> int:
        nonlocal runs
        runs += 1
        return journalled(teacher, asked, folder / f"http-{runs}")

    async def all_calls() -> int:
        turn = asyncio.Semaphore(options.side)
        limits = httpx.Limits(max_connections=options.side, max_keepalive_connections=options.side)
        async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:

            async def one(call: Any) -> int:
                async with turn:
                    reply = await client.post(options.url.rstrip("/") + call.path, json=call.body)
                return int(reply.raise_for_status().json()["usage"]["completion_tokens"])

            return sum(await asyncio.gather(*map(one, calls)))

    return race({"Retort, http": ours, "bare httpx": lambda: asyncio.run(all_calls())}, options, len(asked))


def race(sides: dict[str, Callable[[], int]], options: argparse.Namespace, answers: int) -> list[list[str]]:
    """Let two sides take turns, each beginning every second time, after one round that is not counted."""
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    tokens = {name: run() for name, run in sides.items()}
    for turn in range(options.repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            quiet(options.patience)
            costs[name].append(measured(sides[name])[1:])
    (ours, own), (other, others) = costs.items()
    more = tokens[ours] / tokens[other]
    by_clock, by_processor = ([more * b[i] / a[i] for a, b in zip(own, others, strict=True)] for i in (0, 1))
    lines = []
    for name, found, ratios in ((ours, own, (by_clock, by_processor)), (other, others, None)):
        rates, used = ([tokens[name] / s for s, _ in found], [1e3 * p / answers for _, p in found])
        compared = [spread(values) for values in ratios] if ratios else ["", ""]
        lines.append([name, f"{tokens[name]:,}", spread(rates, ",.0f"), *compared, spread(used, ".1f")])
    return lines


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What came of it, seconds by the clock, and processor seconds of this process and those that it started."""
    gc.collect()
    clock, processor = time.perf_counter(), processor_seconds()
    found = work()
    return found, time.perf_counter() - clock, processor_seconds() - processor


def processor_seconds() -> float:
    """Of this process to the microsecond, and of those below it (engines have some) to a hundredth. Linux."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
            used[int(path.parent.name)] = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    below, more = set[int](), {os.getpid()}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        below |= more
    return time.process_time() + sum(used[process] for process in below)


def quiet(patience: float) -> None:
    """Wait until the machine has been idle for a second, for `patience` seconds at the most. Linux."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = _idle()
        time.sleep(1)
        if _idle() - before > 0.85 * (os.cpu_count() or 1):
            return


def _idle() -> float:
    """Seconds that all cores together have been idle since the machine was started."""
    return int(Path("/proc/stat").read_text().split()[4]) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float], form: str = ".3f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def make_recipe(options: argparse.Namespace, engine: dict[str, Any], folder: Path) -> Any:
    from recipes.load import load_recipe

    rows, path = folder / "rows.jsonl", folder / "recipe.yaml"
    rows.write_text(json.dumps({"prompt": "What is 1 + 1?"}) + "\n", encoding="utf-8")
    tree = {
        "name": "bench",
        "model": {"base": "embedded:tiny"},
        "data": {"train": [{"path": str(rows)}]},
        "method": {"type": "distill"},
        "teacher": {"model": options.model, "engine": engine},
    }
    path.write_text(json.dumps(tree), encoding="utf-8")
    return load_recipe(path)


def make_requests(tokenizer: Any, options: argparse.Namespace) -> list[Any]:
    """Questions of both embedded tasks in turn: short and long prompts, short and long answers."""
    from distill.teachers import Request

    files = [EMBEDDED / task / "train.jsonl" for task in ("arithmetic", "legal")]
    tasks = [path.read_text(encoding="utf-8").splitlines() for path in files]
    rows = [json.loads(tasks[i % 2][i // 2]) for i in range(options.prompts)]
    found = []
    for number, row in enumerate(rows):
        messages = row["messages"][:1]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        sampling = DRAWN if options.drawn else GREEDY
        found.append(Request(f"{number:06d}", tuple(messages), tuple(ids), sampling, 1, options.max_tokens))
    return found


def journalled(teacher: Any, asked: list[Any], folder: Path) -> int:
    """Our side: every answer on the disk. Returns the tokens of all answers."""
    from distill.journal import Journal

    with Journal(folder) as journal:
        return sum(completion.completion_tokens for completion in journal.run(asked, lambda: teacher))


def _settings(teacher: Any, options: argparse.Namespace) -> Any:
    from transformers import GenerationConfig

    draws = {"do_sample": True, "top_k": 0, **DRAWN} if options.drawn else {"do_sample": False}
    ends, pad = list(teacher.facts.end_ids), teacher.facts.pad_id
    return GenerationConfig(max_new_tokens=options.max_tokens, eos_token_id=ends, pad_token_id=pad, **draws)


def generate_batch(teacher: Any, asked: list[Any], options: argparse.Namespace) -> int:
    """transformers' continuous batching, called directly, with the cache that our side has."""
    from distill.continuous import Continuous

    longest = max(len(one.prompt_ids) for one in asked), options.max_tokens
    settings = Continuous(teacher.model, teacher.facts, GREEDY, lambda one: one.max_tokens, options.side, longest)
    outputs = teacher.model.generate_batch(
        [list(one.prompt_ids) for one in asked],
        generation_config=_settings(teacher, options),
        continuous_batching_config=settings.config(),
        progress_bar=False,
    )
    return sum(len(output.generated_tokens) for output in outputs.values())


def generate(teacher: Any, asked: list[Any], options: argparse.Namespace) -> int:
    """transformers' plain generation, on batches of like length."""
    import torch

    settings, tokens = _settings(teacher, options), 0
    prompts = sorted((list(one.prompt_ids) for one in asked), key=len, reverse=True)
    for start in range(0, len(prompts), options.side):
        batch = prompts[start : start + options.side]
        width, pad = len(batch[0]), teacher.facts.pad_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=teacher.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=teacher.device)
        output = teacher.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for line in output[:, width:].tolist():
            end = next((i for i, token in enumerate(line) if token in teacher.facts.end_ids), len(line) - 1)
            tokens += end + 1
    return tokens


if __name__ == "__main__":
    main()
