"""A recipe as the configuration of a TRL trainer: what every method shares, and `train.extra` checked beforehand."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.tokens import Tokenizer
from finetune import distributed
from finetune.config_fields import fields_of
from finetune.layout import Layout
from recipes.errors import RecipeError
from recipes.schema import Recipe


@dataclass(frozen=True)
class Job:
    """What a trainer is built from.

    Attributes:
        rows: prepared training rows.
        run_dir: checkpoints go to `run_dir/checkpoints`.
        reference: log-probabilities of the answers that the method compares with, in its order; empty for none.
    """

    recipe: Recipe
    layout: Layout
    tokenizer: Tokenizer
    model: Any
    rows: Sequence[dict[str, Any]]
    run_dir: Path
    callbacks: Sequence[Any] = ()
    reference: Sequence[float] = ()


# A processor compiles its bfloat16 kernels anew for every shape, and keeps them: few widths take less memory and time.
WIDTHS = 32  # tokens
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


METHOD_OWNED = {
    "dpo": {
        "loss_type": "method.loss",
        "loss_weights": "method.loss",
        "beta": "method.beta",
        "label_smoothing": "method.label_smoothing",
        "ld_alpha": "method.length_desensitised",
        "precompute_ref_log_probs": "method.reference_free",
        "truncation_mode": "data.too_long",
    },
    "kto": {
        "loss_type": "method.loss",
        "beta": "method.beta",
        "desirable_weight": "method.desirable_weight",
        "undesirable_weight": "method.undesirable_weight",
        "precompute_ref_log_probs": "method.beta",
        "train_sampling_strategy": "method.loss",
    },
    "orpo": {"beta": "method.beta", "max_completion_length": "train.seq_len"},
    "reward": {"center_rewards_coefficient": "method.center"},
    "grpo": {
        "loss_type": "method.loss",
        "beta": "method.beta",
        "epsilon": "method.epsilon",
        "epsilon_high": "method.epsilon_high",
        "delta": "method.delta",
        "importance_sampling_level": "method.importance_sampling",
        "scale_rewards": "method.scale_rewards",
        "mask_truncated_completions": "method.mask_truncated",
        "num_generations": "method.generations",
        "num_iterations": "method.iterations",
        "max_completion_length": "method.max_new_tokens",
        "generation_batch_size": "method.prompts_per_step",
        "steps_per_generation": "method.prompts_per_step",
        "temperature": "method.temperature",
        "top_p": "method.top_p",
        "top_k": "method.top_k",
        "min_p": "method.min_p",
        "reward_weights": "method.rewards",
        "shuffle_dataset": "seed",
        "chat_template_kwargs": "model.template_kwargs",
        "use_vllm": "method.engine",
        "vllm_mode": "method.vllm.mode",
        "vllm_server_base_url": "method.vllm.url",
        "vllm_gpu_memory_utilization": "method.vllm.memory",
        "vllm_enable_sleep_mode": "method.vllm.sleep",
        "vllm_tensor_parallel_size": "method.vllm.tensor_parallel",
        "use_transformers_continuous_batching": "method.engine",
        "log_completions": "method.show_every",
    },
    "on_policy": {
        "beta": "method.beta",
        "max_completion_length": "method.max_new_tokens",
        "temperature": "method.temperature",
        "top_p": "method.top_p",
        "top_k": "method.top_k",
        "teacher_model_name_or_path": "teacher.model",
        "teacher_model_revision": "teacher.model",
        "teacher_model_init_kwargs": "teacher.engine",
        "shuffle_dataset": "seed",
        "chat_template_kwargs": "model.template_kwargs",
        "log_completions": "train.log_every",
        "lmbda": "method.mode",
        "use_uld_loss": "method.cross_tokenizer",
        "teacher_tokenizer_name_or_path": "teacher.tokenizer",
        "use_vllm": "method.vllm",
        "vllm_mode": "method.vllm.mode",
        "vllm_server_base_url": "method.vllm.url",
        "vllm_gpu_memory_utilization": "method.vllm.memory",
        "vllm_enable_sleep_mode": "method.vllm.sleep",
        "vllm_tensor_parallel_size": "method.vllm.tensor_parallel",
    },
}
METHOD_OWNED["preference"] = METHOD_OWNED["dpo"]
METHOD_OWNED["logits"] = {"loss_type": "method.cross_entropy", "label_smoothing_factor": "method.cross_entropy"}
CONFIGS = {
    "sft": "trl:SFTConfig",
    "dpo": "trl:DPOConfig",
    "kto": "trl:KTOConfig",
    "orpo": "trl.experimental.orpo:ORPOConfig",
    "reward": "trl:RewardConfig",
    "grpo": "trl:GRPOConfig",
    "sequence": "trl:SFTConfig",
    "logits": "trl:SFTConfig",
    "on_policy": "trl:DistillationConfig",
    "preference": "trl:DPOConfig",
}


def _config_name(recipe: Recipe) -> tuple[str, str]:
    """Module and name of TRL's config class of the recipe's method."""
    across = getattr(recipe.method, "cross_tokenizer", False)
    module, _, name = ("trl.experimental.gold:GOLDConfig" if across else CONFIGS[recipe.method.key]).partition(":")
    return module, name


def config_class(recipe: Recipe) -> Any:
    """TRL's config class of the recipe's method."""
    module, name = _config_name(recipe)
    return getattr(importlib.import_module(module), name)


def check_names(recipe: Recipe) -> None:
    """Check the names in `train.extra` without importing the class that takes them.

    Raises:
        RecipeError: an unknown field, or one that a recipe key decides.
    """
    if not recipe.train.extra:
        return
    _, config = _config_name(recipe)
    owned, fields = OWNED | METHOD_OWNED.get(recipe.method.key, {}), fields_of(config)
    for name in recipe.train.extra:
        place = f"train.extra.{name}"
        if name in owned:
            raise RecipeError(f"'{name}' is decided by the recipe itself", place, f"set {owned[name]}")
        if fields is not None and name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise RecipeError(f"no such field of {config}", place, f"did you mean '{close[0]}'?" if close else None)


def check_extra(recipe: Recipe) -> None:
    """Check `train.extra` against the config class of the method, before anything is loaded.

    Raises:
        RecipeError: an unknown field, one that a recipe key decides, or a value that the class refuses.
    """
    if not recipe.train.extra:
        return
    check_names(recipe)
    config = config_class(recipe)
    fields = {f.name: f for f in dataclasses.fields(config) if f.init}
    for name, value in recipe.train.extra.items():
        place = f"train.extra.{name}"
        if name not in fields:
            raise RecipeError(f"no such field of {config.__name__}", place)
        choices = fields[name].metadata.get("choices")
        if choices and value not in choices:
            raise RecipeError(f"must be one of {', '.join(map(str, choices))}, not {value!r}", place)
    try:
        config(output_dir=os.devnull, report_to="none", use_cpu=True, bf16=False, **recipe.train.extra)
    except Exception as error:  # the class validates in many ways
        raise RecipeError(f"{config.__name__} refuses it: {' '.join(str(error).split())}", "train.extra") from None


def make_trainer(kind: Any, job: Job, config: Any, data: Any, **more: Any) -> Any:
    """A trainer of TRL's, with the recipe's adapter unless the model already wears one.

    Raises:
        RecipeError: a target that matches nothing, or options that exclude each other.
    """
    import datasets
    from transformers.trainer_callback import PrinterCallback

    from finetune.models import adapter_config  # torch, which `retort plan` does without

    if job.layout.device == "cpu":
        _score_trained_positions_alone()
    datasets.disable_progress_bars()  # of steps that take no time: the rows are prepared
    fresh = job.recipe.adapter is not None and not hasattr(job.model, "peft_config")
    try:
        trainer = kind(
            model=job.model,
            args=config,
            processing_class=job.tokenizer.backend,
            train_dataset=data,
            peft_config=adapter_config(job.recipe) if fresh else None,
            callbacks=list(job.callbacks),
            **more,
        )
    except ValueError as error:  # peft: a target that matches nothing; trl: options that exclude each other
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"cannot be set up: {reason}", "adapter" if "target" in reason else "train") from None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _score_trained_positions_alone() -> None:
    """Let the head that TRL's trainers share read the trained positions alone on a processor too, as on a card.

    TRL asks `_use_triton` whether to leave the others out, and keeps them elsewhere for compilers that want fixed
    shapes. Nothing is compiled here; where a tenth of the tokens is trained, the head was a third of a step.
    """
    import trl.trainer.utils as theirs

    if hasattr(theirs, "_use_triton"):  # a later TRL without it is as slow as before, and as right
        theirs._use_triton = lambda device: True


def common_arguments(job: Job) -> dict[str, Any]:
    """Fields of transformers' TrainingArguments that every method shares, and those of `train.extra`."""
    recipe, layout = job.recipe, job.layout
    train = recipe.train
    optimizer = train.optimizer
    if optimizer == "auto":
        whole = distributed.shards(layout.device) == 1  # bitsandbytes' optimisers know nothing of cut tensors
        paged = layout.device == "cuda" and layout.quantization == "nf4" and whole
        optimizer = "paged_adamw_8bit" if paged else "adamw"
    return {
        "output_dir": str(job.run_dir / "checkpoints"),
        "per_device_train_batch_size": layout.micro_batch,
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
        "eval_strategy": "no",  # finetune/selection.py measures, in bounded memory and with every metric
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": layout.device == "cuda",
        "ddp_find_unused_parameters": False if layout.world_size > 1 else None,
        **train.extra,
    }


def few_widths(layout: Layout) -> dict[str, Any]:
    """What makes batches of rows alike in width where that pays; `train.extra` may say otherwise."""
    compiled = layout.device == "cpu" and layout.dtype == "bfloat16"
    fits = layout.seq_len % WIDTHS == 0  # or a row of seq_len would be padded beyond what was planned
    return {"pad_to_multiple_of": WIDTHS} if compiled and fits else {}


def width_of(longest: int, multiple: int | None) -> int:
    """Tokens of a padded batch: its longest row, rounded up to a multiple (`pad_to_multiple_of`)."""
    return -(-longest // (multiple or 1)) * (multiple or 1)


def steps_of(every: int | float, total: int) -> int:
    """An interval in steps from a number of steps (int) or a share of the run (float)."""
    return every if isinstance(every, int) else max(1, round(every * total))
