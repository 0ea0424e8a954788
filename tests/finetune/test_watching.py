"""What watches over a run: guards that stop it, the best weights kept, an early end, and a DPO run after kills."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import colour_rows, run_train, write_rows
from pydantic import TypeAdapter
from safetensors.torch import load_file
from test_preference import pairs
from test_resume import last_step, whole_and_killed

from data_prep.held_out import choose_rows
from finetune.callbacks import Seal, checkpoints, newest_complete
from finetune.guards import FIRST, Finite, Guarding, describe
from recipes.errors import DataError, RetortError
from recipes.load import load_recipe
from recipes.schema import Guards
from recipes.schema_method import DPO, Method

STEADY = {"loss": 0.5, "reward": 0.4, "kl": 0.01, "entropy": 1.0, "completions/mean_length": 50.0}


def watch(lines: list[dict[str, float]], **guards: Any) -> tuple[Guarding, Any]:
    guarding = Guarding(Guards(window=3, **guards))
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    for line in lines:
        guarding.on_log(None, None, control, logs=line)
    return guarding, control


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"kl": 11.0}, "the KL to the starting model is 11 nats"),
        (
            {"completions/mean_length": 210.0, "completions/clipped_ratio": 0.6},
            "grew from 50 to 210 tokens and 60% are cut",
        ),
        ({"entropy": 0.019}, "the entropy fell from 1 to 0.019"),
        ({"logps/chosen_per_token": -3.1}, "fell from -1.00 to -3.10 nats per token"),
    ],
    ids=["KL", "length", "entropy", "chosen answers"],
)
def test_a_guard_stops_what_lasts_and_lets_a_spike_pass(bad: dict[str, float], words: str) -> None:
    start = [{**STEADY, "logps/chosen_per_token": -1.0}] * FIRST
    spike, control = watch([*start, {**start[0], **bad}, {**start[0], **bad}, start[0], {**start[0], **bad}])
    assert spike.found is None and not control.should_training_stop
    caught, control = watch([*start, *[{**start[0], **bad}] * 3])
    assert caught.found is not None and words in caught.found
    assert control.should_training_stop and control.should_save
    with pytest.raises(RetortError, match="stopped by a guard"):
        caught.require(Path("run"))
    off, control = watch([*start, *[{**start[0], **bad}] * 3], kl=None, length=None, entropy=None, chosen_falls=None)
    assert off.found is None and not control.should_training_stop


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"completions/mean_length": 210.0, "completions/clipped_ratio": 0.6}, "grew from 50 to 210 tokens"),
        ({"entropy": 0.019}, "the entropy fell from 1 to 0.019"),
        ({"kl": 11.0}, "is 11 nats"),
    ],
    ids=["length", "entropy", "KL"],
)
def test_lines_without_the_quantity_are_no_sign_of_health(bad: dict[str, float], words: str) -> None:
    """With `iterations: 2` every second line lacks what concerns the completions: they are the same as before."""
    other = {"loss": 0.5, "entropy": 1.0, "kl": 0.01}
    worse = {name: bad.get(name, value) for name, value in other.items()}
    caught, control = watch([*[STEADY, other] * FIRST, *[{**STEADY, **bad}, worse] * 3])
    assert caught.found is not None and words in caught.found and control.should_training_stop
    assert watch([*[STEADY, other] * FIRST, *[STEADY, other] * 10])[0].found is None


def test_an_answers_whole_kl_and_log_probability_are_not_judged() -> None:
    line = {"loss": 0.5, "kl": 0.5, "kl_per_token": 0.01, "logps/chosen": -20.0, "logps/chosen_per_token": -1.0}
    assert watch([*[line] * FIRST, *[{**line, "kl": 40.0, "logps/chosen": -400.0}] * 9])[0].found is None
    found = watch([*[line] * FIRST, *[{**line, "kl": 400.0, "kl_per_token": 11.0}] * 3])[0].found
    assert found is not None and "is 11 nats per token" in found


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (
            {"type": "grpo", "rewards": ["exact"]},
            "guards: length, entropy; kl is not on: without method.beta no KL to the start is computed",
        ),
        ({"type": "grpo", "rewards": ["exact"], "beta": 0.1}, "guards: kl, length, entropy"),
        ({"type": "kto"}, "guards: kl, chosen_falls"),
        ({"type": "dpo"}, "guards: chosen_falls"),
        ({"type": "sft"}, None),
    ],
    ids=["grpo", "grpo with KL", "kto", "dpo", "sft"],
)
def test_it_is_said_which_guards_watch(method: dict[str, Any], line: str | None) -> None:
    made: Any = TypeAdapter(Method).validate_python(method)
    assert describe(Guards(), made) == ([] if line is None else [line])
    assert describe(Guards(chosen_falls=None), DPO(type="dpo")) == ["guards: none"]


class Tiny(torch.nn.Module):
    """Twelve weights, and a loss that is no number from the step `broken` on."""

    def __init__(self, broken: float, how: str) -> None:
        super().__init__()
        self.layer, self.step = torch.nn.Linear(3, 4), 0
        self.broken, self.how = broken, how

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        self.step += 1
        loss = self.layer(x).square().mean()
        if self.step >= self.broken:
            loss = loss * float("nan") if self.how == "gradient" else loss + float("inf")
        return {"loss": loss}


@pytest.mark.parametrize(
    ("broken", "how", "message", "kept"),
    [
        (4, "gradient", "a gradient of step 4 is no number", "checkpoint-4"),
        (4, "loss", "the loss is inf at step 4", "checkpoint-4"),
        (1, "gradient", "a gradient of step 1 is no number", None),
    ],
)
def test_what_is_no_number_ends_a_run_with_its_last_weights(
    tmp_path: Path, broken: int, how: str, message: str, kept: str | None
) -> None:
    from transformers import Trainer, TrainingArguments

    folder = tmp_path / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=6, logging_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, logging_nan_inf_filter=False, learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"x": torch.tensor([float(i), 1.0, 2.0])} for i in range(64)]
    finite, model = Finite(tmp_path), Tiny(broken, how)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[finite, Seal(2)])  # type: ignore[arg-type]
    with pytest.raises(RetortError) as caught:
        trainer.train()
        finite.require()
    assert message in str(caught.value) and "lower train.learning_rate" in str(caught.value)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if kept is None:
        assert "there is no checkpoint yet" in str(caught.value) and checkpoints(folder) == []
        return
    assert f"{kept} holds the last weights that are numbers" in str(caught.value)
    saved = load_file(newest_complete(folder)[0] / "model.safetensors")  # type: ignore[operator]
    assert [path.name for path in checkpoints(folder)] == [kept]
    assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """Where gradients are out of sight (DeepSpeed's), the log tells, after the step; float16's scaler is left alone."""
    finite, model = Finite(tmp_path), torch.nn.Linear(2, 2)
    for fp16, norm, stopped in ((True, math.inf, False), (False, math.inf, True)):
        model.weight.data.fill_(math.nan)
        control = SimpleNamespace(should_training_stop=False, should_save=True)
        arguments, state = SimpleNamespace(fp16=fp16, world_size=1), SimpleNamespace(global_step=7)
        finite.on_log(arguments, state, control, logs={"loss": 0.5, "grad_norm": norm}, model=model)
        assert control.should_training_stop is stopped and control.should_save is not stopped
    with pytest.raises(RetortError, match=r"the grad norm is inf at step 7.*there is no checkpoint yet"):
        finite.require()


def test_a_run_that_goes_on_is_compared_with_the_start_of_the_whole_run() -> None:
    start, bad = [STEADY] * FIRST, {**STEADY, "entropy": 0.019}
    resumed = Guarding(Guards(window=3))
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    # The checkpoint's history holds the start and two of the three lines that the guard waits for.
    resumed.on_train_begin(None, SimpleNamespace(log_history=[*start, bad, bad]), control)
    assert resumed.found is None
    resumed.on_log(None, None, control, logs=bad)
    assert resumed.found is not None and control.should_training_stop


def test_long_completions_that_end_by_themselves_are_no_explosion() -> None:
    long = {**STEADY, "completions/mean_length": 500.0, "completions/clipped_ratio": 0.1}
    assert watch([*[STEADY] * FIRST, *[long] * 5])[0].found is None


def test_a_supervised_run_has_no_entropy_to_guard() -> None:
    line = {"loss": 0.5, "entropy": 1.0}
    assert watch([*[line] * FIRST, *[{"loss": 0.1, "entropy": 0.001}] * 5])[0].found is None


@pytest.mark.slow
def test_a_run_whose_chosen_answers_sink_ends_with_a_checkpoint_and_a_diagnosis(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    source = {"path": str(write_rows(tmp_path / "pairs.jsonl", pairs()))}
    guards = {"chosen_falls": 0.1, "window": 1}
    layout = {"tokens_per_step": 900, "seq_len": 128, "max_steps": 40, "learning_rate": 5e-2, "device": "cpu"}
    method = {"type": "dpo", "loss": "apo_down", "beta": 1.0}  # it lowers both answers
    path = make_recipe(method=method, data={"train": [source]}, train={**layout, "guards": guards})
    done = run_train(path)
    assert done.returncode == 1 and "stopped by a guard: the chosen answers' log-probability fell" in done.stderr
    assert "raise method.beta" in done.stderr and done.stderr.count("\n") == 1
    step = last_step(tmp_path / "run")
    assert FIRST < step < 40
    sealed = json.loads((tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "retort.json").read_text())
    assert sealed["step"] == step and not (tmp_path / "run" / "manifest.json").exists()


def rows_of(groups: dict[str, int]) -> list[dict[str, Any]]:
    return [{"_group": g, "_id": f"{g}{i}", "label": None} for g, count in groups.items() for i in range(count)]


def test_weights_are_selected_by_other_rows_than_they_are_measured_on(make_recipe: Callable[..., Path]) -> None:
    path = make_recipe()
    rows = rows_of({f"g{i}": 1 + i % 3 for i in range(30)})
    plain = load_recipe(path, ["eval.samples=null"])
    measured, watched = choose_rows(rows, plain)
    assert measured == rows == watched, "nothing is selected: all rows are measured, and watched"
    best = load_recipe(path, ["eval.samples=null", "train.eval_every=0.2", "train.best={metric: loss}"])
    measured, watched = choose_rows(rows, best)
    groups = [{row["_group"] for row in part} for part in (measured, watched)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 30
    assert len(rows) * 0.7 < len(measured) < len(rows) * 0.8
    few = load_recipe(path, ["eval.samples=10", "train.eval_every=0.2", "train.best={metric: loss}"])
    measured, watched = choose_rows(rows, few)
    assert len(measured) <= 10 and len(watched) == 10
    with pytest.raises(DataError, match="none are left to select by"):
        choose_rows(rows_of({"one": 9}), few)
    bad = [{**row, "label": False} for row in rows]
    assert choose_rows(bad, plain)[0] == []


@pytest.mark.slow
def test_the_best_weights_are_kept_and_the_run_ends_early(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {**row, "messages": [row["messages"][0], {"role": "assistant", "content": f"{i * 7 % 64}"}]}
        for i, row in enumerate(colour_rows())
    ]  # nothing to learn but by heart: the held-out loss soon rises
    source = {"path": str(write_rows(tmp_path / "random.jsonl", rows))}
    layout = {"tokens_per_step": 1024, "seq_len": 128, "max_steps": 80, "learning_rate": 5e-2, "device": "cpu"}
    best = {"metric": "loss", "patience": 3}
    path = make_recipe(
        data={"train": [source], "eval": {"fraction": 0.4, "near": None}},
        train={**layout, "eval_every": 4, "best": best},
    )
    done = run_train(path)
    assert done.returncode == 0, done.stderr
    watched = [json.loads(line) for line in (tmp_path / "run" / "watched.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in watched]
    kept = [line["step"] for line in watched if line["kept"]]
    assert losses.index(min(losses)) == len(losses) - 4, "three evaluations without a better one end the run"
    assert watched[-1]["step"] < 80 and kept[-1] == watched[losses.index(min(losses))]["step"]
    assert f"stopped early at step {watched[-1]['step']}" in done.stdout
    assert f"the weights of step {kept[-1]} are kept: the best by loss" in done.stdout
    assert not (tmp_path / "run" / "best").exists()

    # The saved adapter gives the loss of the best evaluation, not of the last one.
    from data_prep.assemble import read_rows
    from data_prep.tokens import load_tokenizer
    from finetune import evals
    from finetune.layout import find_device
    from finetune.models import load_base
    from finetune.results import load_tuned
    from finetune.stats import values

    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe.model)
    tuned = load_tuned(recipe, load_base(recipe, tokenizer, find_device("cpu")), tmp_path / "run")
    _, rows_watched = choose_rows(read_rows(tmp_path / "run" / "data", "eval"), recipe)
    answers = evals.measure(tuned, tokenizer, rows_watched, recipe, "test", ["loss"])
    assert values(answers, ["loss"], [], answers)["loss"] == pytest.approx(min(losses), abs=1e-6)
    assert losses[-1] > min(losses) + 1e-3


@pytest.mark.slow
def test_a_dpo_run_killed_at_three_points_gives_the_same_adapter(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    source = {"path": str(write_rows(tmp_path / "pairs.jsonl", pairs()))}
    layout = {"tokens_per_step": 450, "micro_batch": 2, "seq_len": 128, "max_steps": 24, "save_every": 6}
    path = make_recipe(
        method={"type": "dpo"},
        adapter={"r": 4, "dropout": 0.1},
        data={"train": [source], "eval": {"fraction": 0.25}},
        train={
            **layout,
            "learning_rate": 5e-3,
            "device": "cpu",
            "eval_every": 4,
            "best": {"metric": "reward_accuracy"},
        },
    )
    whole, run = whole_and_killed(path, tmp_path)
    assert (whole / "watched.jsonl").read_text() == (run / "watched.jsonl").read_text()
    series = [
        [(e["step"], e.get("loss"), e.get("reward_margin")) for e in map(json.loads, text.splitlines())]
        for text in ((folder / "metrics.jsonl").read_text() for folder in (whole, run))
    ]
    assert series[0] == series[1] and len(series[0]) == 30
