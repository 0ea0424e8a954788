"""Base model, quantisation and adapter, from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_prep.tokens import Tokenizer, fetch
from data_prep.weights import DTYPES, keep_quantised_weights, nf4, require_vocabulary
from finetune import distributed
from finetune.layout import Device, compute_dtype
from recipes.errors import DataError, RecipeError
from recipes.lineage import verify
from recipes.load import load_recipe
from recipes.refs import path_of
from recipes.schema import Recipe


def load_start(recipe: Recipe, tokenizer: Tokenizer, device: Device) -> Any:
    """The model as training begins: the base, or what an earlier run made of it (model.run).

    The adapter of an earlier run goes on itself, or is merged into the weights beneath a new one (model.merge).

    Raises:
        RecipeError, DataError: see `load_base`; the earlier run's weights are gone or differ from its manifest.
    """
    under = _under(recipe, tokenizer, device)
    if recipe.model.run is None or recipe.model.merge:
        return under
    adapter = path_of(recipe.model.run) / "adapter"
    return _with_adapter(under, adapter, trained=True) if adapter.is_dir() else under


def _under(recipe: Recipe, tokenizer: Tokenizer, device: Device) -> Any:
    """The model that the recipe's adapter sits on."""
    if recipe.model.run is None:
        return load_base(recipe, tokenizer, device)
    run = path_of(recipe.model.run)
    if wrong := verify(run):
        raise DataError(f"was changed after it was finished: {', '.join(wrong[:4])}", str(run), "train it again")
    if (run / "model").is_dir():  # all weights were trained
        return load_base(recipe, tokenizer, device, run / "model")
    earlier = load_recipe(run / "recipe.yaml")
    under = _under(earlier, tokenizer, device)
    if not recipe.model.merge:
        return under
    if earlier.model.quantization != "none":  # what the adapter was trained on: the rounded weights, not the base's own
        under = under.dequantize().to(DTYPES[compute_dtype(recipe, device)])
    merged = _with_adapter(under, run / "adapter").merge_and_unload()
    merged.config.use_cache = False
    return merged


def _with_adapter(under: Any, folder: Path, trained: bool = False) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(under, folder, is_trainable=trained)


def load_base(recipe: Recipe, tokenizer: Tokenizer, device: Device, folder: Path | None = None) -> Any:
    """Load the base model that a recipe names, quantised where it asks, on the run's device.

    Args:
        folder: weights to load instead of the base's own.

    Weights are read from safetensors only. The vocabulary of the tokenizer must fit the embeddings.

    Raises:
        RecipeError: it cannot be fetched or loaded, or model and tokenizer do not belong together.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if recipe.method.type == "reward":
        logging.set_verbosity(50)  # it reports at length that the score head is new, which it must be
    folder = folder or fetch(recipe.model.ref, True)
    dtype = DTYPES[compute_dtype(recipe, device)]
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if recipe.model.attention != "auto":
        options["attn_implementation"] = recipe.model.attention
    if recipe.method.type == "reward":
        options |= {"num_labels": 1, "pad_token_id": tokenizer.backend.pad_token_id}
    if recipe.model.quantization == "nf4":
        options["quantization_config"] = nf4(dtype, recipe.model.double_quant)
    quantised = recipe.model.quantization != "none"
    if device.kind == "cuda" and (quantised or distributed.shards(device.kind) == 1):
        options["device_map"] = {"": torch.cuda.current_device()}  # weights that will be cut wait on the processor
    elif recipe.model.quantization == "nf4":
        options["device_map"] = {"": "cpu"}
    code = recipe.model.trust_remote_code is not None
    try:
        with distributed.loading(whole="preference" in recipe.method.kinds):
            model = model_class(recipe).from_pretrained(folder, trust_remote_code=code, **options)
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{recipe.model.base} cannot be loaded: {reason}", "model.base") from None
    keep_quantised_weights(model)
    place = "model.tokenizer" if recipe.model.tokenizer else "model.base"
    require_vocabulary(model, tokenizer.backend, "the model", place)
    model.config.use_cache = False
    return model


def model_class(recipe: Recipe) -> Any:
    """The class of transformers that loads the recipe's model: a reward model scores, all others predict tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if recipe.method.type == "reward" else AutoModelForCausalLM


def adapter_config(recipe: Recipe) -> Any:
    """The peft configuration of a recipe's adapter. A reward model's score head is trained and saved with it."""
    from peft import LoraConfig

    adapter = recipe.adapter
    assert adapter is not None
    return LoraConfig(
        task_type="SEQ_CLS" if recipe.method.type == "reward" else "CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha if adapter.alpha is not None else 2 * adapter.r,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        target_parameters=list(adapter.target_parameters) or None,
        modules_to_save=list(adapter.modules_to_save) or None,
        use_dora=adapter.dora,
        use_rslora=adapter.rslora,
        init_lora_weights=True if adapter.init == "default" else adapter.init,
        bias="none",
    )
