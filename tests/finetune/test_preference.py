"""DPO, KTO, ORPO and reward models: the numbers of plain TRL, whatever the layout, and a reference computed once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import COLOURS, THINGS, run_train, write_rows
from training import adapter_of, built, logged, run_losses

from data_prep.assemble import read_rows
from data_prep.prepare import prepare
from finetune.arguments import check_extra
from finetune.preference import chosen_of, rejected_of
from finetune.sequences import log_probabilities
from recipes.errors import DataError, RecipeError
from recipes.load import load_recipe
from recipes.schema_method import DPOLoss

# Nothing follows the end token of the last turn, so that TRL, which trains on all that follows the prompt, agrees.
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}"
    "{%- if not loop.last %}{{ '\\n' }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{%- endif %}"
)


def pairs(count: int = 64) -> list[dict[str, Any]]:
    """Pairs of answers of different lengths; the longer one is chosen in half of them."""
    rows = []
    for i in range(count):
        thing, right, wrong = THINGS[i % len(THINGS)], COLOURS[i % len(COLOURS)], COLOURS[(i + 3) % len(COLOURS)]
        filler = f"The {THINGS[(i + 3) % len(THINGS)]} is old. " * (i % 4)
        good, bad = (f"The {thing} is {right}.", wrong) if i % 2 else (right, f"The {thing} is {wrong}.")
        prompt = f"{filler}The {thing} number {i} is {right}. What colour is the {thing}?"
        rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return rows


@pytest.fixture
def make(make_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe over pairs for a method."""

    def recipe(method: Any, **train: Any) -> Path:
        (tmp_path / "template.jinja").write_text(TEMPLATE)
        source = {"path": str(write_rows(tmp_path / "pairs.jsonl", pairs()))}
        layout = {"micro_batch": 8, "seq_len": 128, "max_steps": 10, "learning_rate": 5e-3, **train}
        each = 55.25 if isinstance(method, dict) and method["type"] == "kto" else 110.5  # of an answer, a pair
        layout = {"tokens_per_step": round(each * layout["micro_batch"]), **layout}
        path = make_recipe(
            method=method,
            data={"train": [source]},
            train={"device": "cpu", "save_every": 100, "warmup": 0.0, "schedule": "constant", **layout},
        )
        written = json.loads(path.read_text())
        written["model"]["chat_template"] = str(tmp_path / "template.jinja")
        path.write_text(json.dumps(written))
        return path

    return recipe


