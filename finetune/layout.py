"""The batch layout: from what the user asks (tokens per step, longest row) to micro-batch, accumulation and steps.

No torch here: `retort plan` must answer at once. The memory figures are plain estimates, kept on the safe side; the run
itself then proves them on the longest batch before the first step.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.model_files import cached_of, context_of, tensors_of
from finetune import distributed
from finetune.gpus import first_card, require_torch
from recipes.errors import MemoryFitError, RecipeError
from recipes.refs import parse_ref
from recipes.schema import Recipe
from recipes.schema_method import GRPO, DistillOnPolicy

CPU_FORWARD_TOKENS = 8192  # more in one forward only spills the processor's caches
MEMORY_SHARE = 0.85  # of the device; the rest is for the allocator, kernels and other processes
STEP_TOLERANCE = 0.2  # of train.tokens_per_step, for whole rows of which every device takes as many: two always go


@dataclass(frozen=True)
class Device:
    """Where a run computes: `cpu` or `cuda`, and the memory of one device in bytes."""

    kind: str
    memory_bytes: int
    name: str


@dataclass(frozen=True)
class ModelFacts:
    """What the memory estimate needs to know of a base model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int | None = None  # longest sequence that the positions are made for
    cached: int = 0  # numbers that generation keeps of a token: keys and values of all layers


@dataclass(frozen=True)
class Layout:
    """How one optimiser step is cut into forwards. Rows are packed sequences where `packing` is on."""

    device: str
    world_size: int
    seq_len: int
    packing: bool
    micro_batch: int
    gradient_accumulation: int
    rows_per_step: int
    tokens_per_step: int
    steps: int
    epochs: float
    gradient_checkpointing: bool
    dtype: str
    quantization: str
    estimated_bytes: int | None
    unit: str = "rows"  # what `rows_per_step` counts: packs, pairs, completions
    engine: str | None = None  # of GRPO: who writes the completions, measured where the recipe says auto

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_device(wanted: str) -> Device:
    """The device of a run: an NVIDIA card where one answers (or the recipe pins it), else the processor.

    CUDA_VISIBLE_DEVICES hides cards, as it does from torch. Where torch is loaded already it is asked itself.

    Raises:
        RecipeError: train.device is cuda and no card answers; a card answers, and torch cannot use it.
    """
    card = first_card() if wanted != "cpu" else None
    if card is not None:
        require_torch(card.name)
        return Device("cuda", card.memory_bytes, card.name)
    if wanted == "cuda":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = f" (CUDA_VISIBLE_DEVICES is '{hidden}')" if hidden is not None else ""
        raise RecipeError(f"no NVIDIA card answers{reason}", "train.device", "set it to auto, or look at nvidia-smi")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory, f"{os.cpu_count()} processor cores")


def compute_dtype(recipe: Recipe, device: Device) -> str:
    """`auto` is bfloat16 on a card (every one since 2020 computes in it), float32 on a processor."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bfloat16" if device.kind == "cuda" else "float32"


def model_facts(folder: Path) -> ModelFacts:
    """Read a model folder's configuration and the headers of its weight files; loads no weights.

    Raises:
        RecipeError: the files are not what they should be.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        parameters = sum(map(_elements, sorted(folder.glob("*.safetensors"))))
        facts = ModelFacts(
            parameters,
            layers,
            hidden,
            int(config.get("intermediate_size") or 4 * hidden),
            int(config["vocab_size"]),
            context_of(config),
            cached_of(config),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise RecipeError(f"{folder} is no readable model folder ({reason})", "model.base") from None
    return facts


def _elements(path: Path) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in tensors_of(path).values())


def refuse_impossible(recipe: Recipe, device: Device, facts: ModelFacts | None) -> None:
    """Refuse what model and device cannot do, whatever the rows are.

    Raises:
        RecipeError: rows may be longer than the model's context; a dtype that the device cannot train in.
    """
    if facts is not None and facts.context is not None and recipe.train.seq_len > facts.context:
        unset = " (the default)" if "seq_len" not in recipe.train.model_fields_set else ""
        raise RecipeError(
            f"{recipe.train.seq_len} tokens{unset} are more than the context of {recipe.model.base} ({facts.context})",
            "train.seq_len",
            f"set it to at most {facts.context} (train: {{seq_len: {facts.context}}})",
        )
    if device.kind == "cpu" and recipe.model.dtype == "float16":
        raise RecipeError("float16 trains on a GPU only", "model.dtype", "set it to bfloat16 or float32")


