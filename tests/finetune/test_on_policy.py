"""On-policy distillation: plain TRL's numbers, the same after a stop, nearer to the teacher; across tokenizers too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import THINGS, build_model, write_rows
from test_preference import TEMPLATE, settings
from training import adapter_of, logged

from data_prep.assemble import read_rows
from data_prep.prepare import prepare
from finetune import stages
from finetune.arguments import Job
from finetune.callbacks import watched
from finetune.layout import Layout, find_device
from finetune.on_policy import build_on_policy, check_on_policy, fit_head, longest_answers
from finetune.policy import prompt_order
from recipes.errors import RetortError
from recipes.load import load_recipe
from recipes.refs import EMBEDDED

PLAN: dict[str, Any] = {
    "device": "cpu",
    "world_size": 1,
    "seq_len": 64,
    "packing": False,
    "micro_batch": 8,
    "gradient_accumulation": 1,
    "rows_per_step": 8,
    "tokens_per_step": 0,
    "steps": 10,
    "epochs": 1.0,
    "gradient_checkpointing": False,
    "dtype": "float32",
    "quantization": "none",
    "estimated_bytes": None,
    "unit": "completions",
}


def prompts(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{'The house is old. ' * (i % 3)}Where is the {THINGS[i % 10]} number {i}?"} for i in range(count)
    ]


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model over the same tokens."""
    return build_model(tmp_path_factory.mktemp("teacher") / "teacher", seed=5, tie_word_embeddings=False)


@pytest.fixture
def make(make_recipe: Callable[..., Path], tmp_path: Path, tiny_teacher: Path) -> Callable[..., Path]:
    def recipe(method: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None, **train: Any) -> Path:
        (tmp_path / "template.jinja").write_text(TEMPLATE)
        source = {"path": str(write_rows(tmp_path / "prompts.jsonl", prompts()))}
        layout = {"seq_len": 64, "max_steps": 10, "learning_rate": 5e-3, "warmup": 0.0, "schedule": "constant"}
        path = make_recipe(
            method={"type": "distill", "mode": "on_policy", "max_new_tokens": 8, "prompts_per_step": 8}
            | (method or {}),
            teacher={"model": str(tiny_teacher), **(teacher or {})},
            data={"train": [source], "eval": {"fraction": 0.25}},
            train={"device": "cpu", **layout, **train},
            eval={"samples": 4},
        )
        written = json.loads(path.read_text())
        written["model"]["chat_template"] = str(tmp_path / "template.jinja")
        path.write_text(json.dumps(written))
        return path

    return recipe


