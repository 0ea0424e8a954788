"""Trainers for preferences: DPO and its family, KTO, ORPO, reward models. The losses are TRL's, but for two terms of
DPO (`build_dpo`) and one of ORPO; the tokens are ours.

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

from finetune.arguments import Job, common_arguments, make_trainer, width_of
from finetune.layout import Layout
from finetune.reference import Weighed
from finetune.sequences import Sequence_
from recipes.errors import RecipeError
from recipes.schema import Recipe
from recipes.schema_method import DPO, KTO, ORPO, DPOLoss, RewardModel

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

    def _loss_and_logps(self: Any, model: Any, inputs: Row, return_outputs: bool) -> tuple[Any, torch.Tensor]:
        """TRL's loss, and the log-probabilities that it was made of: (rows, longest - 1), 0 where nothing counts."""
        seen: list[Any] = []

        def forward(**batch: Any) -> Any:
            seen.append(model(**batch))
            return seen[-1]

        loss = super()._compute_loss(forward, inputs, return_outputs)  # type: ignore[misc]
        return loss, seen[-1].log_probs[:, 1 - inputs["input_ids"].shape[1] :]

    def _log_per_token(self: Any, name: str, total: torch.Tensor, tokens: torch.Tensor) -> None:
        """A mean over tokens of all processes; nothing where there are none."""
        parts = torch.stack([total.detach().float(), tokens.to(total.device).float()])
        total, tokens = self.accelerator.reduce(parts, reduction="sum")
        if tokens > 0:
            self._metrics["train" if self.model.training else "eval"][name].append(float(total / tokens))


def build_dpo(job: Job) -> Any:
    """TRL's DPOTrainer over prepared pairs; without a reference a uniform one.

    Two terms are ours. `sft` is averaged over the tokens of the whole optimiser step, so that accumulation changes
    nothing. Label smoothing e of the logistic losses is that of cDPO (Mitchell 2023, "A note on DPO with noisy
    preferences", equation 3): -(1 - e) log s(z) - e log s(-z) = -log s(z) + e z, with z = beta x the margin; TRL reads
    it in other losses alone (trl 1.16, trainer/dpo_trainer.py, _compute_loss).

    Raises:
        RecipeError: a field in `train.extra` that changes TRL's losses, and would not change these terms.
    """
    from trl import DPOConfig, DPOTrainer

    method, rows = job.recipe.method, job.rows
    assert isinstance(method, DPO)
    theirs = {name: weight for name, weight in method.loss.items() if name != "sft"}
    imitation, beyond = method.loss.get("sft"), method.length_desensitised
    beta, share = method.beta, method.label_smoothing
    smoothed = {name: weight for name in LOGISTIC if share and (weight := method.loss.get(name))}
    for name, usual in {"use_weighting": False, "f_divergence_type": "reverse_kl"}.items():
        if job.recipe.train.extra.get(name, usual) != usual and ("sft" in method.loss or smoothed):
            part = "the loss sft" if "sft" in method.loss else "label_smoothing"
            raise RecipeError(f"{part} knows nothing of '{name}'", f"train.extra.{name}", "leave one of them out")

    class Prepared(Given, DPOTrainer):
        imitated = 0.0  # tokens of the chosen answers in one forward, on average over the step

        def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
            counts = [_answers_of(batch["completion_mask"])[0].sum() for batch in batch_samples]
            self.imitated = mean_per_forward(self.accelerator, counts, device)
            return None

        def _compute_loss(self, model: Any, inputs: Row, return_outputs: bool) -> Any:
            loss, logps = self._loss_and_logps(model, inputs, return_outputs)
            loss, *rest = loss if return_outputs else (loss,)
            (chosen, rejected), (good, bad) = logps.chunk(2), _answers_of(inputs["completion_mask"].to(logps.device))
            self._log_per_token("logps/chosen_per_token", chosen.sum(), good.sum())
            if imitation is not None:
                loss = loss - imitation * chosen.sum() / (self.imitated or good.sum())
            if smoothed:
                above = _weighed_sum(chosen, good, bad, beyond) - inputs["ref_chosen_logps"].to(chosen.device)
                below = _weighed_sum(rejected, bad, good, beyond) - inputs["ref_rejected_logps"].to(chosen.device)
                margins = {
                    "sigmoid": above - below,
                    "sigmoid_norm": above / good.sum(1).clamp(min=1) - below / bad.sum(1).clamp(min=1),
                }
                loss = loss + sum(weight * share * beta * margins[name].mean() for name, weight in smoothed.items())
            return (loss, *rest) if return_outputs else loss

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
    collator = PairCollator(job.tokenizer.backend.pad_token_id, config.pad_to_multiple_of)
    trainer = make_trainer(Prepared, job, config, data, data_collator=collator)
    trainer.loss_types, trainer.loss_weights = list(theirs), list(theirs.values())
    return trainer