def plan_layout(
    recipe: Recipe,
    device: Device,
    facts: ModelFacts | None,
    rows: int,
    mean_tokens: float,
    longest: int,
    world_size: int,
    packs: int | None = None,
) -> Layout:
    """Choose micro-batch, accumulation and checkpointing.

    Args:
        facts: None where the base is not on this machine yet; then memory does not limit the layout.
        rows: training rows; `mean_tokens` and `longest` are their mean and greatest length in tokens.
        packs: packed sequences that the rows make; estimated where None.

    Raises:
        RecipeError: see `refuse_impossible`; so many devices cannot share out a step of train.tokens_per_step.
        MemoryFitError: not even one row fits with gradient checkpointing.
    """
    train = recipe.train
    refuse_impossible(recipe, device, facts)
    if isinstance(recipe.method, GRPO | DistillOnPolicy):
        return _plan_groups(recipe, recipe.method, device, facts, rows, longest, world_size)
    width = train.seq_len if train.packing else longest
    unit = "packs" if train.packing else "rows"
    if recipe.method.kinds == ("preference",):
        width, unit = 2 * width, "pairs"  # both answers are read together
    per_row = mean_tokens
    if train.packing:
        tokens = rows * mean_tokens
        rows = packs or max(1, math.ceil(tokens / (train.seq_len * 0.97)))  # best-fit packing fills about 97 %
        per_row = tokens / rows
    wanted = train.tokens_per_step / per_row
    per_device = max(1, round(wanted / world_size))
    if world_size > 1 and rows >= wanted:
        _require_step(per_device, world_size, wanted, per_row, unit)
    per_device = min(per_device, max(1, math.ceil(rows / world_size)))
    room, checkpointing = _forward_tokens(recipe, device, facts, wanted=per_device * width)
    micro, accumulation = _forwards(train.micro_batch, per_device, room // width)
    steps, epochs = _steps(recipe, math.ceil(rows / (micro * world_size)), accumulation)
    per_step = micro * accumulation * world_size
    return Layout(
        device=device.kind,
        world_size=world_size,
        seq_len=train.seq_len,
        packing=train.packing,
        micro_batch=micro,
        gradient_accumulation=accumulation,
        rows_per_step=per_step,
        tokens_per_step=round(per_step * per_row),
        steps=steps,
        epochs=epochs,
        gradient_checkpointing=checkpointing,
        dtype=compute_dtype(recipe, device),
        quantization=recipe.model.quantization,
        estimated_bytes=_estimate(recipe, device, facts, micro * width, checkpointing),
        unit=unit,
    )


def _plan_groups(
    recipe: Recipe,
    method: GRPO | DistillOnPolicy,
    device: Device,
    facts: ModelFacts | None,
    prompts: int,
    longest: int,
    world_size: int,
) -> Layout:
    """The layout of a method whose model answers while it trains: all completions of a step, cut into equal forwards.

    Raises:
        RecipeError: the completions of a step cannot be shared out evenly.
    """
    train = recipe.train
    generations, iterations, engine = 1, 1, "plain" if method.vllm is None else "vllm"
    if isinstance(method, GRPO):
        generations, iterations, engine = method.generations, method.iterations, method.engine
    completions = method.prompts_per_step * generations
    if completions % world_size:
        raise RecipeError(
            f"{completions} completions in a step cannot be shared by {world_size} devices",
            "method.prompts_per_step",
            f"make prompts_per_step{' x generations' if generations > 1 else ''} a multiple of {world_size}",
        )
    per_device = completions // world_size
    width = longest + method.max_new_tokens
    room, checkpointing = _forward_tokens(recipe, device, facts, wanted=per_device * width)
    if train.micro_batch is not None and per_device % train.micro_batch:
        raise RecipeError(f"does not divide the {per_device} completions of a step on a device", "train.micro_batch")
    if facts is not None and engine != "vllm":
        _require_cache(recipe, device, facts, per_device * width)
    most = train.micro_batch or max(1, room // width)
    micro = next(n for n in range(min(most, per_device), 0, -1) if per_device % n == 0)
    epochs = train.epochs if train.epochs is not None else 1.0
    steps = train.max_steps or max(1, math.ceil(prompts * epochs / method.prompts_per_step)) * iterations
    steps = -(-steps // iterations) * iterations
    return Layout(
        device=device.kind,
        world_size=world_size,
        seq_len=train.seq_len,
        packing=False,
        micro_batch=micro,
        gradient_accumulation=per_device // micro,
        rows_per_step=completions,
        tokens_per_step=completions * width,
        steps=steps,
        epochs=steps // iterations * method.prompts_per_step / prompts,
        gradient_checkpointing=checkpointing,
        dtype=compute_dtype(recipe, device),
        quantization=recipe.model.quantization,
        estimated_bytes=_estimate(recipe, device, facts, micro * width, checkpointing),
        unit="completions",
        engine=engine,
    )


def _require_cache(recipe: Recipe, device: Device, facts: ModelFacts, tokens: int) -> None:
    """Refuse a step whose completions, all written at once, do not fit beside the weights."""
    width = 4 if compute_dtype(recipe, device) == "float32" else 2
    need = fixed_bytes(recipe, device, facts) + tokens * facts.cached * width
    if need > device.memory_bytes * MEMORY_SHARE:
        have = device.memory_bytes / 2**30
        raise MemoryFitError(
            f"writing a step's completions needs about {need / 2**30:.1f} GiB, {device.name} has {have:.1f}",
            "method.prompts_per_step",
            "lower prompts_per_step, generations or max_new_tokens",
        )


def _require_step(per_device: int, devices: int, wanted: float, per_row: float, unit: str) -> None:
    """Refuse devices that cannot share out a step, of `wanted` rows: one of another size is another training."""
    if abs(per_device * devices - wanted) <= STEP_TOLERANCE * wanted:
        return
    misses = {n: abs(max(1, round(wanted / n)) * n - wanted) for n in range(1, devices)}
    fewer = max(n for n in misses if n == 1 or misses[n] <= STEP_TOLERANCE * wanted)
    larger = math.ceil(math.ceil(wanted / devices) * devices * per_row)
    raise RecipeError(
        f"{devices} devices cannot share out a step of {wanted:.1f} {unit} (about {per_row:,.0f} tokens each): with "
        f"{per_device} on each it would be of {per_device * devices * per_row:,.0f} tokens",
        "train.tokens_per_step",
        f"start {fewer} device{'s' if fewer > 1 else ''}, or raise it to {larger}",
    )


def _forwards(pinned: int | None, rows: int, room: int) -> tuple[int, int]:
    """Micro-batch and accumulation for `rows` of a device's step; at most `room` rows fit into a forward.

    train.micro_batch (`pinned`) is kept where the share of a device is at least as large; else the forwards become
    smaller, and the step stays.
    """
    if pinned is None:
        return _cut(rows, max(1, min(rows, room)))
    return (pinned, round(rows / pinned)) if pinned <= rows else (rows, 1)


def _cut(rows: int, most: int) -> tuple[int, int]:
    """Micro-batch (at most `most`) and accumulation that make `rows` of a device's step: the largest micro-batch that
    comes within 3 % of them, so that a step is the same on any number of devices."""
    cuts = [(micro, max(1, round(rows / micro))) for micro in range(most, 0, -1)]
    return next(cut for cut in cuts if abs(cut[0] * cut[1] - rows) <= 0.03 * rows)


def _steps(recipe: Recipe, batches: int, accumulation: int) -> tuple[int, float]:
    """Optimiser steps and epochs, counted as transformers' Trainer counts them."""
    per_epoch = max(1, math.ceil(batches / accumulation))
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps, recipe.train.max_steps / per_epoch
    epochs = recipe.train.epochs if recipe.train.epochs is not None else 1.0
    return max(1, math.ceil(per_epoch * epochs)), epochs


def _forward_tokens(recipe: Recipe, device: Device, facts: ModelFacts | None, wanted: int) -> tuple[int, bool]:
    """Tokens that fit into one forward, and whether gradient checkpointing is needed for it."""
    pinned = recipe.train.gradient_checkpointing
    cap = CPU_FORWARD_TOKENS if device.kind == "cpu" else 1 << 30
    if facts is None:
        return cap, pinned is True
    free = device.memory_bytes * MEMORY_SHARE - fixed_bytes(recipe, device, facts)
    fits = {c: int(max(0, free) // per_token(recipe, device, facts, c)) for c in (False, True)}
    checkpointing = pinned if pinned != "auto" else fits[False] < min(wanted, 4096)
    shortest = min(recipe.train.seq_len, wanted)
    if recipe.train.micro_batch is None and fits[bool(checkpointing)] < shortest and fits[True] < shortest:
        need = (fixed_bytes(recipe, device, facts) + shortest * per_token(recipe, device, facts, True)) / 2**30
        remedy = "shorten train.seq_len" if recipe.model.quantization == "nf4" else "set model.quantization: nf4"
        have = device.memory_bytes / 2**30
        raise MemoryFitError(f"one row needs about {need:.1f} GiB, {device.name} has {have:.1f}", "train", remedy)
    return max(1, min(cap, fits[bool(checkpointing)])), bool(checkpointing)


def _estimate(recipe: Recipe, device: Device, facts: ModelFacts | None, tokens: int, checkpointing: bool) -> int | None:
    """Bytes of training with so many padded tokens in a forward; None where the base is not known."""
    if facts is None:
        return None
    return fixed_bytes(recipe, device, facts) + tokens * per_token(recipe, device, facts, checkpointing)


def fixed_bytes(recipe: Recipe, device: Device, facts: ModelFacts, cut: int | None = None) -> int:
    """Weights, gradients and optimiser states that a device holds, in bytes.

    Args:
        cut: into how many parts; what the launch file says where None.
    """
    parts = cut if cut is not None else distributed.shards(device.kind)
    if parts == 1:
        return _whole_bytes(recipe, device, facts)
    # While a layer computes it is whole, and the next is on its way; embeddings and head are whole in turn.
    width = 4 if compute_dtype(recipe, device) == "float32" else 2
    gathered = width * (2 * facts.vocabulary * facts.hidden + 2 * facts.parameters // facts.layers)
    held = 0 if cut is None and distributed.offloads() else _whole_bytes(recipe, device, facts) // parts
    return held + gathered


def _whole_bytes(recipe: Recipe, device: Device, facts: ModelFacts) -> int:
    """As `fixed_bytes`, of a device that holds all."""
    width = 4 if compute_dtype(recipe, device) == "float32" else 2
    embeddings = 2 * facts.vocabulary * facts.hidden
    if recipe.model.quantization == "nf4":
        # 4 bits a weight and about half a bit of constants; embeddings and head stay as they are.
        weights = round(0.57 * max(0, facts.parameters - embeddings)) + width * embeddings
    else:
        weights = width * facts.parameters
    trained = facts.parameters
    if recipe.adapter is not None:
        trained = facts.layers * recipe.adapter.r * (8 * facts.hidden + 3 * (facts.hidden + facts.intermediate))
    return weights + trained * (4 + 4 + 8) + _teacher_bytes(recipe, width)


def _teacher_bytes(recipe: Recipe, width: int) -> int:
    """Weights of a teacher that is at work beside the student; 0 where its files are not on this machine yet."""
    if not isinstance(recipe.method, DistillOnPolicy) or recipe.teacher is None:
        return 0
    folder = parse_ref(recipe.teacher.model).path
    if folder is None or not folder.is_dir():
        return 0
    facts = model_facts(folder)
    return round((0.57 if recipe.teacher.engine.options.quantization == "nf4" else width) * facts.parameters)


def per_token(recipe: Recipe, device: Device, facts: ModelFacts, checkpointing: bool) -> int:
    """Activation bytes of one token: a layer keeps about 18 hidden-sized and 4 MLP-sized tensors for the backward."""
    width = 4 if compute_dtype(recipe, device) == "float32" else 2
    layer = width * (18 * facts.hidden + 4 * facts.intermediate)
    kept = layer + facts.layers * width * facts.hidden if checkpointing else facts.layers * layer
    return round(1.25 * kept)
