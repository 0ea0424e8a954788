"""The training itself: equal to a plain TRL script, packed equal to unpacked, and every adapter option trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import colour_rows, run_train
from training import built, logged

from data_prep.assemble import read_rows
from data_prep.prepare import prepare
from data_prep.tokens import load_tokenizer
from finetune.arguments import Job, check_extra
from finetune.layout import find_device, plan_layout
from finetune.models import adapter_config, load_base
from finetune.trainers import PackedCollator, build_sft, token_dataset
from recipes.errors import RecipeError
from recipes.load import load_recipe
from recipes.schema import Recipe


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_twenty_steps_equal_a_plain_trl_script(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The plain script is what a TRL user writes: chat rows, assistant_only_loss, peft_config."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    train = {"tokens_per_step": 512, "seq_len": 128, "learning_rate": 5e-3, "max_steps": 20, "micro_batch": 4}
    recipe = make_recipe(train={**train, "device": "cpu"}, data={"train": [{"path": str(tmp_path / "rows.jsonl")}]})
    done = run_train(recipe)
    assert done.returncode == 0, done.stderr
    layout = json.loads((tmp_path / "run" / "plan.json").read_text())

    base = load_recipe(recipe).model.base
    config = SFTConfig(
        output_dir=str(tmp_path / "plain"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=layout["gradient_accumulation"],
        max_steps=20,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        optim="adamw_torch",
        assistant_only_loss=True,
        max_length=128,
        gradient_checkpointing=False,
        seed=42,
        data_seed=42,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{"messages": r["messages"]} for r in colour_rows()]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    trainer.train()
    plain = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = losses_of(tmp_path / "run")
    assert len(plain) == len(ours) == 20
    assert ours == pytest.approx(plain, abs=1e-5)
    assert ours[-1] < ours[0] - 0.3


@pytest.fixture
def packed(make_recipe: Callable[..., Path], tmp_path: Path) -> tuple[Any, Any, Any, Any]:
    """(unpacked dataset, packed dataset, model, tokenizer) of the same rows."""
    recipe = load_recipe(make_recipe())
    tokenizer = load_tokenizer(recipe.model)
    rows = read_rows(prepare(recipe, tmp_path / "run").folder, "train")
    packing = load_recipe(tmp_path / "recipe.yaml", ["train.packing=true"])
    model = load_base(recipe, tokenizer, find_device("cpu")).eval()
    return token_dataset(rows, recipe), token_dataset(rows, packing), model, tokenizer.backend


def row_losses(model: Any, batch: dict[str, torch.Tensor], **inputs: Any) -> torch.Tensor:
    """-log p per position, (batch, length - 1); zero where nothing is trained."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], **inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)


def test_packed_examples_never_see_each_other(packed: tuple[Any, Any, Any, Any]) -> None:
    rows, packs, model, tokenizer = packed
    alone = {}
    for row in rows:
        batch = {k: torch.tensor([row[k]]) for k in ("input_ids", "labels")}
        alone[tuple(row["input_ids"])] = float(row_losses(model, batch).sum())
    assert len(alone) == len(rows) == 52 and all(loss > 3 for loss in alone.values())

    batch = PackedCollator(tokenizer.pad_token_id)(list(packs))
    right = row_losses(model, batch, position_ids=batch["position_ids"])
    # The same packs as one long text each: what packing without isolation would compute.
    wrong = row_losses(model, batch)
    seen, leaks = 0, 0
    for line, pack in enumerate(packs):
        start = 0
        for length in pack["seq_lengths"]:
            key = tuple(pack["input_ids"][start : start + length])
            assert float(right[line, start : start + length - 1].sum()) == pytest.approx(alone[key], abs=2e-5)
            leaks += abs(float(wrong[line, start : start + length - 1].sum()) - alone[key]) > 1e-3
            seen, start = seen + 1, start + length
        assert max(pack["seq_lengths"]) <= 128 and start <= 128
    assert seen == 52 and len(packs) < 26
    assert leaks > 20, "the comparison would not notice a leak"
    assert right.count_nonzero() == sum(label != -100 for row in rows for label in row["labels"])


