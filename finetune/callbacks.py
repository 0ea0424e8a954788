"""Beside the steps of a run: metrics, sealed checkpoints, the adapter check, progress."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetune import distributed
from recipes.errors import RetortError
from recipes.lineage import sha256_files, write_atomic

SEAL = "retort.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and _CHECKPOINT.match(p.name)]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def newest_complete(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint whose seal matches its files, and the torn ones that came after it."""
    torn: list[Path] = []
    for path in reversed(checkpoints(folder)):
        if _intact(path):
            return path, torn
        torn.append(path)
    return None, torn


def _intact(path: Path) -> bool:
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        return bool(seal["files"]) and sha256_files(path, seal["files"]) == seal["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Seal(TrainerCallback):
    """Seals each checkpoint with the hashes of its files once all processes have written theirs, and only then deletes
    older ones: all but the newest `keep`, and the one of the best step where the run selects by a metric.

    Args:
        copy_to: a folder on another disk or node; every sealed checkpoint is copied there while training goes on.
    """

    def __init__(self, keep: int, copy_to: Path | None = None) -> None:
        self.keep, self.copy_to = keep, copy_to
        self.copying: threading.Thread | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()  # each process writes its random states, and of cut weights its part
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        path = folder / f"checkpoint-{state.global_step}"
        write_atomic(path / SEAL, json.dumps({"step": state.global_step, "files": sha256_files(path)}, indent=2))
        self._wait()  # nothing is deleted while it is copied
        best = _best_step(folder.parent / "watched.jsonl")
        self._prune(folder, best)
        if self.copy_to is not None:
            self.copying = threading.Thread(target=self._copy, args=(path, self.copy_to, best))
            self.copying.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()

    def _wait(self) -> None:
        if self.copying is not None:
            self.copying.join()

    def _prune(self, folder: Path, best: int | None) -> None:
        for old in checkpoints(folder)[: -self.keep]:
            if old.name != f"checkpoint-{best}":
                shutil.rmtree(old, ignore_errors=True)

    def _copy(self, path: Path, target: Path, best: int | None) -> None:
        try:
            copy_off(path, target)
            self._prune(target, best)
        except (OSError, RetortError) as error:  # the run goes on: its own checkpoint is whole
            print(f"warning: {path.name} was not copied: {error}", flush=True)


def _best_step(path: Path) -> int | None:
    """The step whose weights are kept as the best so far, from watched.jsonl; None where nothing is selected."""
    best = None
    for line in kept_lines(path, sys.maxsize):
        entry = json.loads(line)
        best = entry["step"] if entry.get("kept") else best
    return best


def copy_off(checkpoint: Path, target: Path) -> Path:
    """Copy a sealed checkpoint into the folder `target`, whole or not at all. Returns the copy.

    Raises:
        RetortError: the copy differs from the seal. OSError: it cannot be written.
    """
    done, fresh = target / checkpoint.name, target / f".{checkpoint.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(checkpoint, fresh)
        if not _intact(fresh):
            remedy = "look at the disks"
            raise RetortError(f"the copy in {target} differs from the original", str(checkpoint), remedy)
        shutil.rmtree(done, ignore_errors=True)
        fresh.rename(done)
    except (OSError, RetortError):
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return done


class TokenCounter:
    """Counts the tokens (padding left out) that a model reads in training, from its own inputs."""

    def __init__(self, model: Any, pad_token_id: int, world_size: int) -> None:
        self.pad, self.world_size = pad_token_id, world_size
        self.total: torch.Tensor | int = 0  # stays on the device, so that counting never makes it wait
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        mask: Any = kwargs.get("attention_mask")
        batch: Any = next((part for part in args if isinstance(part, dict)), None)
        if batch is not None:  # TRL's on-policy distillation hands the whole batch to a wrapper of the model
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        if module.training and (mask is not None or torch.is_tensor(ids)):
            self.total = self.total + (mask.sum() if mask is not None else (ids != self.pad).sum())

    def __call__(self) -> int:
        return int(self.total) * self.world_size


# TRL's names -> ours, which metrics.jsonl, the dashboards and the report share.
WATCHED = {
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "accuracy": "reward_accuracy",
    "margin": "reward_margin",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
    "logps/chosen_per_token": "logp_chosen_per_token",
    "kl_per_token": "kl_per_token",
    "nll_loss": "imitation_loss",
    "log_odds_ratio": "log_odds_ratio",
    "kl": "kl",
    "entropy": "entropy",
    "reward": "reward",
    "reward_std": "reward_std",
    "zero_variance_groups": "zero_variance_groups",
    "clip_ratio/region_mean": "clipped_share",
    "cispo_clip_ratio": "clipped_share",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "truncated_share",
    "sampling/sampling_logp_difference/mean": "engine_logp_difference",
    # of finetune/losses.py: the student against the cached distributions
    "divergence": "divergence",
    "token_loss": "token_loss",
    "head_mass": "head_mass",
    "student_head_mass": "student_head_mass",
    "agreement": "agreement",
    "calibration_error": "calibration_error",
    # of GOLD, across tokenizers
    "matched_loss": "matched_loss",
    "unmatched_loss": "unmatched_loss",
}
_REWARD = re.compile(r"^rewards/([\w#]+)/mean$")


def watched(logs: dict[str, Any]) -> dict[str, float]:
    """What a method logs beside the loss, under our names."""
    found = {}
    for name, value in logs.items():
        ours = f"reward/{match[1]}" if (match := _REWARD.match(name)) else WATCHED.get(name)
        if ours is not None and value is not None:
            found[ours] = float(value)
    return found


def kept_lines(path: Path, step: int) -> list[str]:
    """Lines of a JSONL file up to a step, which a resumed run keeps; a line torn by a crash is none."""
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(f"{line}\n")
        except ValueError:
            continue
    return kept


class Metrics(TrainerCallback):
    """Appends every log to metrics.jsonl under stable names. Totals go on where an interrupted attempt stopped."""

    def __init__(self, path: Path, tracker: Any = None) -> None:
        self.path, self.tracker = path, tracker
        self.counter: TokenCounter | None = None
        self.utilisation: Any = None  # tokens a second -> share of the devices' peak, where it is known
        self.started = time.monotonic()
        self.before = {"seconds": 0.0, "tokens_seen": 0}  # by interrupted attempts at the same run
        self.last = (self.started, 0)
        self.newest: dict[str, Any] = {}  # the last line of training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines = kept_lines(self.path, state.global_step)
            for entry in map(json.loads, lines):
                self.before = {k: max(v, entry.get(k, 0)) for k, v in self.before.items()}
            write_atomic(self.path, "".join(lines))
        self.started = time.monotonic()
        self.last = (self.started, 0)
        if self.counter is not None:
            self.counter.total = 0  # the probe of the pre-flight is no training

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.newest = {"step": state.global_step, **self._training_entry(state, logs), **watched(logs)}
        self.add(self.newest)

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line, and pass it on to the dashboard."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        if self.tracker is not None:
            self.tracker.log(entry)

    def _training_entry(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        now, tokens = time.monotonic(), self.counter() if self.counter else 0
        then, tokens_then = self.last
        self.last = (now, tokens)
        rate = round((tokens - tokens_then) / max(now - then, 1e-9), 1)
        share = self.utilisation(rate) if self.utilisation is not None else None
        return {
            "epoch": round(float(state.epoch or 0.0), 4),
            "seconds": round(self.before["seconds"] + now - self.started, 2),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": rate,
            **({"mfu": round(share, 4)} if share is not None else {}),
            "tokens_seen": self.before["tokens_seen"] + tokens,
            "memory_bytes": peak_memory(),
        }


def _headline(entry: dict[str, Any]) -> str:
    """What to watch of a line of metrics: loss, and of preferences and rewards what says more; speed, peak memory."""
    more = [f"  {name.replace('_', ' ')} {entry[name]:.3f}" for name in ("reward", "reward_accuracy") if name in entry]
    speed, memory = entry["tokens_per_second"], entry["memory_bytes"] / 2**30
    return f"loss {entry['loss']:.4f}{''.join(more)}  {speed:,.0f} tokens/s  {memory:.1f} GiB"


class Progress(TrainerCallback):
    """A progress bar on a terminal; elsewhere about forty plain lines over the run.

    Args:
        metrics: whose numbers are shown; it must hear of a step first.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.bar: Any = None
        self.task: Any = None
        self.started = time.monotonic()
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        step, total = state.global_step, state.max_steps
        said = _headline(self.metrics.newest)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=said)
        elif step % max(1, total // 40) == 0 or step in {self.first + 1, total}:
            left = (time.monotonic() - self.started) / max(1, step - self.first) * (total - step)
            print(f"step {step}/{total}  {said}  about {left:.0f} s left", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class AdapterCheck(TrainerCallback):
    """After the first optimiser step: the trained weights changed, are finite, and their saved copy reloads equal.

    `result` holds the findings; a failure stops the run, since every later step would be lost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before: dict[str, torch.Tensor] = {}
        self.result: dict[str, Any] | None = None
        self.model: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # A warm-up starts at rate 0, and a step at rate 0 rightly changes nothing: the check waits for the next one.
        moving = any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)
        if self.result is None and moving:
            self.before = {n: p.to("cpu", copy=True) for n, p in _held(model).items()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.result is not None or not self.before:
            return
        cut = hasattr(model, "peft_config") and distributed.is_cut(model)
        whole = distributed.gather(model, trained_only=True) if cut else None
        if not state.is_world_process_zero:  # it has given its part of cut weights
            self.result, self.before = {}, {}
            return
        self.result = {**_change(self.before, _held(model)), "reloads": self._reloads(model, whole)}
        self.before = {}
        for name, remedy in FAILED.items():
            if self.result[name] is False:
                raise RetortError(f"after the first step the trained weights are not '{name}'", "pre-flight", remedy)

    def _reloads(self, model: Any, whole: dict[str, torch.Tensor] | None) -> bool | None:
        """Whether a saved copy holds the same values; None (unchecked) where all weights train: a large copy.

        Args:
            whole: the trained weights put together, where the model holds only a part of each.
        """
        from safetensors.torch import load_file

        if not hasattr(model, "peft_config"):
            return None
        from peft import get_peft_model_state_dict

        shutil.rmtree(self.folder, ignore_errors=True)
        more = {} if whole is None else {"state_dict": whole}
        model.save_pretrained(self.folder, safe_serialization=True, selected_adapters=["default"], **more)
        saved = load_file(self.folder / "adapter_model.safetensors")
        live = {k: v.detach().cpu() for k, v in get_peft_model_state_dict(model, **more).items()}
        shutil.rmtree(self.folder, ignore_errors=True)
        return saved.keys() == live.keys() and all(torch.equal(saved[k], live[k]) for k in live)


FAILED = {
    "changed": "look at train.learning_rate and at which modules the adapter covers",
    "finite": "lower train.learning_rate",
    "reloads": "the disk or the peft version corrupts what is saved",
}


def _held(model: Any) -> dict[str, torch.Tensor]:
    """What trains; of cut weights the part that this process holds."""
    found = ((name, distributed.local(p).detach()) for name, p in model.named_parameters() if p.requires_grad)
    return {name: part for name, part in found if part.numel()}


def _change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, Any]:
    largest, finite = 0.0, True
    for name, tensor in after.items():
        now = tensor.detach().cpu()
        finite = finite and bool(torch.isfinite(now).all())
        largest = max(largest, float((now.float() - before[name].float()).abs().max()))
    return {"changed": largest > 0, "finite": finite, "max_abs_change": largest}


def peak_memory() -> int:
    """Peak bytes of this process's device memory (of its resident memory on a processor)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
