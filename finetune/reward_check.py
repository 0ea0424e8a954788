"""Before GRPO trains: the base answers a few prompts, its rewards are shown, and the engine for completions is chosen.

A group whose completions all get the same reward teaches nothing; where (almost) every group is so, the loss is 0 and
stays 0. That is found here, within a minute, and said.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.tokens import Tokenizer
from finetune.evals import end_tokens, until_end
from finetune.policy import Scored, cache_share, is_flat, sampling
from finetune.runs import say
from finetune.sequences import evaluating, kept_randomness, padded
from recipes.errors import EngineError, RetortError, out_of_memory
from recipes.lineage import write_atomic
from recipes.schema import Recipe
from recipes.schema_method import GRPO

FLAT = 0.95  # share of groups without a difference from which nothing can be learned: of 8 groups, all
FEW = 0.75  # share from which most of the work is lost: that is said
SHOWN = 4  # completions kept of each of the first groups


def check_rewards(
    recipe: Recipe, model: Any, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], engine: str
) -> dict[str, Any]:
    """Sample the model on some prompts and score what it says.

    Args:
        rows: prepared prompts.
        engine: `plain` or `continuous`; `auto` measures both on these prompts and takes the faster one. With vLLM,
            which starts with the trainer, plain generation stands in.

    Returns:
        `{engine, seconds: {engine: s}, groups, generations, zero_variance_groups, truncated_share, completion_length,
        rewards: {name: {weight, flat, mean, std, low, high, none, counts}}, samples}`; `flat` is the share of groups in
        which all completions get the same, of the sum it is `zero_variance_groups` too.
    """
    method = recipe.method
    assert isinstance(method, GRPO)
    lines = list(range(len(rows)))
    random.Random(f"{recipe.seed} rewards").shuffle(lines)
    lines = [line for line in lines[: method.sample_groups] for _ in range(method.generations)]
    prompts = [list(rows[line]["input_ids"]) for line in lines]
    seconds: dict[str, float] = {}
    completions: list[list[int]] = []
    with kept_randomness():
        torch.manual_seed(recipe.seed)
        for name in ENGINES if engine == "auto" else (engine if engine in ENGINES else "plain",):
            started = time.monotonic()
            made = ENGINES[name](model, tokenizer, prompts, method)
            if made is not None:
                seconds[name] = round(time.monotonic() - started, 3)
                completions = completions or made
    if not completions:
        raise EngineError(f"the engine {engine} writes no completions here", "method.engine", "set it to auto or plain")
    scored = Scored(recipe, tokenizer, rows)
    samples = scored.samples(lines, completions)
    columns = scored.columns(samples)
    sums = [scored.sum_of(row) for row in zip(*columns, strict=True)]
    weights = [term.options.weight for term in method.rewards]
    spreads = {
        name: {"weight": weight, "flat": _flat_share(values, method.generations), **_spread(values)}
        for name, weight, values in zip([*scored.names, "sum"], [*weights, None], [*columns, sums], strict=True)
    }
    ends = set(end_tokens(model, tokenizer))
    return {
        "engine": min(seconds, key=seconds.__getitem__) if engine == "auto" else engine,
        "seconds": seconds,
        "groups": len(sums) // method.generations,
        "generations": method.generations,
        "zero_variance_groups": spreads["sum"]["flat"],
        "truncated_share": sum(not ids or ids[-1] not in ends for ids in completions) / len(completions),
        "completion_length": sum(map(len, completions)) / len(completions),
        "rewards": spreads,
        "samples": [
            {
                "prompt": samples[i].prompt,
                "completions": [sample.completion for sample in samples[i : i + SHOWN]],
                "rewards": sums[i : i + SHOWN],
            }
            for i in range(0, min(len(lines), 4 * method.generations), method.generations)
        ],
    }


def _flat_share(values: Sequence[float | None], generations: int) -> float:
    groups = [values[i : i + generations] for i in range(0, len(values), generations)]
    return sum(map(is_flat, groups)) / len(groups)


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return {
        "mean": mean,
        "std": (sum((v - mean) ** 2 for v in known) / len(known)) ** 0.5 if known else 0.0,
        "low": min(known, default=0.0),
        "high": max(known, default=0.0),
        "none": len(values) - len(known),
        "counts": sorted(Counter(round(v, 2) for v in known).items()),
    }


def _generation(model: Any, tokenizer: Tokenizer, method: GRPO) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=method.max_new_tokens,
        do_sample=True,
        pad_token_id=tokenizer.backend.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        **sampling(method),
    )


def _plain(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], method: GRPO) -> list[list[int]]:
    """One batch after the other, each padded to its longest prompt, as many as train in one forward."""
    made: list[list[int]] = []
    config, ends = _generation(model, tokenizer, method), end_tokens(model, tokenizer)
    size = max(1, min(len(prompts), method.prompts_per_step * method.generations))
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(prompts), size):
            ids, mask = padded(prompts[start : start + size], tokenizer, model.device, left=True)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            made += [until_end(line, ends) for line in output[:, ids.shape[1] :].tolist()]
    return made


def _continuous(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], method: GRPO) -> list[list[int]] | None:
    """Transformers' continuous batching; None where it does not run on this model or device."""
    from transformers.generation import ContinuousBatchingConfig

    try:
        with evaluating(model), torch.no_grad():  # it works in a thread of its own, which inference mode does not reach
            outputs = model.generate_batch(
                prompts,
                generation_config=_generation(model, tokenizer, method),
                continuous_batching_config=ContinuousBatchingConfig(**cache_share(model.device.type)),
                progress_bar=False,
            )
        made = [list(output.generated_tokens) for output in outputs.values() if output.error is None]
        if len(made) != len(prompts) or not all(made):  # what fails in that thread is told there alone
            raise RuntimeError("it returned nothing for some prompts")
        return made
    except Exception as error:  # an attention or a cache that it has no kernel for
        if out_of_memory(error):
            torch.cuda.empty_cache()
        say(f"continuous batching does not run here ({' '.join(str(error).split())[:120]})")
        return None