def built(path: Path, *overrides: str) -> tuple[Any, list[dict[str, Any]], Any]:
    """The trainer of a recipe, its rows and its tokenizer, by the stages of a run."""
    recipe = load_recipe(path, list(overrides))
    folder = recipe.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(recipe, folder)
    rows = read_rows(prepared.folder, "train")
    count, micro = recipe.method.prompts_per_step, recipe.train.micro_batch or recipe.method.prompts_per_step
    shape = {"micro_batch": micro, "gradient_accumulation": count // micro, "rows_per_step": count}
    layout = Layout(**{**PLAN, **shape, "seq_len": recipe.train.seq_len, "steps": recipe.train.max_steps})
    model = stages.load(recipe, prepared.tokenizer, find_device("cpu"))
    trainer = build_on_policy(Job(recipe, layout, prepared.tokenizer, model, rows, folder))
    return trainer, rows, prepared.tokenizer


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ({}, {"beta": 1.0}),
        ({"beta": 0.0, "temperature": 1.3}, {"beta": 0.0, "temperature": 1.3}),
        ({"beta": 0.5, "top_k": 20, "top_p": 0.9}, {"beta": 0.5, "top_k": 20, "top_p": 0.9}),
    ],
    ids=["reverse KL", "forward KL at 1.3", "Jensen-Shannon, narrowed sampling"],
)
def test_on_policy_equals_a_plain_trl_script(
    make: Callable[..., Path], tiny_model: Path, tiny_teacher: Path, tmp_path: Path, method: Any, config: Any
) -> None:
    """A TRL script with the same prompts in the same order: it tokenises, samples and trains by itself."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    ours, rows, _ = built(make(method))
    ours.train()
    order = prompt_order(len(rows), 10 * 8, seed=42)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    theirs = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32),
        args=DistillationConfig(**settings(tmp_path / "trl", **config), max_completion_length=8, shuffle_dataset=False),
        train_dataset=Dataset.from_list([{"prompt": rows[i]["messages"]} for i in order]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    theirs.train()
    assert len(logged(ours)) == 10
    for name in ("loss", "entropy", "completions/mean_length", "completions/clipped_ratio", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5), name
    assert len(set(logged(ours))) == 10 and min(logged(ours)) > 0


def test_accumulation_changes_nothing(make: Callable[..., Path]) -> None:
    """All answers of a step are written together, so that they are the same however the step is cut."""
    together, _, _ = built(make(max_steps=6))
    together.train()
    one_by_one, _, _ = built(make(max_steps=6), "train.micro_batch=2")
    assert one_by_one.args.gradient_accumulation_steps == 4
    one_by_one.train()
    assert logged(one_by_one) == pytest.approx(logged(together), abs=1e-5)
    for name in ("entropy", "completions/mean_length"):
        assert logged(one_by_one, name) == pytest.approx(logged(together, name), abs=1e-5), name


def test_resumed_half_way_it_ends_with_the_same_bits(make: Callable[..., Path], tmp_path: Path) -> None:
    """With dropout, over more than one epoch of prompts: the order and every generator are restored."""
    path = make(max_steps=6, save_every=3)
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps({**recipe, "adapter": {"r": 4, "dropout": 0.1}}))
    whole, rows, _ = built(path, "train.micro_batch=4")
    assert len(rows) < 3 * 8
    whole.train()
    saved = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    second, _, _ = built(path, "train.micro_batch=4")
    second.train(resume_from_checkpoint=str(saved))
    first, last = adapter_of(whole), adapter_of(second)
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    kept = ("loss", "entropy", "completions/mean_length", "num_tokens")
    logs = [[{k: e[k] for k in kept} for e in t.state.log_history if "loss" in e] for t in (whole, second)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def reverse_kl(model: Any, teacher: Any, sequences: list[tuple[list[int], list[int]]]) -> float:
    """Mean KL(student || teacher) in nats over the tokens of answers, each behind its prompt."""
    total, count = 0.0, 0
    for prompt, answer in sequences:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            ours, theirs = (m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, teacher))
        total += float((ours.exp() * (ours - theirs)).sum())
        count += len(answer)
    return total / count


@pytest.mark.slow
def test_the_student_comes_nearer_to_its_teacher(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """20 steps of the embedded pair: on held-out prompts its distributions go half the way to the teacher's."""
    known = (EMBEDDED / "legal" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, known), key=lambda row: len(row["messages"][0]["content"]))[:300]
    source = write_rows(tmp_path / "short.jsonl", [{"messages": r["messages"], "group": r["group"]} for r in rows])
    trainer, _, _ = built(
        make_recipe(
            model={"base": "embedded:tiny"},
            teacher={"model": "embedded:tiny-teacher"},
            adapter={"r": 16},
            method={"type": "distill", "mode": "on_policy", "prompts_per_step": 8, "max_new_tokens": 12},
            data={"train": [{"path": str(source)}], "eval": {"fraction": 0.1}},
            train={"seq_len": 256, "max_steps": 20, "learning_rate": 3e-3, "warmup": 0.0, "device": "cpu"},
            eval={"samples": 8},
        )
    )
    held_out = [row["input_ids"] for row in read_rows(tmp_path / "run" / "data", "eval")]
    assert len(held_out) >= 24
    answered = [greedy(trainer.teacher_model, ids) for ids in held_out[:24]]
    frozen = {name: p.clone() for name, p in trainer.teacher_model.named_parameters()}

    def distances() -> tuple[float, float]:
        trainer.model.eval()
        own = [greedy(trainer.model, ids) for ids in held_out[:24]]
        found = [reverse_kl(trainer.model, trainer.teacher_model, some) for some in (answered, own)]
        trainer.model.train()
        return found[0], found[1]

    before = distances()
    trainer.train()
    after = distances()
    assert before[0] > 8 and after[0] < 0.6 * before[0], (before, after)  # along the teacher's answers
    assert before[1] > 2.3 and after[1] < 0.8 * before[1], (before, after)  # along its own
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.teacher_model.named_parameters())
    assert logged(trainer, "completions/clipped_ratio")[-1] < 0.5, "answers end"


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[int]]:
    ids = torch.tensor([prompt])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return prompt, made[0, len(prompt) :].tolist()


