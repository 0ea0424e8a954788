"""What loading any model takes, be it the student's base or a teacher: 4-bit weights, and a vocabulary that fits."""

from __future__ import annotations

from typing import Any

import torch

from recipes.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def nf4(dtype: torch.dtype, double_quant: bool = True) -> Any:
    """4-bit NormalFloat weights, computed in `dtype` (Dettmers et al. 2023, sections 3 and 4)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def keep_quantised_weights(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a processor with AVX-512.

    At the first evaluation it rounds their scales to bfloat16 for good and demands sizes divisible by 32: the model
    that is trained would then not be the one that was measured (bitsandbytes 0.50, nn/modules.py, Linear4bit.forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_vocabulary(model: Any, backend: Any, name: str, place: str) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Args:
        name: of the model, for the message; `place`: the recipe key that names the tokenizer.

    Raises:
        RecipeError: they do not belong together.
    """
    rows = model.get_input_embeddings().num_embeddings
    highest = max(backend.get_vocab().values())
    if highest >= rows:
        remedy = "use the tokenizer that belongs to the model"
        raise RecipeError(f"the tokenizer has token {highest}, {name} only {rows} embeddings", place, remedy)
