"""Measuring while training: a curve on held-out rows, the best weights kept, and an early end when nothing improves.

The rows are measured by finetune/evals.py, in bounded memory and under any metric, instead of by the trainer's own
evaluation, which keeps every logit. What was measured is in `watched.jsonl`, the best weights are in `best/`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from data_prep.tokens import Tokenizer
from finetune import evals
from finetune.arguments import steps_of
from finetune.callbacks import Metrics, kept_lines
from finetune.stats import Answer, values
from recipes.lineage import write_atomic
from recipes.schema import Recipe

LOWER_IS_BETTER = {"loss", "perplexity"}


class Selection(TrainerCallback):
    """Measures every `eval_every` steps.

    Args:
        rows: held-out rows to watch.
        start: the base's answers to them, for metrics that compare with it; made by `begin` where None.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], metrics: Metrics, folder: Path
    ) -> None:
        self.recipe, self.tokenizer, self.rows, self.metrics, self.folder = recipe, tokenizer, rows, metrics, folder
        self.best = recipe.train.best
        asked = [self.best.metric] if self.best else []
        self.asked = tuple(dict.fromkeys([*asked, *cheap_metrics(recipe)]))
        self.start: list[Answer] = []
        self.stopped_at: int | None = None
        self.path = folder / "watched.jsonl"

    def begin(self, model: Any) -> None:
        """Measure the start, before training."""
        self.start = evals.measure(model, self.tokenizer, self.rows, self.recipe, "start", self.asked)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_atomic(self.path, "".join(kept_lines(self.path, state.global_step)))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = steps_of(self.recipe.train.eval_every or 1, state.max_steps)
        if state.global_step % every and state.global_step != state.max_steps:
            return
        if state.is_world_process_zero:
            self._measure(state, _unwrapped(model))
        args.distributed_state.wait_for_everyone()
        history = _history(self.path)
        if self.best is not None and self.best.patience is not None and self._stale(history) >= self.best.patience:
            self.stopped_at = state.global_step
            control.should_training_stop = True
            control.should_save = True

    def _measure(self, state: Any, model: Any) -> None:
        answers = evals.measure(model, self.tokenizer, self.rows, self.recipe, "held out", self.asked)
        found = values(answers, self.asked, self.recipe.eval.labels or (), self.start or answers)
        better = self._better(found)
        line = {"step": state.global_step, **found, "kept": better}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self.metrics.add({"step": state.global_step, **{f"eval_{name}": value for name, value in found.items()}})
        if better:
            keep_weights(model, self.folder / "best")

    def _better(self, found: dict[str, float]) -> bool:
        if self.best is None:
            return False
        name = self.best.metric
        before = [line[name] for line in _history(self.path) if line["kept"]]
        if not before:
            return True
        gain = before[-1] - found[name] if name in LOWER_IS_BETTER else found[name] - before[-1]
        return gain > self.best.min_change

    @staticmethod
    def _stale(history: Sequence[dict[str, Any]]) -> int:
        """Evaluations since the last better one."""
        return next((i for i, line in enumerate(reversed(history)) if line["kept"]), len(history))

    def conclude(self, model: Any) -> list[str]:
        """Put the best weights back into the model; returns what became of the run, in sentences."""
        notes = []
        if self.stopped_at is not None:
            notes.append(f"stopped early at step {self.stopped_at}: no better evaluation since")
        kept = [line["step"] for line in _history(self.path) if line["kept"]]
        if self.best is not None and kept:
            load_weights(_unwrapped(model), self.folder / "best")
            notes.append(f"the weights of step {kept[-1]} are kept: the best by {self.best.metric}")
        return notes


def cheap_metrics(recipe: Recipe) -> tuple[str, ...]:
    """What is watched in any case: one forward per row, or where there is no other number the rewards themselves."""
    return {
        "sft": ("loss",),
        "dpo": ("preference_accuracy", "reward_accuracy", "loss"),
        "kto": ("preference_accuracy", "reward_accuracy", "loss"),
        "orpo": ("preference_accuracy", "loss"),
        "reward": ("preference_accuracy",),
        "grpo": ("reward",),
        "logits": ("loss",),
        "on_policy": ("token_f1",),
    }[recipe.method.key]


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def _history(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def keep_weights(model: Any, folder: Path) -> None:
    """Keep what trains, whole or not at all."""
    from safetensors.torch import save_file

    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, fresh / "trained.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def load_weights(model: Any, folder: Path) -> None:
    """Put kept weights back."""
    import torch
    from safetensors.torch import load_file

    kept = load_file(folder / "trained.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