def other_tokenizer(folder: Path, target: Path) -> Path:
    """A model of the same shape over other tokens: other merges, other special tokens, a begin token, another chat."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    special = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=backend.pre_tokenizer.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["Where is the red stone? The old boat is where the glass is."] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    config = AutoConfig.from_pretrained(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": len(tokenizer)}
    for name, value in ends.items():
        setattr(config, name, value)
    torch.manual_seed(11)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def test_gold_trains_across_tokenizers(
    make: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps; the teacher reads its own chat format with one begin token, and the student's answer."""
    teacher = other_tokenizer(tiny_model, tmp_path / "other")
    trainer, rows, _ = built(
        make({"cross_tokenizer": True, "prompts_per_step": 4}, {"model": str(teacher)}, max_steps=3, micro_batch=2)
    )
    assert "experimental" in capsys.readouterr().out
    read: list[torch.Tensor] = []
    trainer.teacher_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    before = adapter_of(trainer)
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses) and len(set(losses)) == 3
    assert any(not torch.equal(before[name], now) for name, now in adapter_of(trainer).items())
    order = prompt_order(len(rows), 12, seed=42)
    seen = [trainer.teacher_tokenizer.decode(ids) for batch in read for ids in batch]
    assert len(seen) == 12
    for text, i in zip(seen, order, strict=True):
        assert text.startswith(f"<s>[INST]{rows[i]['messages'][-1]['content']}[/INST]"), text
        assert text.count("</s>") == 1 and "<|im_end|></s>" not in text, text


