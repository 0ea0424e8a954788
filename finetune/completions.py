"""Sample completions of a GRPO run, kept while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.callbacks import kept_lines
from recipes.lineage import write_atomic

SHOWN = 8  # completions kept of one step: a group, as far as it fits


class Completions(TrainerCallback):
    """Appends the first group of completions to completions.jsonl: at the first step, every `every` steps, at the end.

    Attributes:
        trainer: TRL's GRPOTrainer, which remembers the completions of the last step; set once it is built.
    """

    def __init__(self, path: Path, every: int, generations: int) -> None:
        self.path, self.every, self.count = path, every, min(SHOWN, generations)
        self.trainer: Any = None
        self.show: Any = None  # row number -> its prompt as text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_atomic(self.path, "".join(kept_lines(self.path, state.global_step)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if not state.is_world_process_zero or (step != 1 and step % self.every and step != state.max_steps):
            return
        logs = self.trainer._logs
        size = self.trainer.args.generation_batch_size
        start = max(0, len(logs["prompt"]) - size)  # the oldest of the last generation
        with self.path.open("a", encoding="utf-8") as stream:
            for i in range(start, min(start + self.count, len(logs["prompt"]))):
                line = {
                    "step": step,
                    "prompt": self.show(int(logs["prompt"][i])),
                    "completion": logs["extra"]["text"][i],
                    "rewards": {name: _finite(found[i]) for name, found in logs["rewards"].items()},
                    "advantage": round(float(logs["advantages"][i]), 4),
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _finite(value: float) -> float | None:
    return None if value != value else round(float(value), 4)
