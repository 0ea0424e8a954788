"""Trainers for preferences: DPO and its family, KTO, ORPO, reward models. The losses are TRL's, the tokens ours.

TRL tokenises rows itself; ours are tokens with a proven mask, so the trainers are given them as they are. Reference
log-probabilities come from finetune/reference.py, computed before an adapter is attached: that is the model at its
start, whatever the adapter's initialisation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.arguments import Job, common_arguments, make_trainer
from finetune.layout import Layout
from finetune.reference import Weighed
from finetune.sequences import Sequence_
from recipes.errors import RecipeError
from recipes.schema import Recipe
from recipes.schema_method import DPO, KTO, ORPO, RewardModel

Row = dict[str, Any]


def chosen_of(row: Row) -> Sequence_:
    """The sequence with the chosen answer of a pair, the only one of any other row."""
    return row["input_ids"], row["loss_mask"]


def rejected_of(row: Row) -> Sequence_:
    return row["rejected_ids"], row["rejected_mask"]


def wanted_of(recipe: Recipe, layout: Layout, rows: Sequence[Row]) -> list[Weighed]:
    """The sequences whose reference log-probabilities a method needs, in the order in which it takes them up."""
    method = recipe.method
    if isinstance(method, DPO) and not method.reference_free:
        return [one for row in rows for one in _weighed(method, row)]
    if isinstance(method, KTO):
        lines = _kto_lines(recipe, layout, rows)
        sides = ("sequence", "kl") if method.loss == "kto" else ("sequence",)
        return [Weighed(line[side]) for line in lines for side in sides]
    return []


def _weighed(method: DPO, row: Row) -> tuple[Weighed, Weighed]:
    sides = chosen_of(row), rejected_of(row)
    if method.length_desensitised is None:
        return Weighed(sides[0]), Weighed(sides[1])
    shared = min(sum(mask) for _, mask in sides)
    return Weighed(sides[0], shared, method.length_desensitised), Weighed(sides[1], shared, method.length_desensitised)


class Given:
    """For trainers of TRL's whose rows are tokens already, and carry their reference log-probabilities."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset


def build_dpo(job: Job) -> Any:
    """TRL's DPOTrainer over prepared pairs; without a reference a uniform one."""
    from trl import DPOConfig, DPOTrainer

    method, rows = job.recipe.method, job.rows
    assert isinstance(method, DPO)

    class Prepared(Given, DPOTrainer):
        pass

    pairs = job.reference or [0.0] * (2 * len(rows))
    data = _dataset(
        {
            "chosen_ids": [row["input_ids"] for row in rows],
            "chosen_mask": [row["loss_mask"] for row in rows],
            "rejected_ids": [row["rejected_ids"] for row in rows],
            "rejected_mask": [row["rejected_mask"] for row in rows],
            "ref_chosen_logps": list(pairs[0::2]),
            "ref_rejected_logps": list(pairs[1::2]),
        }
    )
    config = DPOConfig(
        **common_arguments(job),
        max_length=None,
        loss_type=list(method.loss),
        loss_weights=list(method.loss.values()),
        beta=method.beta,
        label_smoothing=method.label_smoothing,
        ld_alpha=method.length_desensitised,
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
    )
    collator = PairCollator(job.tokenizer.backend.pad_token_id)
    return make_trainer(Prepared, job, config, data, data_collator=collator)


@dataclass
class PairCollator:
    """Pairs -> one batch, chosen answers first; `completion_mask` is the prepared mask. Tensors (2 pairs, longest)."""

    pad_token_id: int

    def __call__(self, pairs: list[Row]) -> dict[str, torch.Tensor]:
        sides = [(pair[f"{side}_ids"], pair[f"{side}_mask"]) for side in ("chosen", "rejected") for pair in pairs]
        batch = _batch(sides, self.pad_token_id)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch


def _batch(sequences: Sequence[Sequence_], pad: int, prefix: str = "") -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in sequences)
    rows = [(*parts, width - len(parts[0])) for parts in sequences]
    return {
        f"{prefix}input_ids": torch.tensor([[*ids, *[pad] * fill] for ids, _, fill in rows]),
        f"{prefix}attention_mask": torch.tensor([[1] * len(ids) + [0] * fill for ids, _, fill in rows]),
        f"{prefix}completion_mask": torch.tensor([[*map(int, mask), *[0] * fill] for _, mask, fill in rows]),
    }