def test_gold_finds_nothing_to_learn_from_an_equal_model(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Prompts, answers and their alignment are right on both sides, or the loss would not be 0."""
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": f"What is {i} plus {i % 7}?"} for i in range(20)])

    def steps(teacher: str, micro: int) -> list[float]:
        trainer, _, _ = built(
            make_recipe(
                model={"base": "embedded:tiny"},
                teacher={"model": teacher},
                method={
                    "type": "distill",
                    "mode": "on_policy",
                    "cross_tokenizer": True,
                    "prompts_per_step": 4,
                    "max_new_tokens": 8,
                    "top_k": 1,
                },
                data={"train": [{"path": str(source)}], "eval": None},
                train={"seq_len": 64, "max_steps": 2, "learning_rate": 1e-3, "device": "cpu", "micro_batch": micro},
            ),
            f"output={tmp_path / teacher[9:]}",
        )
        trainer.train()
        return logged(trainer)

    assert steps("embedded:tiny", 4)[0] == pytest.approx(0, abs=1e-4)
    whole, cut = steps("embedded:tiny-teacher", 4), steps("embedded:tiny-teacher", 1)
    assert whole[0] > 0.1 and cut == pytest.approx(whole, rel=1e-3)


def test_gold_resumed_half_way_ends_with_the_same_bits(
    make: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    teacher = {"model": str(other_tokenizer(tiny_model, tmp_path / "other"))}
    path = make({"cross_tokenizer": True, "prompts_per_step": 4}, teacher, max_steps=4, save_every=2, micro_batch=2)
    whole, _, _ = built(path)
    whole.train()
    second, _, _ = built(path)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "checkpoint-2"))
    last = adapter_of(second)
    assert all(torch.equal(weights, last[name]) for name, weights in adapter_of(whole).items())
    assert logged(whole) == logged(second) and len(logged(whole)) == 4


def padded(folder: Path, target: Path) -> Path:
    """The model with 24 embedding rows more than there are tokens, and large weights in them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 24)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.data[rows:] = 0.5
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def test_rows_beyond_the_vocabulary_do_not_matter(
    make: Callable[..., Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    """A teacher with padded embeddings (Qwen's larger models) teaches what the same one without padding does."""
    wide = padded(tiny_teacher, tmp_path / "wide")
    plain, rows, tokenizer = built(make(max_steps=3))
    recipe = load_recipe(make(teacher={"model": str(wide)}, max_steps=3))
    assert check_on_policy(recipe, tokenizer, rows) == []
    plain.train()
    padding, _, _ = built(make(teacher={"model": str(wide)}, max_steps=3), f"output={tmp_path / 'other'}")
    padding.train()
    assert logged(padding) == pytest.approx(logged(plain), abs=1e-6)


def test_a_student_with_more_rows_is_told_never_to_use_them(tiny_model: Path, tiny_teacher: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tiny_teacher, tiny_model)
    )
    rows = student.config.vocab_size
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = teacher(input_ids=ids).logits.log_softmax(-1)
        student.resize_token_embeddings(rows + 24)
        fit_head(teacher, student)
        after = teacher(input_ids=ids).logits.log_softmax(-1)
    assert after.shape[-1] == rows + 24
    torch.testing.assert_close(after[..., :rows], before, atol=1e-6, rtol=0)
    assert after[..., rows:].max() < -90 and torch.isfinite(after).all()


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "nf4"}], ids=["bfloat16", "nf4"])
def test_a_teacher_of_another_precision(make: Callable[..., Path], options: dict[str, str], tmp_path: Path) -> None:
    """It stays as it was loaded, and teaches nearly what it does in float32."""
    exact, _, _ = built(make(max_steps=2))
    exact.train()
    path = make(teacher={"engine": {"transformers": options}}, max_steps=2)
    rough, _, _ = built(path, f"output={tmp_path / 'rough'}")
    weights = list(rough.teacher_model.parameters())
    assert {p.dtype for p in weights} == {torch.bfloat16 if "dtype" in options else torch.float32}
    quantised = [p for p in weights if getattr(p, "quant_state", None) is not None]
    assert len(quantised) == (0 if "dtype" in options else 2 * 7), "two layers of seven projections"
    rough.train()
    assert not any(p.requires_grad for p in rough.teacher_model.parameters())
    losses = logged(rough), logged(exact)
    assert losses[0] == pytest.approx(losses[1], rel=0.25) and losses[0] != losses[1]


@pytest.mark.parametrize("cross", [False, True])
def test_the_longest_answers_are_what_the_loss_takes(make: Callable[..., Path], cross: bool) -> None:
    from finetune.preflight import probe

    trainer, rows, _ = built(make({"cross_tokenizer": cross}, max_steps=2, micro_batch=4))
    method = load_recipe(make({"cross_tokenizer": cross})).method
    batch = longest_answers(trainer, rows, method, 4)
    longest = max(len(row["input_ids"]) for row in rows)
    width = batch["input_ids"].shape[1] if cross else batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    assert width == longest + 8
    state = torch.random.get_rng_state()
    found = probe(trainer, Layout(**{**PLAN, "micro_batch": 4}), batch)
    assert found["train_tokens"] == (4 * width if cross else 4 * longest)
    assert torch.equal(state, torch.random.get_rng_state())
    trainer.train()
    assert len(logged(trainer)) == 2


def test_what_is_logged_has_names_in_the_metrics(make: Callable[..., Path]) -> None:
    trainer, _, _ = built(make(max_steps=1))
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert set(watched(entry)) == {"entropy", "completion_length", "truncated_share"}


@pytest.mark.parametrize(
    ("method", "teacher", "message"),
    [
        ({"vllm": {}}, {}, "the package vllm is not installed"),
        ({}, {"engine": {"transformers": {"device": "cuda"}}}, "runs the teacher on the student's device"),
        ({}, {"model": "embedded:tiny-teacher"}, "different tokens: id"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    make: Callable[..., Path], method: Any, teacher: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RetortError) as caught:
        recipe = load_recipe(make(method, teacher))
        prepared = prepare(recipe, tmp_path / "run")
        check_on_policy(recipe, prepared.tokenizer, read_rows(prepared.folder, "train"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