def plain(make_trainer: Any, base: Path, config: Any, rows: list[dict[str, Any]], auto: Any = None) -> Any:
    """A TRL script as its documentation shows it: texts in, the library does the rest."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    kind = "CAUSAL_LM" if auto is None else "SEQ_CLS"
    trainer = make_trainer(
        model=auto or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type=kind, r=4, lora_alpha=8, target_modules="all-linear"),
    )
    trainer.train()
    return trainer


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 10,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "seed": 42,
        "data_seed": 42,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "weight_decay": 0.0,
        "disable_tqdm": True,
        **more,
    }


def as_messages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in rows
    ]


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ({"type": "dpo"}, {"loss_type": ["sigmoid"]}),
        (
            {"type": "dpo", "loss": {"sigmoid": 0.8, "sft": 0.2}, "beta": 0.3},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2], "beta": 0.3},
        ),
        ({"type": "dpo", "length_desensitised": 0.5}, {"loss_type": ["sigmoid"], "ld_alpha": 0.5}),
    ],
    ids=["sigmoid", "sft mixed in", "length-desensitised"],
)
def test_dpo_equals_a_plain_trl_script(
    make: Callable[..., Path], tiny_model: Path, tmp_path: Path, method: Any, config: Any
) -> None:
    from trl import DPOConfig, DPOTrainer

    theirs = plain(DPOTrainer, tiny_model, DPOConfig(**settings(tmp_path / "trl", **config)), as_messages(pairs()))
    ours = built(make(method)).trainer
    ours.train()
    assert len(logged(ours)) == 10
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5, rel=1e-6), name
    assert max(map(abs, logged(ours, "rewards/margins"))) > 0.01, "nothing moved, so nothing was compared"
    each = [a / b for a, b in zip(logged(ours, "logps/chosen"), logged(ours, "logps/chosen_per_token"), strict=True)]
    assert len(set(each)) > 1 and all(1 < tokens < 20 for tokens in each)


def moved(trainer: Any) -> Any:
    """A trainer whose adapter says something else than its start."""
    torch.manual_seed(0)
    for name, weights in trainer.model.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(0, 0.1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def test_every_loss_of_dpo_is_the_one_of_a_plain_trl_script(
    make: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    """One forward and backward each, of the same weights: TRL computes the reference itself, from its own tokens."""
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**settings(tmp_path / "trl", max_steps=1, learning_rate=1e-12, label_smoothing=0.1))
    theirs = moved(plain(DPOTrainer, tiny_model, config, as_messages(pairs())))
    ours = moved(built(make({"type": "dpo"})).trainer)
    ours.label_smoothing = 0.1
    theirs_batch = theirs.data_collator([theirs.train_dataset[i] for i in range(8)])
    ours_batch = ours.data_collator([ours.train_dataset[i] for i in range(8)])
    losses = set(get_args(DPOLoss)) - {"sft"}
    found: dict[str, list[Any]] = {}
    for loss in sorted(losses):
        for trainer, batch in ((theirs, theirs_batch), (ours, ours_batch)):
            trainer.loss_types, trainer.loss_weights = [loss], [1.0]
            trainer.model.zero_grad()
            value = trainer.compute_loss(trainer.model, {k: v.clone() for k, v in batch.items()})
            value.backward()
            gradient = sum(float(p.grad.square().sum()) for p in trainer.model.parameters() if p.grad is not None)
            found.setdefault(loss, []).append((float(value.detach()), gradient**0.5))
    assert len(found) == 14
    for loss, (wanted, got) in found.items():
        assert got == pytest.approx(wanted, rel=1e-4), loss
        assert got[1] > 1e-4, loss


@pytest.mark.parametrize(
    "method",
    [
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.4, "beta": 0.5, "loss": {"sigmoid": 0.5, "sft": 2.0}},
        {"label_smoothing": 0.2, "loss": "sigmoid_norm"},
        {"label_smoothing": 0.2, "length_desensitised": 0.5},
        {"reference_free": True},
    ],
    ids=["cDPO", "mixed with sft", "normalised by length", "length-desensitised", "without a reference"],
)
def test_the_terms_that_trl_lacks_equal_their_formulas(make: Callable[..., Path], method: dict[str, Any]) -> None:
    """Worked out from the log-probabilities of every answer, one by one."""
    found = built(make({"type": "dpo", **method}, micro_batch=8, max_steps=1))
    trainer, rows = moved(found.trainer), found.rows[:8]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    value = float(trainer.compute_loss(trainer.model, batch).detach())
    beyond, beta = method.get("length_desensitised", 1.0), method.get("beta", 0.1)
    smoothing, weights = method.get("label_smoothing", 0.0), method.get("loss", "sigmoid")
    weights = {weights: 1.0} if isinstance(weights, str) else weights
    sequences = [side(row) for row in rows for side in (chosen_of, rejected_of)]
    tokens = log_probabilities(trainer.model, found.tokenizer, sequences, "test")
    total = 0.0
    for i in range(len(rows)):
        answers = tokens[2 * i : 2 * i + 2]
        shared = min(map(len, answers))
        gains = [float(a[:shared].sum() + beyond * a[shared:].sum()) for a in answers]
        if found.known:
            gains = [gain - known for gain, known in zip(gains, found.known[2 * i : 2 * i + 2], strict=True)]
        if "sigmoid_norm" in weights:
            gains = [gain / len(a) for gain, a in zip(gains, answers, strict=True)]
        z = torch.tensor(beta * (gains[0] - gains[1]))
        log_sigmoid = torch.nn.functional.logsigmoid
        each = -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)
        total += sum(weight for name, weight in weights.items() if name != "sft") * float(each) / len(rows)
    total += weights.get("sft", 0.0) * -float(torch.cat(tokens[0::2]).mean())
    assert value == pytest.approx(total, rel=1e-5)
    assert found.known == [] or not method.get("reference_free")


def test_orpo_equals_a_plain_trl_script(make: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = ORPOConfig(**settings(tmp_path / "trl", max_length=128))
    theirs = plain(ORPOTrainer, tiny_model, config, as_messages(pairs()))
    ours = built(make({"type": "orpo", "imitate": "all"})).trainer
    ours.train()
    for name in ("loss", "nll_loss", "log_odds_ratio"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5), name
    assert len(logged(ours)) == 10 and logged(ours)[-1] < logged(ours)[0] - 0.1
    assert logged(ours, "logps/chosen_per_token") == pytest.approx(logged(ours, "logps/chosen"))


def test_orpo_imitates_the_answer_alone(make: Callable[..., Path]) -> None:
    """The imitation term is the mean -log p of the chosen answers' tokens: no token of a prompt is in it."""
    found = built(make({"type": "orpo"}, micro_batch=64, max_steps=1, learning_rate=1e-6))
    model = found.trainer.model.eval()
    total = count = 0.0
    for row in found.rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(row["input_ids"][1:]), reduction="none")
        mask = torch.tensor(row["loss_mask"][1:])
        total, count = total + float(nll[mask].sum()), count + int(mask.sum())
    found.trainer.train()
    assert logged(found.trainer, "nll_loss") == pytest.approx([total / count], abs=1e-5)


