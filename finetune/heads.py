"""The output head of a transformers model taken apart from what comes before it, so that the logits of all positions,
which would fill the memory (a row of 2,400 tokens at a vocabulary of 150,000: 1.4 GiB), never stand there at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune import distributed
from finetune.losses import Head

LOOK = 64  # tokens on which the head is compared with the model itself
ALLOWED = {True: 1e-4, False: 2e-2}  # by how much its logits may differ, as a share of the largest: float32, or less


def base_of(model: Any) -> Any:
    """The transformers model inside an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def head_layer(model: Any) -> Any:
    """The output layer of a transformers model, the copy that is trained where the adapter has one.

    Low-rank weights on it would not be seen here; TRL refuses them when the trainer is made.
    """
    from peft.utils import ModulesToSaveWrapper

    layer = model.get_output_embeddings()
    return layer.modules_to_save[layer.active_adapters[0]] if isinstance(layer, ModulesToSaveWrapper) else layer


def head_of(model: Any) -> Head:
    """The last step of a transformers model, from hidden states to logits, as its config describes it."""
    layer, config = head_layer(model), model.config.get_text_config()
    scale = next(
        (v for n in ("logit_scale", "output_multiplier", "lm_head_multiplier") if (v := getattr(config, n, None))), 1.0
    )
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides by it, HyperCLOVA X multiplies
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    weight, bias = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in (layer.weight, layer.bias))
    return Head(weight, bias, float(scale), getattr(config, "final_logit_softcapping", None))


def is_reached(base: Any, head: Head) -> bool:
    """Whether hidden states can be had without logits, and the head is plain numbers."""
    return head.weight.is_floating_point() and base.base_model is not base


def hidden_states(base: Any, **batch: Any) -> torch.Tensor:
    """What the head is given, (batch, seq, d)."""
    found: torch.Tensor = base.base_model(**batch, use_cache=False).last_hidden_state
    return found


def head_gap(model: Any, head: Head, ids: Sequence[int]) -> float:
    """How far the logits that `head` makes of hidden states are from the model's own, as a share of the largest."""
    base = base_of(model)
    batch = torch.tensor([list(ids)], device=base.device)
    expected = model(input_ids=batch, use_cache=False).logits[0].float()
    ours = head.logits(hidden_states(base, input_ids=batch)[0].to(head.weight)).float().to(expected.device)
    if ours.shape != expected.shape:
        return float("inf")
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def separable_head(model: Any, ids: Sequence[int]) -> Head | None:
    """The head of a model whose logits it is found to make of the hidden states of some tokens; None for any other
    model, and for one whose weights are cut."""
    base = base_of(model)
    if distributed.is_cut(model) or not hasattr(base, "base_model") or base.get_output_embeddings() is None:
        return None
    head = head_of(base)
    known = is_reached(base, head) and head_gap(model, head, ids[:LOOK]) < ALLOWED[head.weight.dtype == torch.float32]
    return head if known else None
