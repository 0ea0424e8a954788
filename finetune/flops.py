"""Model FLOPs utilisation: which share of a card's arithmetic went into the work that the method asks for.

A token costs one multiplication and one addition, 2 FLOPs, per weight that it passes through. Training a weight takes
three such passes: the forward (2), the gradient of the activations (2) and the gradient of the weight itself (2): 6 in
all. A frozen weight needs no gradient of its own, so it costs 4: with an adapter on a frozen base the familiar "6N"
overstates the work by half.

Attention multiplies activations with activations, frozen weights or not. Per layer, token and position looked at it
takes 2 x width for the scores and 2 x width for the mix, and twice as much again in the backward: 12 x width.

What is recomputed (gradient checkpointing) is work that the method did not ask for, and is left out: the figure is
model FLOPs, not hardware FLOPs (Chowdhery et al. 2022, PaLM, appendix B, https://arxiv.org/abs/2204.02311; unlike
there, a causal mask's unseen half is not counted). The first layer's gradient of its own input is counted though
nobody needs it: one layer's third at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_HALF = {"bfloat16", "float16"}
# Dense (no sparsity) peak of 16-bit matrix products with 32-bit sums, in FLOP/s, by the name that the driver gives.
# From NVIDIA's data sheets and architecture papers: where a sheet states the figure with sparsity, half of it.
# A laptop's, a MIG slice's or an unknown card's peak is not guessed.
PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"B200", 2250e12, "HGX B200 data sheet: 36 PFLOPS of 8 cards with sparsity"),
    (r"H200 NVL", 835.5e12, "H200 data sheet: 1,671 TFLOPS with sparsity"),
    (r"H200", 989.5e12, "H200 data sheet: 1,979 TFLOPS with sparsity"),
    (r"H100 NVL", 835.5e12, "H100 data sheet: 1,671 TFLOPS with sparsity"),
    (r"H100 PCIe", 756.5e12, "H100 PCIe product brief: 1,513 TFLOPS with sparsity"),
    (r"H100 80GB HBM3|H100 SXM5?.*", 989.5e12, "H100 data sheet: 1,979 TFLOPS with sparsity"),
    (r"A100[ -](?:SXM4|PCIE|PCIe|80GB PCIe).*", 312e12, "A100 data sheet"),
    (r"A30", 165e12, "A30 data sheet"),
    (r"A40", 149.7e12, "A40 data sheet"),
    (r"A10", 125e12, "A10 data sheet"),
    (r"L40S", 362.05e12, "L40S data sheet"),
    (r"L40", 181.05e12, "L40 data sheet"),
    (r"L4", 121e12, "L4 data sheet: 242 TFLOPS with sparsity"),
    (r"RTX A6000", 154.8e12, "GA102 architecture paper, appendix"),
    (r"RTX 6000 Ada Generation", 364.2e12, "RTX 6000 Ada data sheet: 1,457 TFLOPS FP8 with sparsity, a quarter"),
    (r"GeForce RTX 3090", 71e12, "GA102 architecture paper, table of the RTX 3090"),
    (r"GeForce RTX 4090", 165.2e12, "Ada architecture paper, table of the RTX 4090"),
    (r"GeForce RTX 5090", 209.5e12, "RTX Blackwell architecture paper, table of the RTX 5090"),
)
_FLOAT16_ONLY: tuple[tuple[str, float, str], ...] = (
    (r"V100-SXM2.*", 125e12, "V100 data sheet"),
    (r"V100-PCIE.*", 112e12, "V100 data sheet"),
    (r"T4", 65e12, "T4 data sheet"),
)


@dataclass(frozen=True)
class Work:
    """What one token passes through.

    Attributes:
        frozen: weights that take part in matrix products and do not train.
        trained: those that train. A table that is only looked up (the input embedding) is in neither.
        layers, width: attention layers, and their heads x head size.
    """

    frozen: int
    trained: int
    layers: int
    width: int


def training_flops(work: Work, context: float) -> float:
    """FLOPs that training takes per token.

    Args:
        context: positions that a token looks at, on average; see `mean_context`.
    """
    return 4.0 * work.frozen + 6.0 * work.trained + 12.0 * work.layers * work.width * context


def mean_context(lengths: Iterable[int]) -> float:
    """Positions that a token looks at under a causal mask, on average over the tokens of sequences of these lengths."""
    seen = tokens = 0
    for length in lengths:
        seen += length * (length + 1) // 2
        tokens += length
    return seen / tokens if tokens else 0.0


def work_of(model: Any) -> Work | None:
    """What a token passes through in a transformers model (with an adapter or without); None where that is not known.

    Of a mixture of experts each token passes through its own few: the others' share is left out.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return None
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if experts and not chosen:
        return None
    looked_up = _looked_up(model)
    frozen = trained = 0.0
    for name, parameter in model.named_parameters():
        # The copy that peft keeps of a module which trains as a whole is never called.
        if id(parameter) in looked_up or parameter.ndim < 2 or ".original_module." in name:
            continue
        size = float(_elements(parameter))
        if experts and chosen and ".experts." in name:
            size *= chosen / experts
        if parameter.requires_grad:
            trained += size
        else:
            frozen += size
    return Work(round(frozen), round(trained), layers, width)