LOGISTIC: tuple[DPOLoss, ...] = ("sigmoid", "sigmoid_norm")  # losses whose label smoothing is computed here


def _answers_of(completion_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Which positions predict a token that counts, of chosen and of rejected answers, each (pairs, longest - 1)."""
    return completion_mask[:, 1:].chunk(2)


def _weighed_sum(logps: torch.Tensor, mask: torch.Tensor, other: torch.Tensor, beyond: float | None) -> torch.Tensor:
    """Log-probabilities of answers, (pairs,): tokens beyond the length of the pair's other answer weigh `beyond`."""
    if beyond is None:
        return logps.sum(1)
    late = mask.cumsum(1) > torch.minimum(mask.sum(1), other.sum(1))[:, None]
    return (logps * torch.where(late, beyond, 1.0)).sum(1)


def mean_per_forward(accelerator: Any, counts: list[torch.Tensor], device: Any) -> float:
    """What a sum over one forward is divided by to make the mean over an optimiser step's tokens on all processes: from
    the counts of the forwards of this process."""
    total = accelerator.gather(torch.stack(counts).sum().to(device)).sum()
    return float(total) / len(counts) / accelerator.num_processes


@dataclass
class PairCollator:
    """Pairs -> one batch, chosen answers first; `completion_mask` is the prepared mask. Tensors (2 pairs, width)."""

    pad_token_id: int
    multiple: int | None = None

    def __call__(self, pairs: list[Row]) -> dict[str, torch.Tensor]:
        sides = [(pair[f"{side}_ids"], pair[f"{side}_mask"]) for side in ("chosen", "rejected") for pair in pairs]
        batch = _batch(sides, self.pad_token_id, self.multiple)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch


def _batch(
    sequences: Sequence[Sequence_], pad: int, multiple: int | None = None, prefix: str = ""
) -> dict[str, torch.Tensor]:
    width = width_of(max(len(ids) for ids, _ in sequences), multiple)
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
        def _compute_loss(self, model: Any, inputs: Row, return_outputs: bool) -> Any:
            loss, logps = self._loss_and_logps(model, inputs, return_outputs)
            good = torch.as_tensor(inputs["label"], dtype=torch.bool, device=logps.device)
            tokens = inputs["completion_mask"].to(logps.device)[:, 1:]
            self._log_per_token("logps/chosen_per_token", logps[good].sum(), tokens[good].sum())
            if both:  # TRL's KL is per answer
                answers = inputs["KL_completion_mask"].to(logps.device)
                kl = self._metrics["train" if self.model.training else "eval"]["kl"][-1]
                self._log_per_token("kl_per_token", kl * torch.tensor(float(len(answers))), answers.sum())
            return loss

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
    collator = AnswerCollator(job.tokenizer.backend.pad_token_id, config.pad_to_multiple_of)
    data = _dataset(columns)
    return make_trainer(Prepared, job, config, data, data_collator=collator)


@dataclass
class AnswerCollator:
    """Labelled answers, and mismatched ones where the KL term needs them. Tensors (rows, width)."""

    pad_token_id: int
    multiple: int | None = None

    def __call__(self, lines: list[Row]) -> dict[str, torch.Tensor]:
        batch = _batch([(line["ids"], line["mask"]) for line in lines], self.pad_token_id, self.multiple)
        names = ["ref_logps"]
        if "KL_ids" in lines[0]:
            batch |= _batch(
                [(line["KL_ids"], line["KL_mask"]) for line in lines], self.pad_token_id, self.multiple, "KL_"
            )
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
            self.imitated = mean_per_forward(self.accelerator, counts, device)
            return None

        def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
            logps, rejected, *rest = super().concatenated_forward(model, batch)
            counts = _imitated(batch, key).to(logps.device)
            self.store_metrics({"logps/chosen_per_token": logps.detach().mean()}, train_eval="train")
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
