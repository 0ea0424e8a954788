"""What our generation costs beside the engine's own: the same prompts, the same model, in one run.

    python -m scripts.bench.generation [--engine vllm] [--model REF] [--prompts N] [--max-tokens N] [--side N]
                                       [--repeats N] [--drawn]

Pairs, each of them alternating, with tokens of answers a second:

- continuous: our `generate` behind the journal, against `model.generate_batch` called directly, with the same cache.
- plain: our `generate` behind the journal, against `model.generate` on the same padded batches.
- vLLM (where it is installed): our `generate` behind the journal, against `LLM.generate` of the same engine.

Ours renders no prompts (neither does the other side), but it decodes the answers and writes each to the disk before it
counts. A ratio is that of two runs that follow one another; the table shows the median of the ratios and their range,
by the clock and by the processor's time (all threads of this process), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.quiet import opt_out
from recipes.refs import EMBEDDED
from scripts.bench.data_prep import show

GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 1.0, "top_p": 0.95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--model", default="embedded:tiny-teacher")
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--side", type=int, default=16, help="answers side by side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--drawn", action="store_true", help="sampled answers instead of greedy ones")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    opt_out()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    from data_prep.tokens import load_tokenizer
    from recipes.schema import Model

    tokenizer = load_tokenizer(Model(base=options.model)).backend
    asked = make_requests(tokenizer, options)
    pairs = compare_vllm if options.engine == "vllm" else compare_transformers
    title = f"{len(asked)} prompts, at most {options.max_tokens} tokens, {options.side} side by side, {options.model}"
    columns = ["side", "tokens", "tokens/s", "ratio (range)", "ratio by processor time (range)"]
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
        lines += race(sides, options.repeats)
        teacher.close()
    return lines


def compare_vllm(options: argparse.Namespace, folder: Path, tokenizer: Any, asked: list[Any]) -> list[list[str]]:
    """Our side against vLLM's own offline client; both send token ids and get them back."""
    from distill.engine_vllm import VllmTeacher

    engine = {
        "max_model_len": 512,
        "dtype": "float32",
        "extra": {"enforce_eager": True, "enable_prefix_caching": False},
    }
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
        return race({"Retort, vLLM": ours, "LLM.generate": direct}, options.repeats)
    finally:
        teacher.close()


def race(sides: dict[str, Callable[[], int]], repeats: int) -> list[list[str]]:
    """Let two sides take turns, each beginning every second time, after one round that is not counted."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    tokens = {name: run() for name, run in sides.items()}
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            gc.collect()
            clock, processor = time.perf_counter(), time.process_time()
            tokens[name] = sides[name]()
            seconds, used = time.perf_counter() - clock, time.process_time() - processor
            rates[name].append((tokens[name] / seconds, tokens[name] / used))
    (ours, own), (other, others) = rates.items()
    by_clock, by_processor = ([a[i] / b[i] for a, b in zip(own, others, strict=True)] for i in (0, 1))
    return [
        [ours, f"{tokens[ours]:,}", _median(own), _spread(by_clock), _spread(by_processor)],
        [other, f"{tokens[other]:,}", _median(others), "", ""],
    ]


def _median(rates: list[tuple[float, float]]) -> str:
    return f"{statistics.median(rate for rate, _ in rates):,.0f}"


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


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