ENGINES: dict[str, Any] = {"plain": _plain, "continuous": _continuous}


def describe(found: dict[str, Any]) -> list[str]:
    """The check as lines for a person."""
    lines = [
        f"rewards of the base, {found['groups']} prompts x {found['generations']} completions "
        f"(mean length {found['completion_length']:.0f}, {found['truncated_share']:.0%} cut):"
    ]
    width = max(len(name) for name in found["rewards"])
    for name, spread in found["rewards"].items():
        none = f", {spread['none']} without" if spread["none"] else ""
        lines.append(
            f"  {name.ljust(width)}  mean {spread['mean']:7.3f}  std {spread['std']:6.3f}  "
            f"{_bars(spread['counts'])}{none}; {spread['flat']:.0%} of groups flat"
        )
    flat = found["zero_variance_groups"]
    lines.append(f"  groups in which all completions get the same sum: {flat:.0%}")
    if FEW <= flat < FLAT:
        lines.append(f"  LOOK: only {1 - flat:.0%} of the groups teach anything; easier prompts would waste less")
    for name in _flat_ones(found):
        part = f"in {found['rewards'][name]['flat']:.0%} of the groups all completions get the same of it"
        lines.append(f"  LOOK: the reward {name} teaches nothing: {part}")
    times = ", ".join(f"{name} {s:.1f} s" for name, s in found["seconds"].items())
    lines.append(f"  completions by engine '{found['engine']}' ({times})")
    return lines


def _bars(counts: Sequence[Sequence[float]]) -> str:
    if len(counts) > 6:
        return f"{counts[0][0]:g} .. {counts[-1][0]:g} ({len(counts)} values)"
    return "  ".join(f"{value:g}: {int(number)}x" for value, number in counts)


def _flat_ones(found: dict[str, Any]) -> list[str]:
    """Rewards that count, and tell nothing apart in (almost) any group."""
    return [name for name, one in found["rewards"].items() if one["weight"] and one["flat"] >= FLAT]


def require_signal(found: dict[str, Any], place: str) -> None:
    """Raise where nothing could be learned, or nothing of what counts most.

    Raises:
        RetortError: (almost) no group holds two different sums of rewards, or two different values of any reward of
            the highest weight.
    """
    spread, flat = found["rewards"]["sum"], _flat_ones(found)
    highest = max(one["weight"] or 0.0 for one in found["rewards"].values())
    heaviest = [name for name, one in found["rewards"].items() if one["weight"] == highest]
    if found["zero_variance_groups"] < FLAT and not set(heaviest) <= set(flat):
        return
    if not spread["counts"]:
        raise RetortError(
            "no reward applies to any completion: the rows have nothing to compare with",
            place,
            "name the column with the wanted answer (column: answer)",
        )
    groups = found["groups"]
    if found["zero_variance_groups"] >= FLAT:
        alike = spread["high"] == spread["low"]
        what = (
            f"every completion gets the reward {spread['low']:g}" if alike else "in each group all get the same reward"
        )
        share, lost = found["zero_variance_groups"], "the loss would be 0"
    else:
        spread = found["rewards"][heaviest[0]]
        what = f"the reward of the highest weight, {heaviest[0]}, tells no two completions of a group apart"
        share, lost = spread["flat"], "only the lighter rewards would be learned"
    if spread["mean"] <= 0:
        remedy = (
            "the task is beyond this base: take easier prompts, start from an SFT run (model.run), or add a reward for "
            "the format of the same weight; or raise method.sample_groups, generations or temperature"
        )
    else:
        remedy = "the prompts are too easy, or the rewards do not tell answers apart: change one of them"
    unseen = 1 - 0.05 ** (1 / groups)  # the share that is missed in `groups` draws with a probability of 5%
    raise RetortError(
        f"{what} ({share * groups:.0f} of {groups} groups without a difference; up to {unseen:.0%} of the prompts may "
        f"have one all the same): {lost}",
        place,
        remedy,
    )


def load_check(path: Path) -> dict[str, Any] | None:
    """What an interrupted attempt found: a run that goes on keeps its engine."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def save_check(path: Path, found: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