def test_kto_equals_a_plain_trl_script(make: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    """On the rows in the order that was drawn: TRL's trainer takes them one after the other."""
    from trl import KTOConfig, KTOTrainer

    found = built(make({"type": "kto", "beta": 0.2, "undesirable_weight": 1.2}))
    found.trainer.train()
    decode = found.tokenizer.backend.decode
    data = found.trainer.train_dataset
    rows = []
    for line in data:
        start = line["mask"].index(True)
        prompt, answer = decode(line["ids"][:start]), decode(line["ids"][start:])
        rows.append({"prompt": prompt, "completion": answer, "label": line["label"]})
    config = KTOConfig(**settings(tmp_path / "trl", beta=0.2, undesirable_weight=1.2))
    theirs = plain(KTOTrainer, tiny_model, config, rows)
    assert logged(found.trainer) == pytest.approx(logged(theirs), abs=1e-5)
    assert logged(found.trainer, "kl") == pytest.approx(logged(theirs, "kl"), abs=1e-5)
    assert max(logged(found.trainer, "kl")) > 0.001, "the KL term would not be seen to differ"
    of_answers = sum(sum(mask) for mask in data["KL_mask"][:8])  # of the first step
    assert logged(found.trainer, "kl_per_token")[0] == pytest.approx(logged(found.trainer, "kl")[0] * 8 / of_answers)
    good = [i for i in range(8) if data["label"][i]]
    known = sum(data["ref_logps"][i] for i in good) / sum(sum(data["mask"][i]) for i in good)
    assert logged(found.trainer, "logps/chosen_per_token")[0] == pytest.approx(known, rel=1e-4)
    assert len(logged(theirs)) == 10


def test_a_reward_model_equals_a_plain_trl_script(make: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, set_seed
    from trl import RewardConfig, RewardTrainer

    set_seed(42)
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    config = RewardConfig(**settings(tmp_path / "trl", center_rewards_coefficient=0.01))
    theirs = plain(RewardTrainer, tiny_model, config, as_messages(pairs()), auto=scorer)
    ours = built(make({"type": "reward", "center": 0.01})).trainer
    ours.train()
    assert logged(ours) == pytest.approx(logged(theirs), abs=1e-5)
    assert len(logged(ours)) == 10 and max(logged(ours)) - min(logged(ours)) > 0.01


@pytest.mark.parametrize(
    "method",
    [
        {"type": "dpo"},
        {"type": "dpo", "loss": {"sigmoid": 1.0, "sft": 0.5}, "label_smoothing": 0.1},
        {"type": "orpo"},
        {"type": "reward"},
        {"type": "kto", "loss": "apo_zero_unpaired"},
    ],
    ids=["dpo", "dpo with sft", "orpo", "reward", "kto"],
)
def test_accumulating_rows_of_different_lengths_changes_nothing(make: Callable[..., Path], method: Any) -> None:
    tokens = f"train.tokens_per_step={442 if method['type'] == 'kto' else 884}"  # eight answers, or eight pairs
    together = run_losses(make(method, max_steps=6), tokens, "train.micro_batch=8")
    one_by_one = built(make(method, max_steps=6), tokens, "train.micro_batch=1")
    assert one_by_one.layout.gradient_accumulation == 8
    one_by_one.trainer.train()
    assert logged(one_by_one.trainer) == pytest.approx(together, abs=1e-5)


def test_the_reference_is_computed_once_per_answer(make: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    def computed(path: Path, *overrides: str) -> tuple[int, list[float]]:
        capsys.readouterr()
        known = built(path, *overrides).known
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("reference"))
        return int(line.split("answers, ")[1].split(" computed")[0].replace(",", "")), known

    first, values = computed(make({"type": "dpo"}))
    assert first == 128 and len(values) == 128
    assert computed(make({"type": "dpo", "beta": 0.5}), "train.learning_rate=1e-3", "seed=7") == (0, values)
    edited = pairs()
    edited[5]["chosen"] = "It is hard to say."
    path = make({"type": "dpo"})
    write_rows(tmp_path / "pairs.jsonl", edited)
    count, changed = computed(path)
    assert count == 1
    assert [i for i, (a, b) in enumerate(zip(values, changed, strict=True)) if a != b] == [10]
    assert computed(path, "model.dtype=bfloat16")[0] == 128, "another precision is another reference"
    assert computed(make({"type": "kto", "loss": "apo_zero_unpaired"}))[0] == 0, "KTO asks for the same answers"


def test_the_reference_is_the_base_without_adapter(make: Callable[..., Path]) -> None:
    """Also where the initialisation changes the base's weights (PiSSA): switching the adapter off would be wrong."""
    found = built(make({"type": "dpo"}), "adapter={r: 4, init: pissa}")
    alone = built(make({"type": "dpo"}), "output=" + str(found.recipe.run_dir) + "2")
    assert found.known == alone.known
    found.trainer.train()
    assert logged(found.trainer, "rewards/chosen")[0] == pytest.approx(0.0, abs=1e-4)
    assert logged(found.trainer)[0] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ({"type": "dpo", "label_smoothing": 0.1, "loss": "ipo"}, [], "the loss ipo has no label_smoothing; sigmoid, "),
        ({"type": "dpo", "label_smoothing": 0.1, "loss": {"sigmoid": 1, "hinge": 1}}, [], "the loss hinge has no"),
        ({"type": "dpo", "label_smoothing": 0.1, "loss": "sft"}, [], "the loss sft has no label_smoothing"),
        (
            {"type": "dpo", "label_smoothing": 0.1},
            ["train.extra={use_weighting: true}"],
            "label_smoothing knows nothing of 'use_weighting'",
        ),
        ({"type": "kto"}, ["train.micro_batch=1"], "the KL term needs two rows or more"),
        ({"type": "dpo"}, ["train.extra={beta: 0.2}"], "train.extra.beta: 'beta' is decided by the recipe itself"),
        ({"type": "dpo"}, ["train.extra={use_weighing: true}"], "no such field of DPOConfig; did you mean 'use_weight"),
        ({"type": "dpo"}, ["train.packing=true"], "packing is for method sft"),
        ({"type": "dpo"}, ["eval.metrics=[reward]"], "the metric reward does not exist for method dpo"),
        ({"type": "grpo", "rewards": ["exact"], "max_new_tokens": 8}, [], "and method grpo reads prompts"),
        ("sft", [], "is a preference row, and method.type is sft"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    make: Callable[..., Path], method: Any, overrides: list[str], message: str
) -> None:
    with pytest.raises((RecipeError, DataError)) as caught:
        check_extra(load_recipe(make(method), overrides))
        built(make(method), *overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_hh_rlhf_row_keeps_its_shared_prompt(
    make: Callable[..., Path], realdata: Path, tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    path = make({"type": "dpo"})
    source = realdata / "data" / "preference" / "hh_rlhf_harmless_a.jsonl"
    recipe = load_recipe(path, [f"data.train=[{{path: {source}}}]", "train.seq_len=4096"])
    rows = read_rows(prepare(recipe, tmp_path / "hh").folder, "train")
    asked = [json.loads(line) for line in source.read_text().splitlines()]
    assert len(rows) == len(asked)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row in rows:
        starts = row["loss_mask"].index(True)
        assert row["rejected_mask"].index(True) == starts
        assert row["input_ids"][:starts] == row["rejected_ids"][:starts]
        spoken = tokenizer.decode(row["input_ids"][:starts])
        record = asked[int(row["_source"].rsplit(":", 1)[1]) - 1]
        for message in row["messages"]:
            assert message["content"] in spoken and message["content"] in record["chosen"]
            assert message["content"] in record["rejected"]


def test_both_answers_end_where_they_end(make: Callable[..., Path]) -> None:
    found = built(make({"type": "dpo"}))
    end = found.tokenizer.backend.eos_token_id
    assert all(row["input_ids"][-1] == end == row["rejected_ids"][-1] for row in found.rows)
    before = adapter_of(found.trainer)
    batch = found.trainer.data_collator([found.trainer.train_dataset[i] for i in range(4)])
    assert batch["input_ids"].shape == batch["completion_mask"].shape and batch["input_ids"].shape[0] == 8
    counted = batch["completion_mask"].sum(-1).tolist()
    assert counted[:4] == [sum(row["loss_mask"]) for row in found.rows[:4]]
    assert counted[4:] == [sum(row["rejected_mask"]) for row in found.rows[:4]]
    assert all(torch.isfinite(p).all() for p in before.values())


@pytest.mark.slow
def test_dpo_on_real_pairs_raises_held_out_preference_accuracy(realdata: Path, tmp_path: Path) -> None:
    """A model of 260,000 parameters that has read nothing but stories, on pairs of real assistants."""
    folder = realdata / "data" / "preference"
    recipe = {
        "name": "stories",
        "output": str(tmp_path / "run"),
        "model": {"base": str(realdata / "models" / "stories260K")},
        "adapter": {"r": 16},
        "data": {
            "train": [{"path": str(path)} for path in sorted(folder.glob("*.jsonl"), reverse=True)],
            "eval": {"fraction": 0.3},
            "steps": [{"length": {"max_tokens": 220}}],
        },
        "method": {"type": "dpo", "beta": 0.1},
        "train": {"epochs": 2, "tokens_per_step": 4096, "seq_len": 288, "learning_rate": 1e-3, "device": "cpu"},
        "eval": {"metrics": ["reward_accuracy", "preference_accuracy", "loss"], "samples": None},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    done = run_train(path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    found = result["metrics"]["reward_accuracy"]
    assert result["n"] > 90 and found["base"]["value"] == 0.5
    assert found["tuned"]["value"] > 0.57 and found["p_value"] < 0.06  # 0.617 and 0.027 where it was written
    own = result["metrics"]["preference_accuracy"]
    assert own["tuned"]["value"] > own["base"]["value"]
