"""GRPO: the numbers of plain TRL, whatever the layout and after any kill; rewards shown, engines measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import THINGS, run_cli, run_train, write_rows
from test_preference import TEMPLATE, settings
from test_resume import whole_and_killed
from training import built, logged, run_losses

from finetune import reward_check
from finetune.policy import Scored, check_policy, prompt_order, sample_of
from finetune.sample_rewards import sample_rewards
from recipes.errors import RetortError
from recipes.load import load_recipe

METHOD = {
    "type": "grpo",
    "rewards": [{"regex": {"pattern": "[aeiou]"}}, {"length": {"most": 8, "slack": 8, "weight": 0.5}}],
    "max_new_tokens": 8,
    "generations": 4,
    "prompts_per_step": 2,
    "sample_groups": 4,
    "show_every": 3,
}


def prompts(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{'The house is old. ' * (i % 3)}Where is the {THINGS[i % 10]}?", "answer": str(i)}
        for i in range(count)
    ]


@pytest.fixture
def make(make_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def recipe(method: dict[str, Any] | None = None, **train: Any) -> Path:
        (tmp_path / "template.jinja").write_text(TEMPLATE)
        source = {"path": str(write_rows(tmp_path / "prompts.jsonl", prompts()))}
        path = make_recipe(
            method={**METHOD, **(method or {})},
            data={"train": [source], "eval": {"fraction": 0.25}},
            train={
                "micro_batch": 8,
                "seq_len": 64,
                "max_steps": 10,
                "learning_rate": 5e-3,
                "device": "cpu",
                "warmup": 0.0,
                "schedule": "constant",
                **train,
            },
        )
        written = json.loads(path.read_text())
        written["model"]["chat_template"] = str(tmp_path / "template.jinja")
        path.write_text(json.dumps(written))
        return path

    return recipe


OTHERS = {"dr_grpo": "token", "bnpo": "token", "cispo": "token", "luspo": "sequence", "sapo": "token", "vespo": "token"}
STEPS = 4


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ({"loss": "dapo"}, {"loss_type": "dapo"}),
        ({"loss": "grpo", "beta": 0.05, "epsilon_high": 0.3}, {"loss_type": "grpo", "beta": 0.05, "epsilon_high": 0.3}),
        (
            {"loss": "grpo", "scale_rewards": "none", "importance_sampling": "sequence", "iterations": 2},
            {
                "loss_type": "grpo",
                "scale_rewards": "none",
                "importance_sampling_level": "sequence",
                "num_iterations": 2,
            },
        ),
        *(
            (
                {"loss": loss, "importance_sampling": level, "iterations": 2},
                {"loss_type": loss, "importance_sampling_level": level, "num_iterations": 2},
            )
            for loss, level in OTHERS.items()
        ),
    ],
    ids=["dapo", "grpo with KL", "GSPO, two updates on a batch", *OTHERS],
)
def test_grpo_equals_a_plain_trl_script(
    make: Callable[..., Path], tiny_model: Path, tmp_path: Path, method: Any, config: Any
) -> None:
    """A TRL script with the same prompts in the same order: it tokenises, samples, scores and trains by itself."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    ours = built(make(method, max_steps=STEPS))
    ours.trainer.train()
    wanted = STEPS // method.get("iterations", 1) * 2
    order = prompt_order(len(ours.rows), wanted, ours.recipe.seed)
    asked = [ours.rows[i]["messages"] for i in order]

    def vowels(completions: list[Any], **_: Any) -> list[float]:
        return [float(any(c in "aeiou" for c in done[0]["content"])) for done in completions]

    def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-len(ids) / 8 for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    theirs = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=GRPOConfig(
            **settings(tmp_path / "trl", max_steps=STEPS, **config),
            num_generations=4,
            max_completion_length=8,
            reward_weights=[1.0, 0.5],
            shuffle_dataset=False,
        ),
        reward_funcs=[vowels, short],
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in asked]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    theirs.train()
    assert len(logged(ours.trainer)) == STEPS
    for name in ("loss", "reward", "entropy", "completions/mean_length", *(["kl"] if "beta" in config else [])):
        assert logged(ours.trainer, name) == pytest.approx(logged(theirs, name), abs=1e-5), name
    assert len(set(logged(ours.trainer, "reward"))) > 1, "all rewards alike: nothing was compared"


def test_accumulation_changes_nothing(make: Callable[..., Path]) -> None:
    together = run_losses(make(max_steps=6))
    one_by_one = built(make(max_steps=6), "train.micro_batch=1")
    assert one_by_one.layout.gradient_accumulation == 8
    one_by_one.trainer.train()
    assert logged(one_by_one.trainer) == pytest.approx(together, abs=1e-5)


