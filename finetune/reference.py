"""Log-probabilities of answers under the reference model: computed once per answer, kept for every later run.

An entry is addressed by what it depends on: the model's files, its precision, the tokens, and which of them count. A
second run, another beta, or one edited row therefore computes nothing, or only what is new.
"""

from __future__ import annotations

import hashlib
import sqlite3
from array import array
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.tokens import Tokenizer
from finetune.layout import Layout
from finetune.sequences import Sequence_, log_probabilities
from recipes.lineage import packages, sha256_json
from recipes.schema import Recipe


@dataclass(frozen=True)
class Weighed:
    """A sequence whose log-probability is wanted: the sum over its trained tokens.

    Attributes:
        beyond: weight of the trained tokens after the first `within` ones (LD-DPO); None: all count alike.
    """

    sequence: Sequence_
    within: int = 0
    beyond: float | None = None

    def key(self, model: str) -> bytes:
        ids, mask = self.sequence
        parts = [model.encode(), array("i", ids).tobytes(), bytes(mask)]
        if self.beyond is not None:
            parts.append(f"{self.within} {self.beyond!r}".encode())
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()[:16]

    def total(self, tokens: Any) -> float:
        """From the log-probabilities of the trained tokens, a float32 tensor (trained tokens,)."""
        if self.beyond is None:
            return float(tokens.sum())
        return float(tokens[: self.within].sum() + self.beyond * tokens[self.within :].sum())


def model_key(recipe: Recipe, layout: Layout, state: dict[str, Any]) -> str:
    """Hash over what decides the reference's numbers.

    Args:
        state: identity of the base's files, and of an earlier run's adapter that is on.
    """
    precision = [layout.dtype, recipe.model.quantization, recipe.model.double_quant, recipe.model.attention]
    versions = {name: packages().get(name) for name in ("torch", "transformers", "bitsandbytes")}
    return sha256_json([state, precision, layout.device, versions])


class Cache:
    """Key -> log-probability, in one SQLite file: a crash loses nothing that was written and leaves nothing torn."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with closing(self._open()) as store, store:
            store.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID")

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=120)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        found = {}
        with closing(self._open()) as store:
            for key in dict.fromkeys(keys):
                row = store.execute("SELECT value FROM logps WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = float(row[0])
        return found

    def put(self, values: dict[bytes, float]) -> None:
        with closing(self._open()) as store, store:
            store.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", values.items())


WRITE_EVERY = 512  # sequences between writes: what a crash can cost


def reference_logps(
    model: Any, tokenizer: Tokenizer, wanted: Sequence[Weighed], key: str, cache: Cache, rank: int = 0, world: int = 1
) -> tuple[list[float], int]:
    """Log-probabilities of sequences under `model` as it is now, and how many of them had to be computed.

    With several processes each computes its share of what is missing and writes it; all read the whole.

    Args:
        key: of the model, from `model_key`.
    """
    keys = [one.key(key) for one in wanted]
    found = cache.get(keys)
    missing = list({key: i for i, key in enumerate(keys) if key not in found}.values())
    # By the key, not by the place among what is missing: another process may already have written some of its share.
    mine = [i for i in missing if keys[i][0] % world == rank]
    for start in range(0, len(mine), WRITE_EVERY):
        part = mine[start : start + WRITE_EVERY]
        note = f"reference {start + len(part)}/{len(mine)}"
        tokens = log_probabilities(model, tokenizer, [wanted[i].sequence for i in part], note)
        cache.put({keys[i]: wanted[i].total(line) for i, line in zip(part, tokens, strict=True)})
    if world > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
    if missing:
        found = cache.get(keys)
    return [found[k] for k in keys], len(missing)
