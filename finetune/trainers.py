"""Recipe -> trainer: one literal dict, one builder per method. The loops are TRL's; what goes into them is ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from finetune.arguments import Job, common_arguments, few_widths, make_trainer, width_of
from finetune.distilling import build_logits
from finetune.on_policy import build_on_policy
from finetune.policy import build_grpo
from finetune.preference import build_dpo, build_kto, build_orpo, build_reward
from recipes.schema import Recipe


def build_sft(job: Job) -> Any:
    """TRL's SFTTrainer over rows that are already tokens and labels."""
    from trl import SFTConfig, SFTTrainer

    recipe = job.recipe
    flash = recipe.model.attention.startswith("flash")
    config = SFTConfig(
        **few_widths(job.layout) | common_arguments(job),
        max_length=None,
        packing=recipe.train.packing and flash,  # then TRL's own collator flattens for the variable-length kernels
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    packed = PackedCollator(job.tokenizer.backend.pad_token_id, config.pad_to_multiple_of)
    collator = packed if recipe.train.packing and not flash else None
    data = token_dataset(job.rows, recipe)
    return make_trainer(SFTTrainer, job, config, data, data_collator=collator)


BUILDERS = {
    "sft": build_sft,
    "dpo": build_dpo,
    "kto": build_kto,
    "orpo": build_orpo,
    "reward": build_reward,
    "grpo": build_grpo,
    "logits": build_logits,
    "on_policy": build_on_policy,
}


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
    from trl import pack_dataset

    return pack_dataset(data, seq_len, "bfd", {"batch_size": None, "load_from_cache_file": False})


@dataclasses.dataclass
class PackedCollator:
    """Packs -> a batch in which the rows of a pack never see each other.

    There is no attention mask: transformers builds a block-diagonal causal mask from `position_ids`, which start at 0
    with every row. Padding is a block of its own with labels -100. Every tensor is (batch, width).
    """

    pad_token_id: int
    multiple: int | None = None

    def __call__(self, packs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = width_of(max(len(p["input_ids"]) for p in packs), self.multiple)
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
