"""The teacher's model in this process: loaded for reading, and what the engine has to know of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from data_prep.model_files import FIGURES, cached_of, context_of
from data_prep.tokens import fetch
from data_prep.weights import DTYPES, keep_quantised_weights, nf4, require_vocabulary
from recipes.errors import EngineError, MemoryFitError, RecipeError, out_of_memory
from recipes.refs import parse_ref
from recipes.schema_teacher import TransformersEngine

PLACE = "teacher.engine.transformers"
BOUNDLESS = 1 << 20  # context of models that state none


@dataclass(frozen=True)
class Facts:
    """What batching needs to know of a model.

    Attributes:
        context: tokens of prompt and answer that its positions are made for.
        cached: bytes that generation keeps of a token, the keys and values of all layers.
        passing: bytes of a prompt token while one layer works on it, about.
        vocabulary: rows of the output head.
        end_ids: tokens that end an answer.
        pad_id: fills up shorter rows.
    """

    context: int
    cached: int
    passing: int
    vocabulary: int
    end_ids: tuple[int, ...]
    pad_id: int


def find_device(wanted: str) -> torch.device:
    """The card where there is one (or the recipe pins it), else the processor.

    Raises:
        RecipeError: it is pinned to cuda and no card answers.
    """
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "cuda":
        raise RecipeError("no NVIDIA card answers", f"{PLACE}.device", "set it to auto, or look at nvidia-smi")
    return torch.device("cpu")


def load_model(model: str, options: TransformersEngine, tokenizer: Any) -> tuple[Any, Facts]:
    """Load a model for generation and scoring: weights from safetensors only, no code from its repository.

    Its own generation settings are taken off, but for the end tokens: what is drawn by is said by each request, and
    nothing else.

    Args:
        model: its reference, as teacher.model says.
        tokenizer: its transformers tokenizer.

    Raises:
        RecipeError: it cannot be fetched or loaded, or tokenizer and model do not belong together.
        MemoryFitError: it is too large for the device.
    """
    device = find_device(options.device)
    try:
        ref = parse_ref(model)
    except ValueError as error:
        raise RecipeError(str(error), "teacher.model", "a service has no weights: set teacher.engine to http") from None
    folder = fetch(ref, True, "teacher.model")
    named = options.dtype if options.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    if device.type == "cpu" and named == "float16":
        raise RecipeError("float16 runs on a GPU only", f"{PLACE}.dtype", "set it to bfloat16 or float32")
    dtype = DTYPES[named]
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if options.quantization == "nf4":
        how["quantization_config"] = nf4(dtype)
    if device.type == "cuda" or options.quantization == "nf4":
        how["device_map"] = {"": device}
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, **how)
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        if out_of_memory(error):
            remedy = "set quantization: nf4, or take the engine vllm with tensor_parallel"
            raise MemoryFitError(f"{model} does not fit on {device}", PLACE, remedy) from None
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{model} cannot be loaded: {reason}", "teacher.model") from None
    loaded.eval().requires_grad_(False)
    keep_quantised_weights(loaded)
    require_vocabulary(loaded, tokenizer, model, "teacher.tokenizer")
    facts = _facts(loaded, tokenizer)
    loaded.generation_config = GenerationConfig(eos_token_id=list(facts.end_ids), pad_token_id=facts.pad_id)
    return loaded, facts


def _facts(model: Any, tokenizer: Any) -> Facts:
    config = model.config.get_text_config()
    figures = {name: getattr(config, name, None) for name in FIGURES}
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    size = model.dtype.itemsize
    ends = _end_ids(model, tokenizer)
    if not ends:
        raise EngineError("the model has no end token", "teacher.model", "set eos_token in its tokenizer_config.json")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    context, cached = context_of(figures) or BOUNDLESS, cached_of(figures) * size
    return Facts(context, cached, (12 * hidden + 3 * inner) * size, int(config.vocab_size), ends, int(pad))


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end token, and those of the model's own settings, in that order."""
    found: dict[int, None] = {}
    generation = getattr(model, "generation_config", None)
    for value in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), model.config.eos_token_id):
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and token >= 0:
                found[int(token)] = None
    return tuple(found)


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken: most of what is free on a card, a quarter of a machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.8 * (free + own))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def release(device: torch.device) -> None:
    """Hand unused memory back to a card."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
