"""GRPO: TRL's trainer over prepared prompts, scored by the recipe's rewards.

The order of the prompts over all epochs is drawn here, from the seed: TRL's own sampler keeps its generator in memory,
so a resumed run would go on in another order (trl 1.16, trainer/utils.py, RepeatSampler).
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_prep.completions import completion_text, end_ids
from data_prep.rows import before_answer
from data_prep.tokens import Tokenizer
from finetune import rewards
from finetune.arguments import Job, common_arguments, make_trainer, steps_of
from finetune.layout import Layout
from recipes.errors import EngineError
from recipes.schema import Recipe
from recipes.schema_method import GRPO, VLLM

Row = dict[str, Any]


def build_grpo(job: Job) -> Any:
    """TRL's GRPOTrainer over prepared prompts.

    The rows' other columns and last answers are what the rewards compare with; the layout says who writes completions.
    """
    from trl import GRPOConfig, GRPOTrainer

    recipe, layout, rows = job.recipe, job.layout, job.rows
    method = recipe.method
    assert isinstance(method, GRPO)
    data = numbered_prompts(len(rows), layout.steps // method.iterations * method.prompts_per_step, recipe.seed)
    common = common_arguments(job)
    # A checkpoint between two updates on the same completions could not be resumed: they are in memory alone.
    save = steps_of(recipe.train.save_every, layout.steps)
    common["save_steps"] = -(-save // method.iterations) * method.iterations
    config = GRPOConfig(
        **common,
        loss_type=method.loss,
        beta=method.beta,
        epsilon=method.epsilon,
        epsilon_high=method.epsilon_high,
        delta=method.delta,
        importance_sampling_level=method.importance_sampling,
        scale_rewards=method.scale_rewards,
        mask_truncated_completions=method.mask_truncated,
        num_generations=method.generations,
        num_iterations=method.iterations,
        max_completion_length=method.max_new_tokens,
        steps_per_generation=layout.gradient_accumulation,
        shuffle_dataset=False,
        reward_weights=[term.options.weight for term in method.rewards],
        **sampling(method),
        **_engine(method, layout),
    )
    scored = Scored(recipe, job.tokenizer, rows)
    return make_trainer(of_prepared(GRPOTrainer, rows), job, config, data, reward_funcs=scored.functions())


def of_prepared(kind: Any, rows: Sequence[Row]) -> Any:
    """A trainer of TRL's whose model answers while it trains, made to ask the prepared token ids: its prompts are the
    rows' numbers, as text."""
    ids = {str(i): list(row["input_ids"]) for i, row in enumerate(rows)}

    class Prepared(kind):
        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [ids[prompt] for prompt in prompts], None, {}

    return Prepared


def numbered_prompts(rows: int, wanted: int, seed: int) -> Any:
    """A dataset of row numbers, as text, in the order in which their prompts are answered."""
    import datasets

    return datasets.Dataset.from_dict({"prompt": [str(i) for i in prompt_order(rows, wanted, seed)]})


def check_policy(method: GRPO) -> None:
    """Find out what is wrong with rewards and engine before anything is loaded.

    Raises:
        RecipeError: a reward names something that is not there. EngineError: this machine lacks what one needs.
    """
    if method.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EngineError("the package vllm is not installed", "method.engine", "pip install vllm, or set engine: auto")
    rewards.check(method.rewards)


def sampling(method: GRPO) -> dict[str, Any]:
    """How completions are drawn, in the names that TRL and transformers share."""
    return {
        "temperature": method.temperature,
        "top_p": method.top_p,
        "top_k": method.top_k,
        "min_p": method.min_p,
    }


def _engine(method: GRPO, layout: Layout) -> dict[str, Any]:
    if layout.engine == "continuous":
        return {
            "use_transformers_continuous_batching": True,
            "transformers_continuous_batching_config": cache_share(layout.device),
        }
    if layout.engine != "vllm":
        return {}
    return vllm_arguments(method.vllm or VLLM())


def vllm_arguments(vllm: VLLM) -> dict[str, Any]:
    """How vLLM runs, in the names that TRL's configs share."""
    found: dict[str, Any] = {"use_vllm": True, "vllm_mode": vllm.mode}
    if vllm.mode == "server":
        return found | {"vllm_server_base_url": vllm.url}
    return found | {
        "vllm_gpu_memory_utilization": vllm.memory,
        "vllm_enable_sleep_mode": vllm.sleep,
        "vllm_tensor_parallel_size": vllm.tensor_parallel,
    }


def cache_share(device: str) -> dict[str, float]:
    """Share of a device's memory for the cache of continuous batching: the weights are trained on it too."""
    return {"max_memory_percent": 0.5 if device == "cuda" else 0.1}


def prompt_order(rows: int, wanted: int, seed: int) -> list[int]:
    """`wanted` row numbers: every epoch a new order of all rows."""
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        part = list(range(rows))
        random.Random(f"{seed} {epoch}").shuffle(part)
        order += part
        epoch += 1
    return order[:wanted]


