"""What a model's files say of it, without its weights: the headers of the tensors, and figures of its configuration."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What is read of a configuration below; a configuration object of transformers may have them under other names too.
FIGURES = (
    "max_position_embeddings", "rope_scaling", "rope_parameters", "num_attention_heads", "head_dim", "hidden_size",
    "num_hidden_layers", "num_key_value_heads",
)  # fmt: skip


def tensors_of(path: Path) -> dict[str, dict[str, Any]]:
    """`dtype` and `shape` of the tensors of a safetensors file, from its header (an 8-byte length, then JSON).

    Raises:
        OSError, ValueError, struct.error: it cannot be read, or is none.
    """
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > 100_000_000:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(stream.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def context_of(config: Mapping[str, Any]) -> int | None:
    """Positions of the model. YaRN and its like often state the unscaled number with a factor (Qwen2.5, for one)."""
    positions = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if positions and scaling.get("original_max_position_embeddings", positions) == positions:
        positions = positions * float(scaling.get("factor") or 1)
    return int(positions) if positions else None


def cached_of(config: Mapping[str, Any]) -> int:
    """Numbers that generation keeps of a token: the keys and values of all layers."""
    heads = int(config.get("num_attention_heads") or 1)
    of_each = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return 2 * int(config["num_hidden_layers"]) * int(config.get("num_key_value_heads") or heads) * of_each
