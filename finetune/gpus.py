"""NVIDIA cards, without torch: whether one may be seen, what the driver says of it, and whether torch can use it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import RecipeError


@dataclass(frozen=True)
class Card:
    """A card as the driver names it, and its memory in bytes."""

    name: str
    memory_bytes: int


def first_card() -> Card | None:
    """The first card that this process may see, by the driver; CUDA_VISIBLE_DEVICES hides cards, as from torch."""
    one: list[str] = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0].strip()
        if not first or first.startswith("-"):
            return None
        if not first.startswith("MIG-"):  # a part of a card: the driver answers for the whole one only
            one = ["-i", first]
    try:
        memory, name = _driver("memory.total,name", *one)[0].split(",", 1)
        return Card(name.strip(), int(memory) * 2**20)
    except (ValueError, IndexError):
        return None


def count_cards() -> int:
    """How many cards this process may see, by CUDA_VISIBLE_DEVICES or else by the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # What comes after an entry that is none is hidden too.
        return next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return len(_driver("name"))


def _driver(fields: str, *more: str) -> list[str]:
    """What the driver says of each card, a line each; nothing where there is no driver, or it does not answer."""
    asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *more]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def require_torch(card: str) -> None:
    """Refuse a card that torch cannot use. Torch is asked itself where it is loaded, else its build is looked at.

    Raises:
        RecipeError: the torch that is installed computes on processors only, or the driver is too old for it.
    """
    if not _reaches_cards():
        remedy = "run scripts/setup again (it takes the torch that suits the driver), or set train.device: cpu"
        raise RecipeError(f"{card} answers, but the torch installed here cannot use it", "train.device", remedy)


def _reaches_cards() -> bool:
    if (torch := sys.modules.get("torch")) is not None:
        return bool(torch.cuda.is_available())
    found = importlib.util.find_spec("torch")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        try:
            build = (Path(folder) / "version.py").read_text(encoding="utf-8")
        except OSError:
            break  # it cannot be told from here; torch itself will say
        return re.search(r"^cuda\b[^=\n]*=\s*None\b", build, re.MULTILINE) is None
    return True