@pytest.mark.slow
def test_packed_training_equals_unpacked_on_one_big_batch(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """With every row in each step, the order does not matter: packing must not change the losses at all."""
    runs = {}
    for name, packing in (("plain", False), ("packed", True)):
        train = {"tokens_per_step": 100_000, "seq_len": 128, "learning_rate": 5e-3, "max_steps": 5, "packing": packing}
        recipe = make_recipe(output=str(tmp_path / name), train={**train, "device": "cpu"})
        done = run_train(recipe)
        assert done.returncode == 0, done.stderr
        runs[name] = losses_of(tmp_path / name)
    assert runs["packed"] == pytest.approx(runs["plain"], abs=1e-5)
    assert runs["plain"][-1] < runs["plain"][0] - 0.05


@pytest.mark.parametrize("packing", [False, True])
def test_a_processor_sees_few_widths_in_bfloat16(make_recipe: Callable[..., Path], packing: bool) -> None:
    path, pinned = make_recipe(), ["model.dtype=bfloat16", f"train.packing={packing}"]
    trainer = built(path, *pinned).trainer
    batches = list(trainer.get_train_dataloader())
    assert {batch["input_ids"].shape[1] % 32 for batch in batches} == {0}
    longest = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert any(length % 32 for length in longest) and max(b["input_ids"].shape[1] for b in batches) <= 128
    odd = built(path, *pinned, "train.seq_len=120", "train.extra.pad_to_multiple_of=8").trainer
    assert {batch["input_ids"].shape[1] % 8 for batch in odd.get_train_dataloader()} == {0}
    whole = built(path, f"train.packing={packing}").trainer
    assert whole.args.pad_to_multiple_of is None  # float32 has no kernels to compile


def test_a_head_that_skips_what_is_not_trained_changes_nothing(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.trainer.utils as theirs

    made = built(make_recipe())
    batch = next(iter(made.trainer.get_train_dataloader()))
    assert 0 < (batch["labels"] != -100).sum() < batch["labels"].numel() / 4
    found = []
    for skips in (theirs._use_triton, lambda device: False):
        assert skips(None) is (not found)
        monkeypatch.setattr(theirs, "_use_triton", skips)
        made.trainer.model.zero_grad()
        loss = made.trainer.compute_loss(made.trainer.model, dict(batch))
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in made.trainer.model.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and len(found[0][1]) > 10
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_accumulating_rows_of_different_lengths_changes_nothing(make_recipe: Callable[..., Path]) -> None:
    """The loss is a mean over the tokens of the step, not of means over forwards."""
    layout = {"tokens_per_step": 410, "seq_len": 128, "max_steps": 5, "learning_rate": 5e-3, "device": "cpu"}
    path = make_recipe(train={**layout, "packing": False})
    together = built(path, "train.micro_batch=8")
    assert together.layout.gradient_accumulation == 1 and len({len(row["input_ids"]) for row in together.rows}) > 3
    together.trainer.train()
    one_by_one = built(path, "train.micro_batch=1")
    assert one_by_one.layout.gradient_accumulation == 8
    one_by_one.trainer.train()
    assert logged(one_by_one.trainer) == pytest.approx(logged(together.trainer), abs=1e-5)
    assert logged(together.trainer)[-1] < logged(together.trainer)[0] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"r": 4, "dora": True}},
        {"adapter": {"r": 4, "rslora": True, "targets": ["q_proj", "v_proj"]}},
        {"adapter": {"r": 4, "init": "pissa"}},
        {"adapter": {"r": 4, "init": "olora"}},
        {"adapter": {"r": 4, "modules_to_save": ["embed_tokens"]}},
        {"adapter": None},
        {"model.quantization": "nf4"},
        {"train.gradient_checkpointing": True},
    ],
    ids=["dora", "rslora-targets", "pissa", "olora", "modules-to-save", "full", "nf4", "checkpointing"],
)
def test_every_way_to_train_saves_what_it_measured(
    changes: dict[str, Any], make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """What is loaded from disk has the held-out loss that eval.json reports, and it is lower than the base's."""
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    recipe = make_recipe()
    done = run_train(recipe, *options, "--set", "train.max_steps=8")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    measured = json.loads((run / "eval.json").read_text())["metrics"]["loss"]
    assert measured["tuned"]["value"] < measured["base"]["value"] - 0.05
    check = json.loads((run / "preflight.json").read_text())["adapter_check"]
    loaded = load_recipe(run / "recipe.yaml")
    assert check["changed"] and check["finite"] and check["max_abs_change"] > 0
    # Where all weights train, no copy of them is made just to look at it.
    assert check["reloads"] is (None if loaded.adapter is None else True)
    assert reloaded_loss(loaded, run) == pytest.approx(measured["tuned"]["value"], abs=2e-4)


def reloaded_loss(recipe: Any, run: Path) -> float:
    """Held-out loss of what the run saved, loaded afresh as a user would."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from data_prep.held_out import choose_rows
    from finetune.evals import measure

    tokenizer = load_tokenizer(recipe.model)
    if recipe.adapter is None:
        model = AutoModelForCausalLM.from_pretrained(run / "model")
    else:
        model = PeftModel.from_pretrained(load_base(recipe, tokenizer, find_device("cpu")), run / "adapter")
    rows, _ = choose_rows(read_rows(run / "data", "eval"), recipe)
    answers = measure(model, tokenizer, rows, recipe, "test")
    return sum(a.nll for a in answers) / sum(a.tokens for a in answers)


def test_extra_fields_are_checked_and_reach_the_trainer(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = make_recipe()
    for text, message in (
        ("train.extra.adam_beat2=0.95", "did you mean 'adam_beta2'?"),
        ("train.extra.learning_rate=1e-3", "set train.learning_rate"),
        ("train.extra.loss_type=mse", "train.extra"),
    ):
        recipe = load_recipe(path, [text])
        if "loss_type" in text:  # TRL itself refuses the value, when the trainer is built
            continue
        with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
            check_extra(recipe)
    recipe = load_recipe(path, ["train.extra.adam_beta2=0.95", "train.extra.neftune_noise_alpha=5"])
    check_extra(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = read_rows(prepare(recipe, tmp_path / "run").folder, "train")
    device = find_device("cpu")
    layout = plan_layout(recipe, device, None, len(rows), 50.0, 100, 1)
    trainer = build_sft(Job(recipe, layout, tokenizer, load_base(recipe, tokenizer, device), rows, tmp_path))
    assert trainer.args.adam_beta2 == 0.95 and trainer.args.neftune_noise_alpha == 5


def test_adapter_options_reach_peft() -> None:
    def config_of(**adapter: Any) -> Any:
        source = {"path": "rows.jsonl"}
        sections = {"name": "x", "model": {"base": "embedded:tiny"}, "data": {"train": [source]}, "adapter": adapter}
        return adapter_config(Recipe.model_validate(sections))

    config = config_of(r=8, dora=True, rslora=True, dropout=0.1, targets=["q_proj"], init="olora")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert config.use_dora and config.use_rslora and config.init_lora_weights == "olora"
    assert config.target_modules == {"q_proj"}
    assert config_of(r=8, alpha=4.0).lora_alpha == 4
