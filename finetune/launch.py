"""Which file of recipes/accelerate/ suits a recipe on several devices, and what a launch made of it. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import recipes
from finetune import distributed
from finetune.gpus import first_card
from finetune.layout import MEMORY_SHARE, Device, ModelFacts, find_device, fixed_bytes, per_token
from recipes.errors import RecipeError
from recipes.schema import Recipe

FILES = Path(recipes.__file__).parent / "accelerate"
ASSUMED = 80  # GiB of a card that nobody has said anything of


def asked_device(recipe: Recipe, gpus: int | None, card_memory: float | None = None) -> Device:
    """The device of a run elsewhere, on nodes with so many cards each; of a run here where `gpus` is None.

    Args:
        card_memory: GiB of a card; None: that of the first card of this machine, without one ASSUMED.

    Raises:
        RecipeError: as `find_device`; the recipe trains on processors, and cards are asked for.
    """
    if not gpus:
        return find_device(recipe.train.device if gpus is None else "cpu")
    if recipe.train.device == "cpu":
        raise RecipeError("the recipe trains on processors (train.device: cpu)", "--gpus", "leave one of them out")
    here = first_card() if card_memory is None else None
    if here is not None:
        return Device("cuda", here.memory_bytes, here.name)
    memory = card_memory or ASSUMED
    said = "" if card_memory else " (assumed; --card-memory says)"
    return Device("cuda", round(memory * 2**30), f"a card of {memory:g} GiB{said}")


@contextmanager
def launched(name: str, world: int) -> Iterator[None]:
    """Within it layout and checks answer as in a process of a launch with that file, on so many devices."""
    cut = name.startswith("fsdp2")
    made = {
        "WORLD_SIZE": str(world),
        "ACCELERATE_USE_FSDP": str(cut).lower(),
        "FSDP_OFFLOAD_PARAMS": str(name.endswith("offload")).lower(),
    }
    before = {key: os.environ.get(key) for key in made}
    os.environ.update(made)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


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
