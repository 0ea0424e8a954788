"""Which file of recipes/accelerate/ suits a recipe on several devices, and what a launch made of it. No torch here."""

from __future__ import annotations

from finetune import distributed
from finetune.layout import MEMORY_SHARE, Device, ModelFacts, fixed_bytes, per_token
from recipes.schema import Recipe


def suggested(recipe: Recipe, device: Device, world: int, facts: ModelFacts) -> tuple[str, str]:
    """The file of recipes/accelerate/ that suits a recipe on so many devices, and why, in words.

    Whole copies (DDP) exchange least, so they are taken where they fit; else the weights are cut, and last they wait in
    the memory of the node. ZeRO-3 is never suggested: it does the same as FSDP2 with one more dependency.
    """
    if device.kind != "cuda" or world == 1:
        return "ddp", "each process holds all"
    row = recipe.train.seq_len * (2 if recipe.method.kinds == ("preference",) else 1)
    working, have = row * per_token(recipe, device, facts, True), device.memory_bytes * MEMORY_SHARE
    gib = {n: (working + fixed_bytes(recipe, device, facts, n)) / 2**30 for n in (1, world)}
    room = f"of the {device.memory_bytes / 2**30:.0f} GiB of a card"
    if gib[1] * 2**30 <= have:
        return "ddp", f"a whole copy needs about {gib[1]:.0f} {room}"
    if gib[world] * 2**30 <= have:
        name = "fsdp2-qlora" if recipe.model.quantization == "nf4" else "fsdp2"
        return name, f"a whole copy needs about {gib[1]:.0f}, a share {gib[world]:.0f} {room}"
    return "fsdp2-offload", f"even a share needs about {gib[world]:.0f} {room}"


def describe_launch(recipe: Recipe, device: Device, facts: ModelFacts) -> str:
    """One line: how this launch shares the work, and which ready file suits it."""
    name, reason = suggested(recipe, device, distributed.world(), facts)
    now = distributed.sharding() or "whole copies (ddp)"
    return f"launch: {now}; recipes/accelerate/{name}.yaml suits {distributed.world()} such devices: {reason}"
