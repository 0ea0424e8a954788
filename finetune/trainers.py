"""Recipe -> trainer: one literal dict, one builder per method. The loops are TRL's; what goes into them is ours."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.tokens import Tokenizer
from finetune.layout import Layout
from finetune.models import adapter_config
from recipes.errors import RecipeError
from recipes.schema import Recipe

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}

# Fields of the trainer's config that a recipe key already decides: saying it twice is refused, with the key to use.
OWNED = {
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "optim": "train.optimizer",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch",
    "per_device_eval_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "max_length": "train.seq_len",
    "packing": "train.packing",
    "padding_free": "train.packing",
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "output",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": "train.eval_every",
    "logging_steps": "train.log_every",
    "report_to": "track",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "use_cpu": "train.device",
    "dataset_kwargs": "data",
    "model_init_kwargs": "model",
    "save_strategy": "train.save_every",
    "eval_strategy": "train.eval_every",
    "logging_nan_inf_filter": "train.log_every",
    "disable_tqdm": "train.log_every",
    "dataloader_pin_memory": "train.device",
    "ddp_find_unused_parameters": "train.device",
    "resume_from_checkpoint": "output",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on",
}


def check_extra(recipe: Recipe) -> None:
    """Check `train.extra` against the config class of the method, before anything is loaded.

    Raises:
        RecipeError: an unknown field, one that a recipe key decides, or a value that the class refuses.
    """
    import difflib

    from trl import SFTConfig

    fields = {f.name: f for f in dataclasses.fields(SFTConfig) if f.init}
    for name, value in recipe.train.extra.items():
        place = f"train.extra.{name}"
        if name in OWNED:
            raise RecipeError(f"'{name}' is decided by the recipe itself", place, f"set {OWNED[name]}")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise RecipeError("no such field of SFTConfig", place, f"did you mean '{close[0]}'?" if close else None)
        choices = fields[name].metadata.get("choices")
        if choices and value not in choices:
            raise RecipeError(f"must be one of {', '.join(map(str, choices))}, not {value!r}", place)
    if recipe.train.extra:
        try:
            SFTConfig(output_dir=os.devnull, report_to="none", use_cpu=True, bf16=False, **recipe.train.extra)
        except Exception as error:  # the class validates in many ways
            raise RecipeError(f"SFTConfig refuses it: {' '.join(str(error).split())}", "train.extra") from None


def build_sft(
    recipe: Recipe,
    layout: Layout,
    tokenizer: Tokenizer,
    model: Any,
    datasets: dict[str, Any],
    run_dir: Path,
    callbacks: Sequence[Any],
) -> Any:
    """TRL's SFTTrainer over rows that are already tokens and labels.

    Args:
        datasets: `train` and perhaps `eval`, from `token_dataset`.
        run_dir: checkpoints go to `run_dir/checkpoints`.
    """
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    flash = recipe.model.attention.startswith("flash")
    config = SFTConfig(
        **common_arguments(recipe, layout, run_dir, "eval" in datasets),
        max_length=None,
        packing=recipe.train.packing and flash,  # then TRL's own collator flattens for the variable-length kernels
        dataset_kwargs={"skip_prepare_dataset": True},
        **recipe.train.extra,
    )
    collator = PackedCollator(tokenizer.backend.pad_token_id) if recipe.train.packing and not flash else None
    try:
        trainer = SFTTrainer(
            model=model,
            args=config,
            processing_class=tokenizer.backend,
            data_collator=collator,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            peft_config=adapter_config(recipe.adapter) if recipe.adapter is not None else None,
            callbacks=list(callbacks),
        )
    except ValueError as error:  # peft: a target that matches nothing; trl: options that exclude each other
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"cannot be set up: {reason}", "adapter" if "target" in reason else "train") from None
    trainer.remove_callback(PrinterCallback)
    return trainer


BUILDERS = {"sft": build_sft}


def common_arguments(recipe: Recipe, layout: Layout, run_dir: Path, has_eval: bool) -> dict[str, Any]:
    """Fields of transformers' TrainingArguments that every method shares."""
    train = recipe.train
    every = train.eval_every if has_eval else None
    optimizer = train.optimizer
    if optimizer == "auto":
        optimizer = "paged_adamw_8bit" if layout.device == "cuda" and layout.quantization == "nf4" else "adamw"
    return {
        "output_dir": str(run_dir / "checkpoints"),
        "per_device_train_batch_size": layout.micro_batch,
        "per_device_eval_batch_size": layout.micro_batch,
        "gradient_accumulation_steps": layout.gradient_accumulation,
        "max_steps": layout.steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule if train.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": float(train.warmup),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": OPTIMIZERS[optimizer],
        "gradient_checkpointing": layout.gradient_checkpointing,
        "bf16": layout.dtype == "bfloat16",
        "fp16": layout.dtype == "float16",
        "use_cpu": layout.device == "cpu",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,  # a NaN loss must be seen, not averaged away
        "save_strategy": "steps",
        "save_steps": steps_of(train.save_every, layout.steps),
        "eval_strategy": "steps" if every is not None else "no",
        "eval_steps": steps_of(every, layout.steps) if every is not None else None,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": layout.device == "cuda",
        "ddp_find_unused_parameters": False if layout.world_size > 1 else None,
    }


def steps_of(every: int | float, total: int) -> int:
    """An interval in steps from a number of steps (int) or a share of the run (float)."""
    return every if isinstance(every, int) else max(1, round(every * total))


def token_dataset(rows: Sequence[dict[str, Any]], recipe: Recipe) -> Any:
    """Prepared rows as a dataset of `input_ids` and `labels` (-100 where nothing is trained), packed where asked."""
    import datasets

    labels = []
    for row in rows:
        label = [t if trained else -100 for t, trained in zip(row["input_ids"], row["loss_mask"], strict=True)]
        label[0] = -100  # nothing predicts the first token; in a pack it would be predicted from another row
        labels.append(label)
    data = datasets.Dataset.from_dict({"input_ids": [r["input_ids"] for r in rows], "labels": labels})
    return pack(data, recipe.train.seq_len) if recipe.train.packing else data


def pack(data: Any, seq_len: int) -> Any:
    """Best-fit-decreasing packs of whole rows, with the rows' lengths in `seq_lengths`."""
    import datasets
    from trl import pack_dataset

    quiet = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return pack_dataset(data, seq_len, "bfd", {"batch_size": None, "load_from_cache_file": False})
    finally:
        if quiet:
            datasets.enable_progress_bars()


@dataclasses.dataclass
class PackedCollator:
    """Packs -> a batch in which the rows of a pack never see each other.

    There is no attention mask: transformers builds a block-diagonal causal mask from `position_ids`, which start at 0
    with every row. Padding is a block of its own with labels -100. Every tensor is (batch, longest pack).
    """

    pad_token_id: int

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(p["input_ids"]) for p in packs)
        ids, labels, positions = [], [], []
        for p in packs:
            fill = width - len(p["input_ids"])
            ids.append([*p["input_ids"], *[self.pad_token_id] * fill])
            labels.append([*p["labels"], *[-100] * fill])
            positions.append([i for n in (*p["seq_lengths"], fill) for i in range(n)])
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": torch.tensor(positions),
        }
