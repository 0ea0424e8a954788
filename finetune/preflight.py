"""Looked at before the first step, printed, and kept: what trains, on what, whether it fits."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.completions import end_ids
from data_prep.pairing import end_tokens
from data_prep.tokens import Tokenizer, fetch
from finetune.callbacks import peak_memory
from finetune.coverage import coverage, sizes, skeleton
from finetune.evals import measure
from finetune.layout import Layout
from finetune.on_policy import longest_answers
from finetune.policy import longest_completions
from finetune.sequences import batches_of, kept_randomness, tokens_per_forward
from recipes.errors import DataError, MemoryFitError, RetortError, out_of_memory
from recipes.schema import Recipe
from recipes.schema_method import DistillOnPolicy

PROBED_ANSWER = 8  # tokens: enough to fill the cache with the prompts and to write on


def before_loading(recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], run_dir: Path) -> None:
    """Refuse by the rows and by the shapes of the model what `check` would refuse after the base was measured.

    Raises:
        RecipeError: see `coverage`. DataError: see `special_tokens`.
        RetortError: too little disk space for the checkpoints.
    """
    special_tokens(tokenizer, rows, recipe)
    if (model := skeleton(recipe)) is not None:
        coverage(model, recipe)
        _disk(run_dir, recipe, sizes(model)[1])


def check(
    recipe: Recipe,
    layout: Layout,
    tokenizer: Tokenizer,
    trainer: Any,
    rows: Sequence[dict[str, Any]],
    measured: Sequence[dict[str, Any]],
    counts: dict[str, Any],
    run_dir: Path,
) -> dict[str, Any]:
    """Run every check that needs no step. Returns the content of preflight.json.

    Args:
        rows: training rows. measured: held-out rows that base and tuned model are measured on.
        counts: of the prepared data.

    Raises:
        RecipeError: see `coverage`.
        MemoryFitError: the longest batch does not fit.
        RetortError: too little disk space for the checkpoints.
    """
    model = trainer.model
    total, trainable = sizes(model)
    cut = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # once training begins
    disk = _disk(run_dir, recipe, trainable)
    probed: dict[str, Any] | None = None
    if not cut:
        probed = probe(trainer, layout, longest_batch(trainer, recipe, layout, rows))
        probed |= probe_measurement(model, recipe, tokenizer, measured)
    return {
        "coverage": coverage(model, recipe),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trained_token_share": counts["trained_tokens"] / counts["train_tokens"],
        "truncated_rows": counts["truncated_rows"],
        "lost_tokens": counts["lost_tokens"],
        "special_tokens": special_tokens(tokenizer, rows, recipe),
        "disk": disk,
        "probe": probed,
        "adapter_check": None,
    }


def special_tokens(tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """End of turn is trained, padding is not the end token, no doubled begin token; over all training rows.

    Raises:
        DataError: the loss of a chat ends with another token than one that ends a turn: it would never learn to stop.
    """
    backend = tokenizer.backend
    bos = backend.bos_token_id
    doubled = sum(bos is not None and row["input_ids"][:2] == [bos, bos] for row in rows)
    # Of a prompt the completion is yet to be written.
    return [
        *(_ends(backend, rows, recipe) if not recipe.prompts_only else ()),
        {
            "check": "padding is not the end token",
            "ok": backend.pad_token_id != backend.eos_token_id,
            "detail": f"padding {backend.pad_token!r}, end {backend.eos_token!r}; padding is never in the loss",
        },
        {
            "check": "no doubled begin token",
            "ok": doubled == 0,
            "detail": f"{doubled} rows" if bos is not None else "the tokenizer has no begin token",
        },
    ]


def _ends(backend: Any, rows: Sequence[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """With which tokens the loss of the chats ends, and whether generation stops there. Plain text may end anywhere."""
    stops = end_tokens(backend, fetch(recipe.model.ref, False))
    known = stops | end_ids(backend)
    found: Counter[int] = Counter()
    for row in rows:
        if row["text"] is not None or row["cut_tokens"]:
            continue
        last = next((i for i in range(len(row["loss_mask"]) - 1, -1, -1) if row["loss_mask"][i]), None)
        token = row["input_ids"][last] if last is not None else None
        if token not in known:
            says = f"the loss ends with {backend.convert_ids_to_tokens(token)!r}" if token is not None else "no loss"
            raise DataError(
                f"{says}, which ends no turn, so the model would not learn to stop",
                f"{row['_source']} (row {row['_id']})",
                "look at it with retort prepare --show-masks, and correct the chat template or the row",
            )
        found[token] += 1
    if not found:
        return []

    def names(tokens: Iterable[int]) -> str:
        return ", ".join(repr(backend.convert_ids_to_tokens(token)) for token in sorted(tokens))

    return [
        {
            "check": "the end of the turn is trained",
            "ok": True,
            "detail": f"{found.total()} rows end with {names(found)}",
        },
        {
            "check": "generation stops at the end of the turn",
            "ok": found.keys() <= stops,
            "detail": f"it stops at {names(stops)}",
        },
    ]


def probe(trainer: Any, layout: Layout, batch: dict[str, Any]) -> dict[str, Any]:
    """Run the longest training batch, forward and backward, and forget it.

    Random states are put back, so the run's numbers are those it would have had without the probe.

    Raises:
        MemoryFitError: out of memory.
    """
    model = trainer.model
    tokens = max(int(v.numel()) for v in batch.values() if torch.is_tensor(v) and v.dim() == 2)
    smaller = max(1, layout.micro_batch // 2)
    remedy = f"set train.micro_batch: {smaller}" if layout.micro_batch > 1 else "shorten train.seq_len"
    with _fitting(f"the longest batch ({layout.micro_batch} rows, {tokens:,} tokens)", remedy):
        seconds = _timed_step(trainer, model, batch)
    return {"train_tokens": tokens, "train_seconds": seconds, "peak_memory_bytes": peak_memory()}


def probe_measurement(
    model: Any, recipe: Recipe, tokenizer: Tokenizer, measured: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Measure the longest batch of held-out rows as the run will: their loss, and answers of a few tokens.

    Returns its padded tokens, the tokens of an answer and the seconds; nothing where no row is held out.

    Raises:
        MemoryFitError: out of memory.
    """
    if not measured:
        return {}
    lengths = [max(len(row["input_ids"]), len(row["rejected_ids"] or ())) for row in measured]
    longest = batches_of(lengths, tokens_per_forward(model, measured[0]["input_ids"]))[0]
    answer = min(PROBED_ANSWER, recipe.eval.max_new_tokens)
    short = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"max_new_tokens": answer})})
    # A reward may ask a judge; what it costs in memory is the answer that it marks.
    metrics = {"exact_match" if metric == "reward" else metric for metric in recipe.eval.metrics}
    tokens, started = len(longest) * max(lengths), time.monotonic()
    with _fitting(f"a measurement of {len(longest)} held-out rows ({tokens:,} tokens)", "shorten train.seq_len"):
        measure(model, tokenizer, [measured[i] for i in longest], short, "pre-flight", sorted(metrics))
    seconds = round(time.monotonic() - started, 3)
    found = {"eval_rows": len(longest), "eval_tokens": tokens, "eval_answer_tokens": answer, "eval_seconds": seconds}
    return {**found, "peak_memory_bytes": peak_memory()}


