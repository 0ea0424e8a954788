"""`retort rewards RECIPE`: what the base earns under the rewards of a recipe, before anything is trained."""

from __future__ import annotations

from data_prep.assemble import read_rows
from data_prep.prepare import prepare
from finetune import reward_check, stages
from finetune.layout import find_device
from finetune.policy import check_policy
from finetune.runs import STATE, say
from recipes.errors import RecipeError
from recipes.gate import check
from recipes.schema import Recipe


def sample_rewards(recipe: Recipe, show: int) -> None:
    """Sample the base, print the distribution of its rewards and some completions.

    Args:
        show: prompts whose completions are printed.

    Raises:
        RecipeError: the method has no rewards, or they cannot be built.
        RetortError: no group of completions holds two different rewards.
    """
    if recipe.method.type != "grpo":
        raise RecipeError(f"method {recipe.method.type} has no rewards", "method", "rewards belong to method grpo")
    check_policy(recipe.method)
    check(recipe).require()
    folder = recipe.run_dir
    prepared = prepare(recipe, folder, keep=(folder / STATE).is_file())
    rows = read_rows(prepared.folder, "train")
    model = stages.load(recipe, prepared.tokenizer, find_device(recipe.train.device))
    found = reward_check.check_rewards(recipe, model, prepared.tokenizer, rows, recipe.method.engine)
    for sample in found["samples"][:show]:
        say("", f"prompt: {sample['prompt']}")
        for text, reward in zip(sample["completions"], sample["rewards"], strict=True):
            say(f"  {'none' if reward is None else format(reward, '.3f'):>7}  {text!r}")
    say("", *reward_check.describe(found))
    reward_check.require_signal(found, "method.rewards")