def _looked_up(model: Any) -> set[int]:
    """The input embedding, unless the output head multiplies with the very same numbers."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    head = model.get_output_embeddings()
    return set() if table is None or (head is not None and head.weight is table) else {id(table)}


def _elements(parameter: Any) -> int:
    """Weights in a parameter; bitsandbytes packs two of four bits into each byte it stores."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return int(parameter.numel())
    count = 1
    for side in state.shape:
        count *= int(side)
    return count


def peak_flops(name: str, dtype: str) -> float | None:
    """Peak FLOP/s of one card for matrix products of a dtype; None where it is not known (a processor, for one).

    Args:
        name: as torch.cuda.get_device_name and nvidia-smi say it.
        dtype: `bfloat16` or `float16`. float32 is None: which units multiply it depends on settings.
    """
    if dtype not in _HALF:
        return None
    bare = re.sub(r"^(NVIDIA|Tesla)\s+", "", name.strip())
    for pattern, peak, _ in (*PEAKS, *(_FLOAT16_ONLY if dtype == "float16" else ())):
        if re.fullmatch(pattern, bare) and "MIG" not in bare:
            return peak
    return None


def device_name() -> str:
    """The name of this process's card; empty without one."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


def row_lengths(rows: Iterable[dict[str, Any]]) -> Iterator[int]:
    """Tokens of the sequences that prepared rows make: one, or of a pair both answers with their prompt."""
    for row in rows:
        for part in ("input_ids", "rejected_ids"):
            if row.get(part):
                yield len(row[part])


def utilisation(tokens_per_second: float, flops_per_token: float, peak: float | None, devices: int = 1) -> float | None:
    """Model FLOPs utilisation: 0 to 1; None without a peak.

    Args:
        tokens_per_second: of all devices together.
        peak: of one device, FLOP/s.
    """
    return tokens_per_second * flops_per_token / (peak * devices) if peak else None


class Utilisation:
    """What turns a throughput into a utilisation, settled once per run: call it with tokens per second.

    Args:
        lengths: tokens of the training sequences.
        dtype: what the matrix products compute in.
        devices: cards that work together.
        device: the name of one; by default of this process's.
    """

    def __init__(
        self, model: Any, lengths: Iterable[int], dtype: str, devices: int = 1, device: str | None = None
    ) -> None:
        self.peak, self.devices = peak_flops(device_name() if device is None else device, dtype), devices
        work = work_of(model)
        self.flops_per_token = None if work is None else training_flops(work, mean_context(lengths))

    def __call__(self, tokens_per_second: float) -> float | None:
        if self.flops_per_token is None:
            return None
        return utilisation(tokens_per_second, self.flops_per_token, self.peak, self.devices)
