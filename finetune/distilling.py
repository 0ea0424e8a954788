"""The student of a cache of teacher distributions: TRL's SFTTrainer with the sparse divergence for its loss.

The loss is computed inside the model's own forward, so that what is wrapped around it (adapters, autocast, data
parallelism, sharded weights) works as ever; hidden states go to the head at trained positions alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.logit_cache import CachedLogits, join, row_key, scored_positions
from data_prep.logit_parts import REMEDY
from finetune.arguments import Job, common_arguments, few_widths, make_trainer, width_of
from finetune.heads import ALLOWED, LOOK, base_of, head_gap, head_layer, head_of, is_reached
from finetune.losses import Targets, sparse_divergence, summary, targets_of
from finetune.sequences import evaluating
from recipes.errors import DataError, RecipeError, RetortError
from recipes.schema_method import DistillLogits
from recipes.student import LOGITS

Row = dict[str, Any]


def build_logits(job: Job) -> Any:
    """TRL's SFTTrainer over prepared rows and the teacher's distributions of them in `run_dir/logits`.

    Raises:
        DataError: the cache is not finished, was changed, is of another kind than the recipe's, or lacks a row.
        RecipeError: options that this loss does not have. RetortError: a model whose logits are not known to it.
    """
    from trl import SFTConfig, SFTTrainer

    recipe = job.recipe
    assert isinstance(recipe.method, DistillLogits) and recipe.teacher is not None and recipe.teacher.logits is not None
    share, spec = recipe.method.cross_entropy, recipe.teacher.logits
    cache = CachedLogits(job.run_dir / LOGITS)
    for name in ("kind", "temperature"):
        made, asked = cache.about.get("logits", {}).get(name), getattr(spec, name)
        if made is not None and made != asked:
            raise DataError(f"made with {name} {made}, the recipe says {asked}", str(cache.folder), REMEDY)

    class Distilled(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Row, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            names = ("input_ids", "attention_mask", "labels", "targets")
            more = {"output_router_logits": True} if self.aux_loss_enabled else {}
            found = model(**{name: inputs[name] for name in names}, use_cache=False, **more)
            items = len(inputs["targets"]) if num_items_in_batch is None else num_items_in_batch
            loss = found["total"] / torch.as_tensor(items).clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # data parallelism averages
            if self.aux_loss_enabled:  # a mean over one micro-batch, as TRL adds it
                steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                loss = loss + self.router_aux_loss_coef * found["aux_loss"] / steps
            self._metrics["train" if self.model.training else "eval"]["sums"].append(found["sums"])
            return (loss, found) if return_outputs else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            training = self.model.training
            sums = self._metrics["train" if training else "eval"].pop("sums", [])
            if sums:
                total = self.accelerator.reduce(torch.stack(sums).double().sum(0), reduction="sum")
                logs.update({name if training else f"eval_{name}": value for name, value in summary(total).items()})
            super().log(logs, start_time)

    config = SFTConfig(
        **few_widths(job.layout) | common_arguments(job),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    if config.loss_type != "nll" or config.label_smoothing_factor:
        raise RecipeError("has no loss_type and no label smoothing", "train.extra", "method.cross_entropy mixes losses")
    data, collator = target_dataset(job, cache)
    collator.multiple = config.pad_to_multiple_of
    trainer = make_trainer(Distilled, job, config, data, data_collator=collator)
    trainer.model_accepts_loss_kwargs = True  # whatever the model does with them, this loss is over the whole step
    base = base_of(trainer.model)
    add_divergence(base, share, spec.temperature)
    check_head(trainer.model, job.rows[0]["input_ids"][:LOOK])
    collator.vocabulary = len(base.get_output_embeddings().weight)
    return trainer


def target_dataset(job: Job, cache: CachedLogits) -> tuple[Any, TargetCollator]:
    """Rows as `input_ids`, `labels` (-100 where nothing is trained) and their number, and what makes batches of them.

    Raises:
        DataError: the cache lacks a row, or has another number of positions of it.
    """
    import datasets

    keys, labels = [], []
    for row in job.rows:
        ids, places = row["input_ids"], scored_positions(row["loss_mask"])
        keys.append(row_key(ids, row["loss_mask"]))
        cache.require(keys[-1], len(places), row["_id"])
        label = [-100] * len(ids)
        for i in places:
            label[i] = ids[i]
        labels.append(label)
    columns = {"input_ids": [r["input_ids"] for r in job.rows], "labels": labels, "number": list(range(len(keys)))}
    return datasets.Dataset.from_dict(columns), TargetCollator(job.tokenizer.backend.pad_token_id, cache, keys)


@dataclass
class TargetCollator:
    """Rows -> a padded batch, tensors (batch, width), and `targets`: the teacher at its trained positions, in order.

    Attributes:
        keys: of the rows in the cache, by number.
        vocabulary: rows of the student's head; what the teacher says of ids beyond goes to its tail.
        multiple: the width is the longest row's, rounded up to a multiple of it.
    """

    pad_token_id: int
    cache: CachedLogits
    keys: Sequence[str]
    vocabulary: int | None = None
    multiple: int | None = None

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        width = width_of(max(len(row["input_ids"]) for row in rows), self.multiple)
        fills = [width - len(row["input_ids"]) for row in rows]
        sparse = join([self.cache[self.keys[row["number"]]] for row in rows])
        actual = [token for row in rows for token in row["labels"] if token != -100]
        return {
            "input_ids": torch.tensor(
                [[*r["input_ids"], *[self.pad_token_id] * f] for r, f in zip(rows, fills, strict=True)]
            ),
            "attention_mask": torch.tensor([[1] * (width - f) + [0] * f for f in fills]),
            "labels": torch.tensor([[*r["labels"], *[-100] * f] for r, f in zip(rows, fills, strict=True)]),
            "targets": targets_of(sparse, actual, self.vocabulary),
        }


def add_divergence(model: Any, share: float, temperature: float) -> None:
    """Teach a causal model's forward the keyword `targets`: with it, the loss is returned instead of logits.

    `model(input_ids, attention_mask, labels, targets)` returns `total` (the loss summed over positions), `sums` (see
    finetune.losses.summary) and, where router logits are asked for, `aux_loss`. Without it the forward is as it was.
    """
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    before = model.forward

    @functools.wraps(type(model).forward)  # generation checks its keywords against the signature
    def forward(self: Any, *args: Any, targets: Targets | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return before(*args, **kwargs)
        labels = kwargs.pop("labels")
        output = self.base_model(*args, **kwargs)
        states = output.last_hidden_state
        hidden = states[:, :-1][labels[:, 1:].to(states.device) != -100]
        layer = head_layer(self)
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):  # weights that DeepSpeed has spread over devices
            head = head_of(self)
            total, sums = sparse_divergence(
                hidden.to(head.weight.device), head, targets.to(head.weight.device), share, temperature, num_items=1
            )
        found = {"total": total, "sums": sums}
        if kwargs.get("output_router_logits"):
            found["aux_loss"] = _balance(self, output, kwargs.get("attention_mask"))
        return found

    model.forward = types.MethodType(forward, model)


def check_head(model: Any, ids: Sequence[int]) -> None:
    """Compare the logits that the loss makes of hidden states with those of the model, once.

    Raises:
        RetortError: they differ, so the loss would train another model.
    """
    base = base_of(model)
    head = head_of(base)
    if head.weight.numel() == 0:
        return  # DeepSpeed has spread it over devices, and gathers it in training only
    if not is_reached(base, head):
        raise RetortError("mode logits cannot reach the output head of this model", "model.base", "use mode: sequence")
    with evaluating(model), torch.no_grad():
        off = head_gap(model, head, ids)
    if not off < ALLOWED[head.weight.dtype == torch.float32]:
        raise RetortError(
            f"the model does more after its output head than mode logits knows (the logits differ by {off:.2g})",
            "model.base",
            "use mode: sequence",
        )


def _balance(model: Any, output: Any, mask: Any) -> torch.Tensor:
    """The load-balancing loss of a mixture of experts, as transformers' own forward computes it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss: torch.Tensor = load_balancing_loss_func(
        output.router_logits, model.num_experts, model.num_experts_per_tok, mask
    )
    return loss
