"""A start that already copies: an induction circuit written into the first two layers before training.

A small model on a small budget does not find copying by itself (measured: none after 2 million tokens), and copying
names, dates and sums is most of what extraction is. The circuit is the known one (Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits"): a head that attends to the previous token writes that token beside the current
one; a head of the next layer looks for places whose previous token is the current one and writes what stands there into
the output. Left to itself, early training tears the circuit down again (measured), so its weights are held while the
model reads; fine-tuning may change them.
"""

from __future__ import annotations

from typing import Any

import torch

PREVIOUS_SHARPNESS = 7.7  # bias of the previous-token heads; e^6 between the previous token and its neighbours
MATCH_SHARPNESS = 3.0  # scale of queries and keys of the matching heads
COPY_GAIN = 3.0  # what is copied outweighs the current token
OUTPUT_SCALE = 0.15  # final norm on the token codes, which are much larger than usual embeddings
FREE_SCALE = 0.05  # standard deviation of the trained part of the embeddings


@torch.no_grad()
def write_induction(model: Any) -> None:
    """Write the circuit into layers 0 and 1 of a fresh model with attention biases, and hold it.

    The first third of the dimensions holds a fixed random code of the current token, the second third that of the
    previous one; the last third is free. A third of the heads of layers 0 and 1 take part.
    """
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    third = config.hidden_size // 3
    code, before = slice(0, third), slice(third, 2 * third)
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)  # radians a token, per plane
    fast = (rates > 0.05).float()  # planes that tell one distance from another
    slow = torch.cat([rates < 0.01, rates < 0.01]).nonzero().flatten().tolist()  # planes that hardly turn within a row

    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, FREE_SCALE)
    embedding[:, code] = torch.randn(len(embedding), third)
    embedding[:, before] = 0
    model.model.norm.weight[code] = OUTPUT_SCALE
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    reserved = slice(0, 2 * third)  # layer 0 writes nothing else there
    first.o_proj.weight[reserved] = 0
    model.model.layers[0].mlp.down_proj.weight[reserved] = 0
    for start in range(0, third, width):
        head, shifted = slice(start, start + width), slice(third + start, third + start + width)
        first.q_proj.weight[head] *= 0.1
        first.k_proj.weight[head] *= 0.1
        # A key of (1, 0) in each plane and a query turned back by one token: the product is largest at distance one.
        first.k_proj.bias[head] = PREVIOUS_SHARPNESS * torch.cat([fast, 0 * fast])
        first.q_proj.bias[head] = PREVIOUS_SHARPNESS * torch.cat([fast * rates.cos(), -fast * rates.sin()])
        _move(first, head, source=head, target=shifted, gain=3**-0.5)
        for projection, offset in ((second.q_proj, 0), (second.k_proj, third)):
            projection.weight[head] = 0
            for i, plane in enumerate(slow):
                projection.weight[start + plane, offset + start + i] = MATCH_SHARPNESS
        _move(second, head, source=head, target=head, gain=COPY_GAIN)
    _hold(model, third)


def _move(attention: Any, head: slice, source: slice, target: slice, gain: float) -> None:
    """Make a head move the dimensions `source` of what it attends to into the dimensions `target`."""
    identity = torch.eye(head.stop - head.start)
    attention.v_proj.weight[head] = 0
    attention.v_proj.weight[head, source] = identity
    attention.o_proj.weight[:, head] = 0
    attention.o_proj.weight[target, head] = gain * identity


def _hold(model: Any, third: int) -> None:
    """Zero the gradients of the circuit and of what would write over it."""
    every, heads, reserved = slice(None), slice(third), slice(2 * third)
    held: list[tuple[Any, tuple[slice, ...]]] = [(model.model.embed_tokens.weight, (every, reserved))]
    held += [(model.model.layers[0].mlp.down_proj.weight, (reserved,))]
    held += [(model.model.layers[0].self_attn.o_proj.weight, (reserved,))]
    for layer in model.model.layers[:2]:
        held += [(layer.input_layernorm.weight, (reserved,)), (layer.self_attn.o_proj.weight, (every, heads))]
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            held += [(projection.weight, (heads,)), (projection.bias, (heads,))]
    for parameter, part in held:
        free = torch.ones_like(parameter)
        free[part] = 0
        parameter.register_hook(lambda gradient, free=free: gradient * free)
