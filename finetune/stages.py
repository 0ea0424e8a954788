"""The parts of a run that `train.py` strings together. Each writes what it found into the run directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.cache import cache_folder
from data_prep.masks import Masked, pieces
from data_prep.prepare import Prepared, base_state
from data_prep.tokens import Tokenizer, fetch
from finetune import distributed, evals, flops, reward_check
from finetune import preflight as checks
from finetune.arguments import Job
from finetune.callbacks import AdapterCheck, Metrics, Progress, Seal, TokenCounter, newest_complete
from finetune.completions import Completions
from finetune.coverage import frozen
from finetune.gpus import require_torch
from finetune.guards import Finite, Guarding
from finetune.guards import describe as describe_guards
from finetune.layout import Device, Layout, model_facts, plan_layout
from finetune.models import load_start
from finetune.policy import sample_of
from finetune.preempt import Preemption
from finetune.preference import wanted_of
from finetune.reference import Cache, model_key, reference_logps
from finetune.results import writing
from finetune.runs import is_main, say
from finetune.selection import Selection
from finetune.stats import Answer
from finetune.trainers import BUILDERS
from recipes.errors import DataError, RetortError
from recipes.lineage import (
    read_manifest,
    verify,
    write_atomic,
)
from recipes.refs import path_of
from recipes.schema import Recipe

MASKED_ROWS = 6  # rows whose masks the report shows


@dataclass
class Watch:
    """The callbacks whose findings outlive the training loop."""

    adapter: AdapterCheck
    metrics: Metrics
    progress: Progress
    guarding: Guarding
    finite: Finite
    selection: Selection | None
    checkpoint: Path | None
    preemption: Preemption


def show_data(prepared: Prepared) -> None:
    counts = prepared.counts
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items()) or "none"
    again = " (unchanged, reused)" if prepared.reused else ""
    share = f", {counts['trained_tokens'] / counts['train_tokens']:.0%} in the loss" if counts["trained_tokens"] else ""
    say(
        f"data{again}: {counts['train_rows']:,} training rows, {counts['eval_rows']:,} held out, dropped: {dropped}; "
        f"{counts['train_tokens']:,} tokens{share}"
    )


def write_layout(recipe: Recipe, device: Device, prepared: Prepared, folder: Path) -> Layout:
    """Choose the batch layout from the prepared rows, print it, and keep it in plan.json.

    A run that goes on keeps the layout it began with: with other batches it would not be the same run.

    Raises:
        RetortError: the run began on other devices.
    """
    path = folder / "plan.json"
    world = distributed.world()
    if newest_complete(folder / "checkpoints")[0] is not None and path.is_file():
        layout = Layout(**json.loads(path.read_text(encoding="utf-8")))
        if (layout.world_size, layout.device) != (world, device.kind):
            began, now = f"{layout.world_size} x {layout.device}", f"{world} x {device.kind}"
            raise RetortError(
                f"was begun on {began}, this is {now}", str(folder), "resume it there, or add --fresh to start over"
            )
        say(describe(layout, device))
        return layout
    counts = prepared.counts
    mean = counts["train_tokens"] / counts["train_rows"]
    facts = model_facts(fetch(recipe.model.ref, True))
    longest = counts["length"]["max"]
    layout = plan_layout(recipe, device, facts, counts["train_rows"], mean, longest, world, counts["packs"])
    if is_main():
        write_atomic(path, json.dumps(layout.as_dict(), indent=2) + "\n")
    say(describe(layout, device))
    return layout


def describe(layout: Layout, device: Device) -> str:
    """The layout in one line."""
    weights = "" if layout.quantization == "none" else f" on {layout.quantization}"
    checkpointing = ", gradient checkpointing" if layout.gradient_checkpointing else ""
    cut = f"{layout.micro_batch} x {layout.gradient_accumulation} accumulated x {layout.world_size} devices"
    return (
        f"layout: {device.name}, {layout.dtype}{weights}; {layout.steps} steps of {layout.rows_per_step} {layout.unit} "
        f"(about {layout.tokens_per_step:,} tokens): {cut}{checkpointing}"
    )


def write_masks(folder: Path, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Keep the masks of a few rows, as text pieces, for the report."""
    if not is_main():
        return
    shown = [
        {"_id": r["_id"], "pieces": pieces(Masked(r["input_ids"], r["loss_mask"], ""), tokenizer.backend)}
        for r in rows[:MASKED_ROWS]
    ]
    write_atomic(folder / "masks.json", json.dumps(shown, ensure_ascii=False, indent=1) + "\n")