@pytest.mark.slow
def test_killed_at_three_points_gives_the_same_adapter_and_rewards(make: Callable[..., Path], tmp_path: Path) -> None:
    """Over several epochs of prompts and two updates on each batch, with dropout: every generator is restored."""
    # The engine is pinned: measured, another one may win in the second run, and draw other completions.
    path = make({"iterations": 2, "beta": 0.02, "engine": "plain"}, max_steps=24, save_every=5, micro_batch=4)
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps({**recipe, "adapter": {"r": 4, "dropout": 0.1}}))
    whole, run = whole_and_killed(path, tmp_path)  # save_every 5 became 6: checkpoints lie between two batches
    changing = {"seconds", "tokens_per_second", "memory_bytes"}
    logs = [
        [{k: v for k, v in json.loads(line).items() if k not in changing} for line in text.splitlines()]
        for text in ((folder / "metrics.jsonl").read_text() for folder in (whole, run))
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 24
    assert sum("reward/regex" in line for line in logs[0]) == 12  # every second step writes completions
    assert (whole / "completions.jsonl").read_text() == (run / "completions.jsonl").read_text()


def test_the_order_of_prompts_is_new_in_every_epoch_and_the_seeds_own() -> None:
    order = prompt_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4] and order[:5] != order[5:10]
    assert order == prompt_order(5, 12, seed=1) != prompt_order(5, 12, seed=2)


def test_rewards_are_shown_and_a_flat_reward_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make()
    shown = run_cli("rewards", str(path), cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "rewards of the base, 4 prompts x 4 completions" in shown.stdout
    assert "groups in which all completions get the same sum" in shown.stdout
    flat = run_train(path, "--set", "method.rewards=[regex: {pattern: zzzzz}]")
    assert flat.returncode == 1 and "every completion gets the reward 0" in flat.stderr
    assert "the task is beyond this base" in flat.stderr and flat.stderr.count("\n") == 1
    for rewards, message in (
        ("[regex: {pattern: .*}]", "too easy"),
        ("[exact]", "no reward applies to any completion"),
    ):
        with pytest.raises(RetortError, match=message):
            sample_rewards(load_recipe(path, [f"method.rewards={rewards}"]), show=0)


def found_with(**columns: tuple[float | None, list[float]]) -> dict[str, Any]:
    """What the check finds of 8 groups of 4 completions, from a weight and the first values of each reward; the others
    are like the last one."""
    spreads = {}
    for name, (weight, made) in columns.items():
        values = [*made, *made[-1:] * (32 - len(made))]
        spreads[name] = {"weight": weight, "flat": reward_check._flat_share(values, 4), **reward_check._spread(values)}
    more = {"groups": 8, "generations": 4, "completion_length": 5.0, "truncated_share": 0.0, "engine": "plain"}
    return {**more, "zero_variance_groups": spreads["sum"]["flat"], "rewards": spreads, "seconds": {"plain": 1.0}}


VARIES = [-0.1, -0.2] * 16


def test_a_reward_that_counts_most_and_tells_nothing_apart_is_refused() -> None:
    """Of 8 groups all must be flat; that leaves room for 31% of prompts that are not: 0.69 ** 8 = 0.05."""
    never = found_with(math=(1.0, [0.0]), length=(0.5, VARIES), sum=(None, VARIES))
    with pytest.raises(RetortError) as caught:
        reward_check.require_signal(never, "here")
    assert "the reward of the highest weight, math, tells no two completions of a group apart" in str(caught.value)
    assert "(8 of 8 groups without a difference; up to 31% of the prompts may" in str(caught.value)
    assert "only the lighter rewards would be learned" in str(caught.value) and "beyond this base" in str(caught.value)
    always = found_with(math=(1.0, [1.0]), length=(0.5, VARIES), sum=(None, VARIES))
    with pytest.raises(RetortError, match="too easy"):
        reward_check.require_signal(always, "here")
    flat = found_with(math=(1.0, [0.0]), length=(0.5, [0.0]), sum=(None, [0.0]))
    with pytest.raises(RetortError, match=r"every completion gets the reward 0 \(8 of 8 groups"):
        reward_check.require_signal(flat, "here")


def test_a_reward_that_tells_nothing_apart_beside_one_that_does_is_named() -> None:
    once = [1.0, 0.0, 0.0, 0.0, 0.0]
    for found, named in (
        (found_with(math=(1.0, [0.0]), think=(1.0, VARIES), sum=(None, VARIES)), ["math"]),
        (found_with(math=(1.0, VARIES), think=(0.3, [0.0]), seen=(0.0, [0.0]), sum=(None, VARIES)), ["think"]),
        (found_with(math=(1.0, once), sum=(None, once)), []),
    ):
        reward_check.require_signal(found, "here")
        lines = [line for line in reward_check.describe(found) if "teaches nothing" in line]
        assert [line.split()[3] for line in lines] == named
    lines = reward_check.describe(found_with(math=(1.0, once), sum=(None, once)))
    assert "  LOOK: only 12% of the groups teach anything; easier prompts would waste less" in lines


def test_what_the_check_counts_is_what_the_completions_earn(make: Callable[..., Path]) -> None:
    found = built(make())
    model, rows, tokenizer = found.trainer.model, found.rows, found.tokenizer
    check = reward_check.check_rewards(found.recipe, model, tokenizer, rows, "auto")
    assert set(check["seconds"]) == {"plain", "continuous"} and check["engine"] in check["seconds"]
    assert check["engine"] == min(check["seconds"], key=check["seconds"].get)
    assert check["groups"] == 4 and len(check["samples"]) == 4
    values = check["rewards"]
    assert sum(n for _, n in values["regex"]["counts"]) == 16 and -1 <= values["length"]["mean"] < 0
    assert values["sum"]["mean"] == pytest.approx(values["regex"]["mean"] + 0.5 * values["length"]["mean"])
    assert values["sum"]["flat"] == check["zero_variance_groups"]
    assert [values[name]["weight"] for name in ("regex", "length", "sum")] == [1.0, 0.5, None]
    again = reward_check.check_rewards(found.recipe, model, tokenizer, rows, "plain")
    assert again["samples"] == check["samples"], "the check has draws of its own, from the seed"


@pytest.mark.parametrize("engine", ["plain", "continuous"])
def test_either_engine_answers_the_prompt_that_it_was_given(make: Callable[..., Path], engine: str) -> None:
    """Greedy completions are what the model predicts after each prompt, none is swapped with another's."""
    import torch

    method = {"engine": engine, "prompts_per_step": 4, "generations": 2, "top_k": 1}
    found = built(make(method, max_steps=1, learning_rate=1e-9))
    seen: list[tuple[list[int], list[int]]] = []
    write = found.trainer._generate_single_turn

    def watching(prompt_ids: Any, *rest: Any) -> Any:
        made = write(prompt_ids, *rest)
        seen.extend(zip(prompt_ids, made[0], strict=True))
        return made

    found.trainer._generate_single_turn = watching
    found.trainer.train()
    assert len(seen) == 8 and len({tuple(completion) for _, completion in seen}) > 1
    for prompt, completion in seen:
        with torch.no_grad():
            best = found.trainer.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].argmax(-1)
        assert best[len(prompt) - 1 : -1].tolist() == list(completion)