class Scored:
    """The rewards of a recipe over prepared prompts: columns of values for us, functions for TRL, one per term."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row]) -> None:
        assert isinstance(recipe.method, GRPO)
        self.terms = recipe.method.rewards
        self.tokenizer, self.rows = tokenizer, rows
        self.names = names_of(recipe.method)
        places = [f"method.rewards[{i}].{term.name}" for i, term in enumerate(self.terms)]
        self.scores = [rewards.build(term, place) for term, place in zip(self.terms, places, strict=True)]
        if any(term.name == "code" for term in self.terms):
            asked = self.samples(range(len(rows)), [()] * len(rows))
            for term in self.terms:
                rewards.check_rows(term, asked)
        self._samples: list[rewards.Sample] = []
        self._found: list[list[float | None]] = []

    def samples(self, lines: Sequence[int], completions: Sequence[Sequence[int]]) -> list[rewards.Sample]:
        """What the rewards look at, for completions (token ids) of rows."""
        return [sample_of(self.rows[i], ids, self.tokenizer) for i, ids in zip(lines, completions, strict=True)]

    def columns(self, samples: Sequence[rewards.Sample]) -> list[list[float | None]]:
        """The values of every reward, one list per term."""
        return [score(samples) for score in self.scores]

    def sums(self, lines: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float | None]:
        """The weighted sums of the rewards."""
        columns = self.columns(self.samples(lines, completions))
        return [self.sum_of(values) for values in zip(*columns, strict=True)]

    def sum_of(self, values: Sequence[float | None]) -> float | None:
        """The weighted sum of one completion's rewards; None where no reward applies."""
        known = [term.options.weight * v for term, v in zip(self.terms, values, strict=True) if v is not None]
        return sum(known) if known else None

    def functions(self) -> list[Callable[..., list[float | None]]]:
        """The rewards as TRL calls them: one after the other, about the same completions."""
        return [self._function(i, *named) for i, named in enumerate(zip(self.names, self.scores, strict=True))]

    def _function(self, place: int, name: str, score: rewards.Score) -> Callable[..., list[float | None]]:
        def scored(
            prompts: list[str], completion_ids: list[list[int]], log_extra: Any, log_metric: Any, **_: Any
        ) -> list[float | None]:
            if place == 0:
                self._samples, self._found = self.samples([int(p) for p in prompts], completion_ids), []
                # TRL's own texts lack tags of reasoning that are special tokens.
                log_extra("text", [sample.completion for sample in self._samples])
            values = score(self._samples)
            self._found.append(values)
            if len(self._found) == len(self.terms):
                log_metric("zero_variance_groups", self._flat_share(prompts))
            return values

        scored.__name__ = name
        return scored

    def _flat_share(self, prompts: Sequence[str]) -> float:
        """Share of groups whose completions all get the same sum. TRL's own count misses sums that are equal but for
        rounding (trl 1.16: isclose to 0 within 1e-8)."""
        groups: dict[str, list[float | None]] = {}
        for prompt, *values in zip(prompts, *self._found, strict=True):
            groups.setdefault(prompt, []).append(self.sum_of(values))
        return sum(map(is_flat, groups.values())) / len(groups)


def is_flat(sums: Sequence[float | None]) -> bool:
    """Whether a group's sums of rewards are all the same: it teaches nothing."""
    return len({round(value, 6) for value in sums if value is not None}) < 2


def names_of(method: GRPO) -> list[str]:
    """The rewards' names; own functions by the function's name, with a number from the second of a name on."""
    names: list[str] = []
    for term in method.rewards:
        name = term.options.path.rpartition(":")[2] if term.name == "function" else term.name
        same = sum(other.partition("#")[0] == name for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def longest_completions(rows: Sequence[Row], method: GRPO, count: int, pad: int) -> dict[str, torch.Tensor]:
    """A batch as TRL's loss takes it: the longest prompts, completions of full length. Tensors (count, longest)."""
    longest = sorted((list(row["input_ids"]) for row in rows), key=len, reverse=True)[:count]
    longest += [longest[-1]] * (count - len(longest))
    width = len(longest[0])
    completions = [(ids * (1 + method.max_new_tokens // len(ids)))[: method.max_new_tokens] for ids in longest]
    batch = {
        "prompt_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in longest]),
        "prompt_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in longest]),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.ones(count, method.max_new_tokens, dtype=torch.long),
        "advantages": torch.tensor([1.0 - 2.0 * (i % 2) for i in range(count)]),
        "num_items_in_batch": torch.tensor(count * method.max_new_tokens),
    }
    if method.beta:
        batch["ref_per_token_logps"] = torch.full((count, method.max_new_tokens), -1.0)
    return batch


def sample_of(row: Row, completion: Sequence[int], tokenizer: Tokenizer) -> rewards.Sample:
    """A completion of a prepared prompt as the rewards see it: without special tokens, but with the thinking's tags."""
    backend = tokenizer.backend
    messages = before_answer(row["messages"])
    ends = {backend.eos_token_id, backend.pad_token_id}
    ids = list(completion)
    finished = bool(ids) and (ids[-1] in ends or ids[-1] in end_ids(backend))
    answered = row["messages"][-1]
    return rewards.Sample(
        prompt=next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), ""),
        messages=messages,
        completion=completion_text(ids, backend, row["input_ids"]),
        reference=str(answered["content"]) if answered["role"] == "assistant" else None,
        columns={**(row["extra"] or {}), "_id": row["_id"]},
        tokens=len(ids),
        finished=finished,
    )
