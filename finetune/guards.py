"""Guards: runs that go wrong in ways that no error reports are stopped, with a checkpoint and a diagnosis.

Each guard looks at one logged quantity. It fires when its condition held for `window` log lines in a row that have the
quantity: where several updates are made on the same completions, only the first of them logs what concerns these.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune import distributed
from finetune.callbacks import newest_complete, watched
from recipes.errors import RetortError
from recipes.schema import Guards
from recipes.schema_method import Method

FIRST = 5  # log lines whose mean is "the start"


def kl_explodes(limit: float, before: float, now: float, line: dict[str, float]) -> str | None:
    if now <= limit:
        return None
    return (
        f"the KL to the starting model is {now:.3g} nats per token (guards.kl {limit:g}): the model has left "
        "what it knew; lower train.learning_rate or raise method.beta"
    )


def length_explodes(limit: float, before: float, now: float, line: dict[str, float]) -> str | None:
    if now <= limit * before or line.get("truncated_share", 0.0) < 0.5:
        return None
    return (
        f"completions grew from {before:.0f} to {now:.0f} tokens and {line['truncated_share']:.0%} are cut "
        f"(guards.length {limit:g}): a reward pays for length; add the reward length, or method.mask_truncated: true"
    )


def entropy_collapses(limit: float, before: float, now: float, line: dict[str, float]) -> str | None:
    if now >= limit * before:
        return None
    return (
        f"the entropy fell from {before:.3g} to {now:.3g} nats per token (guards.entropy {limit:g}): all completions "
        "are alike, so nothing is left to learn from; raise method.epsilon_high or temperature, or lower "
        "train.learning_rate"
    )


def chosen_falls(limit: float, before: float, now: float, line: dict[str, float]) -> str | None:
    if now >= before - limit:
        return None
    return (
        f"the chosen answers' log-probability fell from {before:.2f} to {now:.2f} nats per token (guards.chosen_falls "
        f"{limit:g}): the model unlearns good answers to avoid bad ones; raise method.beta, lower train.learning_rate, "
        "or add the loss sft"
    )


Guard = Callable[[float, float, float, dict[str, float]], str | None]
# What a guard looks at, under the names of metrics.jsonl (of several the first that is there), and the guard.
GUARDS: dict[str, tuple[tuple[str, ...], Guard]] = {
    "kl": (("kl_per_token", "kl"), kl_explodes),  # KTO's own is of whole answers
    "length": (("completion_length",), length_explodes),
    "entropy": (("entropy",), entropy_collapses),
    "chosen_falls": (("logp_chosen_per_token",), chosen_falls),
}


def describe(guards: Guards, method: Method) -> list[str]:
    """Which guards watch a run of a method, in a line; none for a method that has nothing to watch."""
    if method.type == "grpo":
        fit = ["kl", "length", "entropy"] if method.beta else ["length", "entropy"]
    elif method.type == "kto":
        fit = ["kl", "chosen_falls"] if method.loss == "kto" else ["chosen_falls"]
    else:
        fit = ["chosen_falls"] if method.type in {"dpo", "orpo"} else []
    on = [name for name in fit if getattr(guards, name) is not None]
    off = ""
    if method.type == "grpo" and not method.beta and guards.kl is not None:
        off = "; kl is not on: without method.beta no KL to the start is computed"
    return [f"guards: {', '.join(on) or 'none'}{off}"] if fit else []


class Guarding(TrainerCallback):
    """Watches the log lines; `found` is the diagnosis that stopped the run.

    Args:
        tracker: is told once, so that a person hears of it where alerts are on (finetune/tracking.py).
    """

    def __init__(self, guards: Guards, tracker: Any = None) -> None:
        self.tracker = tracker
        self.limits = {name: getattr(guards, name) for name in GUARDS if getattr(guards, name) is not None}
        self.first: dict[str, list[float]] = {}
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
        start = {name: sum(values) / FIRST for name, values in self.first.items() if len(values) == FIRST}
        for name, value in line.items():
            if name not in start:
                self.first.setdefault(name, []).append(value)
        for name, limit in self.limits.items():
            quantities, guard = GUARDS[name]
            quantity = next((q for q in quantities if q in line), None)
            # Supervised runs log an entropy too, which falls as they learn: that of completions comes with a reward.
            if quantity not in start or (name == "entropy" and "reward" not in self.first):
                continue
            seen = self.recent[name]
            seen.append(guard(limit, start[quantity], line[quantity], line))
            if len(seen) == seen.maxlen and all(seen) and self.found is None:
                self.found = seen[-1]

    def require(self, folder: Path) -> None:
        """Raise what was found.

        Raises:
            RetortError: a guard stopped the run; the checkpoint of the last step is kept.
        """
        if self.found is not None:
            raise RetortError(f"stopped by a guard: {self.found}", str(folder), "the checkpoint of this step is kept")


class Finite(TrainerCallback):
    """Ends a run at the first loss or gradient that is no number: before the step, so that the weights never become so.

    Args:
        folder: the run's.

    Attributes:
        found: what was no number, and where; None while all is well.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoints = folder / "checkpoints"
        self.found: str | None = None
        self.began = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.fp16:  # its scaler leaves such steps out by itself, and some are usual
            return
        parameters = [p for p in model.parameters() if p.grad is not None]  # with DeepSpeed there are none: see on_log
        if _are_finite((p.grad for p in parameters), args):
            return
        self.found = f"a gradient of step {state.global_step + 1} is no number"
        for parameter in parameters:
            parameter.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.found is None:
            return
        if state.global_step == self.began + 1:  # what could be saved is what this attempt began with
            self.require()
        control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if self.found is not None or not logs or "loss" not in logs:
            return
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name) or 0.0)):
                self.found = f"the {name.replace('_', ' ')} is {logs[name]} at step {state.global_step}"
                control.should_training_stop = True
                control.should_save = _are_finite((p for p in model.parameters() if p.requires_grad), args)
                return

    def require(self) -> None:
        """Raise what was found.

        Raises:
            RetortError: with the checkpoint to go back to, where there is one.
        """
        if self.found is None:
            return
        newest = newest_complete(self.checkpoints)[0]
        kept = f"{newest.name} holds the last weights that are numbers" if newest else "there is no checkpoint yet"
        raise RetortError(self.found, str(self.checkpoints.parent), f"lower train.learning_rate; {kept}")


def _are_finite(tensors: Iterable[Any], args: Any) -> bool:
    """Whether all tensors are finite, on every process."""
    parts = [distributed.local(tensor).detach() for tensor in tensors]
    norm = torch.nn.utils.get_total_norm([part for part in parts if part.numel()])
    broken = (~torch.isfinite(norm)).to(torch.int32)
    if args.world_size > 1:
        broken = broken.to(args.device)
        torch.distributed.all_reduce(broken, op=torch.distributed.ReduceOp.MAX)
    return not bool(broken)