def test_a_sample_is_what_the_rewards_are_promised(make: Callable[..., Path]) -> None:
    found = built(make())
    backend = found.tokenizer.backend
    row = found.rows[0]
    ids = backend("<think>so</think> 7", add_special_tokens=False)["input_ids"]
    sample = sample_of(row, [*ids, backend.eos_token_id], found.tokenizer)
    assert sample.completion == "<think>so</think> 7" and sample.finished and sample.tokens == len(ids) + 1
    assert sample.prompt == row["messages"][-1]["content"] and sample.reference is None
    assert sample.columns["answer"] == row["extra"]["answer"] and sample.columns["_id"] == row["_id"]
    assert not sample_of(row, ids, found.tokenizer).finished
    scored = Scored(found.recipe, found.tokenizer, found.rows)
    assert scored.sums([0], [ids]) == [pytest.approx(1 - 0.5 * len(ids) / 8 if len(ids) < 8 else 0.5)]


@pytest.mark.parametrize(
    ("method", "train", "message"),
    [
        ({"rewards": [{"function": {"path": "no.such:thing", "trust": "no.such:thing"}}]}, {}, "no.such"),
        ({"rewards": ["regexp"]}, {}, "there is no reward 'regexp'; did you mean regex?"),
        ({"rewards": [{"function": {"path": "os:getcwd"}}]}, {}, "own code runs only with consent"),
        ({}, {"micro_batch": 3}, "does not divide the 8 completions"),
        ({"max_new_tokens": 60}, {}, "leaves no room for a prompt"),
        ({"generations": 1}, {}, "greater than or equal to 2"),
        ({"vllm": {}}, {}, "set engine: vllm"),
        ({"engine": "vllm"}, {}, "the package vllm is not installed"),
        ({"epsilon_high": 0.3, "delta": 1.2}, {}, "delta must lie above"),
        ({"loss": "luspo"}, {}, "set importance_sampling: sequence"),
        ({"loss": "vespo", "importance_sampling": "sequence"}, {}, "the loss vespo makes sequence weights itself"),
        (
            {"loss": "dapo", "importance_sampling": "sequence"},
            {},
            "would weigh a sequence by its length: set loss: grpo",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    make: Callable[..., Path], method: Any, train: Any, message: str
) -> None:
    with pytest.raises(RetortError) as caught:
        path = make(method, **train)
        check_policy(load_recipe(path).method)
        built(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [{**METHOD, "engine": "vllm"}, {"type": "distill", "mode": "on_policy", "max_new_tokens": 8, "vllm": {}}],
    ids=["grpo", "on-policy"],
)
def test_vllm_is_not_handed_an_adapter_on_rounded_weights(make: Callable[..., Path], method: Any) -> None:
    path = make()
    recipe = json.loads(path.read_text())
    recipe["method"] = method
    recipe["teacher"] = {"model": "embedded:tiny"} if method["type"] == "distill" else None
    path.write_text(json.dumps(recipe))
    assert load_recipe(path).model.quantization == "none"
    with pytest.raises(RetortError, match="vLLM cannot take over an adapter on nf4"):
        load_recipe(path, ["model.quantization=nf4"])