def use_cores(device: Device) -> None:
    """Make sure of the card, now that torch can be asked itself. `accelerate launch` gives a lone process on a CPU one
    thread; take the cores that it may run on."""
    import torch

    if device.kind == "cuda":
        require_torch(device.name)
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and distributed.world() == 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.kind == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1" and cores > 1:
        torch.set_num_threads(cores)
        say(f"accelerate launch set one thread; using {cores} (--num_cpu_threads_per_process {cores} says so itself)")


def foresee(recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Refuse an adapter that leaves out what it should reach, too small a disk, rows that never end: before loading."""
    checks.before_loading(recipe, tokenizer, rows, folder)


def load(recipe: Recipe, tokenizer: Tokenizer, device: Device) -> Any:
    """Load the base with the seed set: what a model initialises itself is then the same each time."""
    from transformers import set_seed

    folder = fetch(recipe.model.ref, True)
    if read_manifest(folder) is not None and (wrong := verify(folder)):
        raise DataError(
            f"differs from its manifest: {', '.join(wrong[:4])}", str(folder), "get or make the model again"
        )
    set_seed(recipe.seed)
    say(f"loading {recipe.model.base}{f', as {recipe.model.run} made it' if recipe.model.run else ''}")
    return load_start(recipe, tokenizer, device)


def base_answers(
    recipe: Recipe, model: Any, tokenizer: Tokenizer, measured: list[dict[str, Any]], folder: Path
) -> list[Answer]:
    """Measure the base before anything can change it; an interrupted attempt's measurement is taken over."""
    if not measured or not is_main():
        return []
    path, key = folder / "base_answers.jsonl", evals.measurement_key(recipe, measured)
    answers = evals.load_answers(path, key)
    if answers is None:
        say(f"measuring the base on {len(measured)} held-out rows")
        answers = evals.measure(model, tokenizer, measured, recipe, "base")
        evals.save_answers(path, answers, key)
    return answers


def reference(
    recipe: Recipe, layout: Layout, tokenizer: Tokenizer, model: Any, rows: list[dict[str, Any]]
) -> list[float]:
    """Log-probabilities of the answers under the model as it starts, where the method compares with them."""
    wanted = wanted_of(recipe, layout, rows)
    if not wanted:
        return []
    cache = Cache(cache_folder(recipe.run_dir) / "reference.sqlite")
    key = model_key(recipe, layout, base_state(recipe))
    found, computed = reference_logps(model, tokenizer, wanted, key, cache, distributed.rank(), layout.world_size)
    say(f"reference log-probabilities: {len(found):,} answers, {computed:,} computed, the others from the cache")
    return found


def rewards(
    recipe: Recipe, layout: Layout, tokenizer: Tokenizer, model: Any, rows: list[dict[str, Any]], folder: Path
) -> Layout:
    """Show the rewards of the start, refuse a run that could learn nothing, and choose the engine of completions.

    A run that goes on keeps what the interrupted attempt found: with another engine it would not be the same run.
    """
    if recipe.method.type != "grpo":
        return layout
    path = folder / "rewards.json"
    with distributed.first(folder, "sampling the start"):
        found = reward_check.load_check(path)
        if found is None:
            say("sampling the base to see its rewards")
            found = reward_check.check_rewards(recipe, model, tokenizer, rows, str(layout.engine))
            reward_check.save_check(path, found)
    say(*reward_check.describe(found))
    reward_check.require_signal(found, str(path))
    return replace(layout, engine=found["engine"])


def build(
    recipe: Recipe,
    layout: Layout,
    tokenizer: Tokenizer,
    model: Any,
    rows: list[dict[str, Any]],
    watched: list[dict[str, Any]],
    folder: Path,
    tracker: Any,
    known: list[float],
) -> tuple[Any, Watch]:
    """The trainer of the recipe's method, with its callbacks.

    Args:
        watched: held-out rows that are measured while training.
        known: reference log-probabilities, from `reference`.
    """
    checkpoint, torn = newest_complete(folder / "checkpoints")
    for path in torn:
        say(f"{path} is not whole (the run was stopped while writing it) and is removed")
        if is_main():
            shutil.rmtree(path, ignore_errors=True)
    metrics = Metrics(folder / "metrics.jsonl", tracker)
    measuring = recipe.train.eval_every is not None and watched
    selection = Selection(recipe, tokenizer, watched, metrics, folder) if measuring else None
    guarding, finite = Guarding(recipe.train.guards, tracker), Finite(folder)
    say(*describe_guards(recipe.train.guards, recipe.method))
    copies = path_of(recipe.train.copy_checkpoints) if recipe.train.copy_checkpoints else None
    preemption = Preemption(folder, getattr(recipe.method, "iterations", 1))
    checked = AdapterCheck(folder / "adapter_check")
    watch = Watch(checked, metrics, Progress(metrics), guarding, finite, selection, checkpoint, preemption)
    seal = Seal(recipe.train.keep_checkpoints, copies)
    callbacks: list[Any] = [metrics, watch.progress, finite, watch.adapter, guarding, seal, preemption]
    if recipe.method.type == "grpo":
        kept = Completions(folder / "completions.jsonl", recipe.method.show_every, recipe.method.generations)
        callbacks.append(kept)
    if selection is not None:
        if is_main():
            selection.begin(model)
        callbacks.append(selection)
    job = Job(recipe, layout, tokenizer, model, rows, folder, callbacks, known)
    trainer = BUILDERS[recipe.method.key](job)
    if recipe.method.type == "grpo":
        kept.trainer = trainer
        kept.show = lambda i: sample_of(rows[i], [], tokenizer).prompt
    metrics.counter = TokenCounter(trainer.model, tokenizer.backend.pad_token_id, layout.world_size)
    lengths = flops.row_lengths(rows)
    metrics.utilisation = flops.Utilisation(trainer.model, lengths, layout.dtype, layout.world_size)
    if recipe.adapter is not None and recipe.adapter.init in {"pissa", "olora"}:
        _keep_initial_adapter(trainer, folder)
    return trainer, watch


def _keep_initial_adapter(trainer: Any, folder: Path) -> None:
    """These initialisations change the base's weights; the finished adapter is converted back against this copy."""
    if is_main():
        trainer.model.peft_config["default"].init_lora_weights = True
        trainer.model.save_pretrained(folder / "adapter_initial")


def preflight(
    recipe: Recipe,
    layout: Layout,
    tokenizer: Tokenizer,
    trainer: Any,
    rows: list[dict[str, Any]],
    measured: list[dict[str, Any]],
    prepared: Prepared,
    folder: Path,
) -> dict[str, Any]:
    """Check what can be checked before the first step; print it and keep it."""
    found = checks.check(recipe, layout, tokenizer, trainer, rows, measured, prepared.counts, folder)
    if is_main():
        write_atomic(folder / "preflight.json", json.dumps(found, indent=2) + "\n")
    trains = ", ".join(f"{c['type']} {c['adapted']}/{c['total']}" for c in found["coverage"] if c["adapted"])
    say(f"trains: {trains}", f"frozen: {frozen(found['coverage'])}")
    say(
        f"{found['trainable_parameters']:,} of {found['total_parameters']:,} parameters train; "
        f"{found['truncated_rows']} rows cut ({found['lost_tokens']} tokens lost)"
    )
    for item in found["special_tokens"]:
        say(f"{'ok' if item['ok'] else 'LOOK'}: {item['check']} ({item['detail']})")
    probe = found["probe"]
    if probe is None:
        say("longest batch: not tried; the weights are cut only when training begins")
        return found
    peak = probe["peak_memory_bytes"] / 2**30
    say(f"longest batch: {probe['train_tokens']:,} tokens in {probe['train_seconds']} s, peak {peak:.2f} GiB")
    if "eval_tokens" in probe:
        say(
            f"longest measurement: {probe['eval_rows']} held-out rows, {probe['eval_tokens']:,} tokens, and answers of "
            f"{probe['eval_answer_tokens']} in {probe['eval_seconds']} s"
        )
    return found


def fit(trainer: Any, watch: Watch, found: dict[str, Any], folder: Path) -> None:
    """Train, from the newest whole checkpoint where there is one."""
    if watch.checkpoint is not None:
        say(f"resuming from {watch.checkpoint.name}")
        if int(watch.checkpoint.name.rpartition("-")[2]) >= trainer.args.max_steps:
            # All steps are made, and the end is missing. Within an epoch transformers would make one more.
            trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    watch.preemption.listen()
    try:
        with writing(folder):
            trainer.train(resume_from_checkpoint=str(watch.checkpoint) if watch.checkpoint else None)
    finally:
        watch.preemption.ignore()
        watch.progress.close()
    watch.finite.require()
    watch.guarding.require(folder)
    watch.preemption.require(is_main())
    if watch.selection is not None:
        say(*watch.selection.conclude(trainer.model))
    if is_main() and watch.adapter.result is not None:
        write_atomic(
            folder / "preflight.json", json.dumps({**found, "adapter_check": watch.adapter.result}, indent=2) + "\n"
        )
