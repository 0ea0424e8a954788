"""Guards: runs that go wrong in ways that no error reports are stopped, with a checkpoint and a diagnosis.

Each guard looks at what is logged. It fires when its condition held for `window` log lines in a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.callbacks import watched
from recipes.errors import RetortError
from recipes.schema import Guards

FIRST = 5  # log lines whose mean is "the start"


def kl_explodes(limit: float, start: dict[str, float], line: dict[str, float]) -> str | None:
    if line.get("kl", 0.0) <= limit:
        return None
    return (
        f"the KL to the starting model is {line['kl']:.3g} nats per token (guards.kl {limit:g}): the model has left "
        "what it knew; lower train.learning_rate or raise method.beta"
    )


def length_explodes(limit: float, start: dict[str, float], line: dict[str, float]) -> str | None:
    before, now = start.get("completion_length"), line.get("completion_length")
    if not before or not now or now <= limit * before or line.get("truncated_share", 0.0) < 0.5:
        return None
    return (
        f"completions grew from {before:.0f} to {now:.0f} tokens and {line['truncated_share']:.0%} are cut "
        f"(guards.length {limit:g}): a reward pays for length; add the reward length, or method.mask_truncated: true"
    )


def entropy_collapses(limit: float, start: dict[str, float], line: dict[str, float]) -> str | None:
    before, now = start.get("entropy"), line.get("entropy")
    if not before or now is None or now >= limit * before or "reward" not in line:
        return None
    return (
        f"the entropy fell from {before:.3g} to {now:.3g} nats per token (guards.entropy {limit:g}): all completions "
        "are alike, so nothing is left to learn from; raise method.epsilon_high or temperature, or lower "
        "train.learning_rate"
    )


def chosen_falls(limit: float, start: dict[str, float], line: dict[str, float]) -> str | None:
    before, now = start.get("logp_chosen"), line.get("logp_chosen")
    if before is None or now is None or now >= before - limit:
        return None
    return (
        f"the chosen answers' log-probability fell from {before:.1f} to {now:.1f} nats (guards.chosen_falls "
        f"{limit:g}): the model unlearns good answers to avoid bad ones; raise method.beta, lower train.learning_rate, "
        "or add the loss sft"
    )


Guard = Callable[[float, dict[str, float], dict[str, float]], str | None]
GUARDS: dict[str, Guard] = {
    "kl": kl_explodes,
    "length": length_explodes,
    "entropy": entropy_collapses,
    "chosen_falls": chosen_falls,
}


class Guarding(TrainerCallback):
    """Watches the log lines; `found` is the diagnosis that stopped the run.

    Args:
        tracker: is told once, so that a person hears of it where alerts are on (finetune/tracking.py).
    """

    def __init__(self, guards: Guards, tracker: Any = None) -> None:
        self.tracker = tracker
        self.limits = {name: getattr(guards, name) for name in GUARDS if getattr(guards, name) is not None}
        self.first: list[dict[str, float]] = []
        self.recent: dict[str, deque[str | None]] = {name: deque(maxlen=guards.window) for name in self.limits}
        self.found: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that goes on has the same start, and has seen the same lines, as if it had never stopped."""
        for logs in state.log_history:
            self._see(logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._see(logs)
        if self.found is not None:
            if self.tracker is not None:
                self.tracker.alert("stopped by a guard", self.found)
                self.tracker = None
            control.should_training_stop = True
            control.should_save = True

    def _see(self, logs: dict[str, Any] | None) -> None:
        if not logs or "loss" not in logs:
            return
        line = watched(logs)
        if len(self.first) < FIRST:
            self.first.append(line)
            return
        start = {name: sum(first.get(name, 0.0) for first in self.first) / FIRST for name in line}
        for name, limit in self.limits.items():
            seen = self.recent[name]
            seen.append(GUARDS[name](limit, start, line))
            if len(seen) == seen.maxlen and all(seen) and self.found is None:
                self.found = seen[-1]

    def require(self, folder: Path) -> None:
        """Raise what was found.

        Raises:
            RetortError: a guard stopped the run; the checkpoint of the last step is kept.
        """
        if self.found is not None:
            raise RetortError(f"stopped by a guard: {self.found}", str(folder), "the checkpoint of this step is kept")