def _dataset(columns: dict[str, list[Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_dict(columns)


def _kto_lines(recipe: Recipe, layout: Layout, rows: Sequence[Row]) -> list[Row]:
    """Rows in the order in which they are trained, each with a completion of another row of its batch.

    The KL term is estimated from prompts with completions that belong to other prompts of the same batch (section 4.1
    of the paper); batches are therefore fixed before training, and the order is drawn here, once.
    """
    if layout.micro_batch < 2 and recipe.method.type == "kto" and recipe.method.loss == "kto":
        raise RecipeError(
            "the KL term needs two rows or more in a forward",
            "train.micro_batch",
            "raise it, or set method.loss: apo_zero_unpaired",
        )
    order = list(range(len(rows)))
    random.Random(recipe.seed).shuffle(order)
    lines = [{"sequence": chosen_of(rows[i]), "label": rows[i]["label"]} for i in order]
    for start in range(0, len(lines), layout.micro_batch):
        batch = lines[start : start + layout.micro_batch]
        for line, before in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            line["kl"] = _mismatched(line["sequence"], before["sequence"])
    return lines


def _mismatched(prompt: Sequence_, answer: Sequence_) -> Sequence_:
    """The prompt of one sequence before the answer of another."""
    begins, starts = list(prompt[1]).index(True), list(answer[1]).index(True)
    ids = [*prompt[0][:begins], *answer[0][starts:]]
    return ids, [*[False] * begins, *answer[1][starts:]]


def build_kto(job: Job) -> Any:
    """TRL's KTOTrainer over prepared answers with labels."""
    from trl import KTOConfig, KTOTrainer

    method = job.recipe.method
    assert isinstance(method, KTO)

    class Prepared(Given, KTOTrainer):
        pass

    lines, both = _kto_lines(job.recipe, job.layout, job.rows), method.loss == "kto"
    columns = {
        "ids": [line["sequence"][0] for line in lines],
        "mask": [line["sequence"][1] for line in lines],
        "label": [line["label"] for line in lines],
        "ref_logps": list(job.reference[0 :: 2 if both else 1]),
    }
    if both:
        columns |= {
            "KL_ids": [line["kl"][0] for line in lines],
            "KL_mask": [line["kl"][1] for line in lines],
            "ref_KL_logps": list(job.reference[1::2]),
        }
    config = KTOConfig(
        **common_arguments(job),
        max_length=None,
        loss_type=method.loss,
        beta=method.beta,
        desirable_weight=method.desirable_weight,
        undesirable_weight=method.undesirable_weight,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",  # the batches are fixed; their order was drawn
        remove_unused_columns=False,
    )
    collator = AnswerCollator(job.tokenizer.backend.pad_token_id)
    data = _dataset(columns)
    return make_trainer(Prepared, job, config, data, data_collator=collator)


@dataclass
class AnswerCollator:
    """Labelled answers, and mismatched ones where the KL term needs them. Tensors (rows, longest)."""

    pad_token_id: int

    def __call__(self, lines: list[Row]) -> dict[str, torch.Tensor]:
        batch = _batch([(line["ids"], line["mask"]) for line in lines], self.pad_token_id)
        names = ["ref_logps"]
        if "KL_ids" in lines[0]:
            batch |= _batch([(line["KL_ids"], line["KL_mask"]) for line in lines], self.pad_token_id, "KL_")
            names.append("ref_KL_logps")
        return batch | {name: torch.tensor([line[name] for line in lines]) for name in (*names, "label")}


def build_orpo(job: Job) -> Any:
    """TRL's ORPOTrainer over prepared pairs, with the imitation term on the chosen answer's tokens alone by default.

    The term is averaged over the tokens of the whole optimiser step, so that accumulation changes nothing.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    method = job.recipe.method
    assert isinstance(method, ORPO)
    everything = method.imitate == "all"
    key = "chosen_attention_mask" if everything else "chosen_labels"

    class Prepared(ORPOTrainer):
        imitated = 0.0  # tokens of the imitation term in one forward, on average over the step

        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            return {}  # the columns are there

        def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
            counts = [_imitated(batch, key).sum() for batch in batch_samples]
            total = self.accelerator.gather(torch.stack(counts).sum().to(device)).sum()
            self.imitated = float(total) / len(batch_samples) / self.accelerator.num_processes
            return None

        def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
            logps, rejected, *rest = super().concatenated_forward(model, batch)
            counts = _imitated(batch, key).to(logps.device)
            total = rest[2] * counts.sum() if everything else -(logps * counts).sum()
            rest[2] = total / (self.imitated or counts.sum())
            return (logps, rejected, *rest)

    config = ORPOConfig(
        **common_arguments(job),
        max_length=job.recipe.train.seq_len,
        beta=method.beta,
        remove_unused_columns=False,
    )
    columns: dict[str, list[Any]] = {}
    for side, of in (("chosen", chosen_of), ("rejected", rejected_of)):
        both = [of(row) for row in job.rows]
        columns[f"{side}_input_ids"] = [ids for ids, _ in both]
        columns[f"{side}_attention_mask"] = [[1] * len(ids) for ids, _ in both]
        columns[f"{side}_labels"] = [
            [t if m and i else -100 for i, (t, m) in enumerate(zip(ids, mask, strict=True))] for ids, mask in both
        ]
    return make_trainer(Prepared, job, config, _dataset(columns))


def _imitated(batch: dict[str, Any], key: str) -> torch.Tensor:
    """Tokens of the imitation term per row of a batch, (rows,)."""
    marked = batch[key][:, 1:]
    return (marked != -100).sum(-1) if key == "chosen_labels" else marked.sum(-1)


def build_reward(job: Job) -> Any:
    """TRL's RewardTrainer over prepared pairs; `model` has one output, the score at the last token."""
    from trl import RewardConfig, RewardTrainer

    method = job.recipe.method
    assert isinstance(method, RewardModel)
    config = RewardConfig(
        **common_arguments(job),
        max_length=None,
        center_rewards_coefficient=method.center,
    )
    sides = {"chosen_ids": "input_ids", "rejected_ids": "rejected_ids"}
    columns = {name: [row[ids] for row in job.rows] for name, ids in sides.items()}
    return make_trainer(RewardTrainer, job, config, _dataset(columns))