@contextmanager
def _fitting(what: str, remedy: str) -> Iterator[None]:
    """Random states are put back, and memory is given back; that it ran out is said in one line."""
    try:
        with kept_randomness():
            yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise MemoryFitError(f"{what} does not fit", "pre-flight", remedy) from None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def longest_batch(trainer: Any, recipe: Recipe, layout: Layout, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The batch that needs most memory: the longest rows, or the longest prompts with completions of full length."""
    if recipe.method.type == "grpo":
        return longest_completions(rows, recipe.method, layout.micro_batch, trainer.processing_class.pad_token_id)
    if isinstance(recipe.method, DistillOnPolicy):
        return longest_answers(trainer, rows, recipe.method, layout.micro_batch)
    data = trainer.train_dataset
    listed = [data[name] for name, value in data[0].items() if isinstance(value, list)]
    lengths = [max(map(len, parts)) for parts in zip(*listed, strict=True)]
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[: layout.micro_batch]
    batch: dict[str, Any] = trainer.data_collator([data[i] for i in longest])
    return batch


def _timed_step(trainer: Any, model: Any, batch: dict[str, Any]) -> float:
    """Seconds of a forward and a backward, whose gradients and logged numbers are dropped."""
    device = trainer.args.device
    moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # GRPO's loss reads it
    started = time.monotonic()
    model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, dict(moved))
    try:
        trainer.accelerator.backward(loss)
    finally:
        model.zero_grad(set_to_none=True)
    seconds = round(time.monotonic() - started, 3)
    logged = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    for metrics in logged.values():  # TRL averages what it logs over calls; the probe is none of them
        metrics.clear()
    trainer._total_train_tokens = 0
    return seconds


def _disk(run_dir: Path, recipe: Recipe, trainable: int) -> dict[str, int]:
    """Bytes for the kept checkpoints (float32 weights and two optimiser states), one in the making, and the result."""
    needed = trainable * 4 * 3 * (recipe.train.keep_checkpoints + 1) + trainable * 4 + 50_000_000
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise RetortError(
            f"has {free / 1e9:.2f} GB free, the run needs about {needed / 1e9:.2f}",
            str(run_dir),
            "free some space, lower train.keep_checkpoints, or choose another output",
        )
    return {"free_bytes": free, "needed_bytes": needed}
