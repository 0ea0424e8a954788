"""Training on the cache: the loss of the definition through every kind of model, alike however the batch is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_model
from test_losses import Largest, full
from training import logged

from data_prep.assemble import read_rows
from data_prep.logit_cache import LogitWriter, row_key, scored_positions
from data_prep.prepare import prepare
from data_prep.tokens import load_tokenizer
from distill.logits import sparsify
from finetune.arguments import Job
from finetune.distilling import add_divergence, base_of, build_logits, check_head
from finetune.layout import find_device, plan_layout
from finetune.losses import summary
from finetune.models import load_base
from recipes.errors import DataError, RecipeError, RetortError
from recipes.load import load_recipe
from recipes.schema import Recipe
from recipes.schema_teacher import Logits

Rows = list[dict[str, Any]]
METRICS = ("head_mass", "student_head_mass", "agreement", "calibration_error")


def teacher_logits(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """At the row's trained positions, (n, V)."""
    places = torch.tensor(scored_positions(row["loss_mask"]))
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([row["input_ids"]])).logits[0, places - 1]
    return logits


def score(recipe: Recipe, teacher: Any, rows: Rows) -> None:
    """Fill the run's cache as `retort generate` does."""
    assert recipe.teacher is not None and recipe.teacher.logits is not None
    about = {"teacher": {}, "logits": recipe.teacher.logits.model_dump(mode="json"), "vocabulary": 384}
    with LogitWriter(recipe.run_dir / "logits", about) as writer:
        for row in rows:
            actual = torch.tensor(row["input_ids"])[scored_positions(row["loss_mask"])]
            generator = torch.Generator().manual_seed(len(writer.known))
            kept = sparsify(teacher_logits(teacher, row), actual, recipe.teacher.logits, generator)
            writer.add(row_key(row["input_ids"], row["loss_mask"]), kept)


@pytest.fixture
def taught(make_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function (overrides) -> (recipe, job, teacher) with prepared rows and their cache."""
    from transformers import AutoModelForCausalLM

    folder = build_model(tmp_path_factory.mktemp("teacher") / "teacher", seed=1)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(40)  # random weights are nearly sure of nothing; a teacher is of something

    def make(*overrides: str, **sections: Any) -> tuple[Recipe, Job, Any]:
        settings = {
            "method": {"type": "distill", "mode": "logits", "answers": "given", "cross_entropy": 0.2},
            "teacher": {"model": str(folder), "logits": {"k": 8}},
            **sections,
        }
        recipe = load_recipe(make_recipe(**settings), list(overrides))
        prepared = prepare(recipe, recipe.run_dir)
        rows = read_rows(prepared.folder, "train")
        score(recipe, teacher, rows)
        device = find_device("cpu")
        layout = plan_layout(recipe, device, None, len(rows), 30.0, 80, 1)
        torch.manual_seed(recipe.seed)
        model = load_base(recipe, prepared.tokenizer, device)
        return recipe, Job(recipe, layout, prepared.tokenizer, model, rows, recipe.run_dir), teacher

    yield make


def definition(recipe: Recipe, model: Any, teacher: Any, rows: Rows) -> torch.Tensor:
    """The loss per trained token, from whole logits, in float32; k must be the whole vocabulary."""
    assert recipe.teacher is not None and recipe.teacher.logits is not None
    temperature, share = recipe.teacher.logits.temperature, recipe.method.cross_entropy  # type: ignore[union-attr]
    total, count = torch.zeros(()), 0
    for row in rows:
        places = torch.tensor(scored_positions(row["loss_mask"]))
        ids = torch.tensor(row["input_ids"])
        logits = model(input_ids=ids[None]).logits[0, places - 1]
        divergence = temperature**2 * full(logits, teacher_logits(teacher, row), temperature).sum()
        plain = torch.nn.functional.cross_entropy(logits.float(), ids[places], reduction="sum")
        total, count = total + (1 - share) * divergence + share * plain, count + len(places)
    return total / count


KINDS: dict[str, list[str]] = {
    "adapter": [],
    "whole": ["adapter=null"],
    "checkpointed": ["train.gradient_checkpointing=true"],
    "head_saved": ["adapter.modules_to_save=[lm_head]"],
    "warm": ["teacher.logits.temperature=2.0"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_definitions(taught: Any, kind: str) -> None:
    recipe, job, teacher = taught("teacher.logits.k=384", *KINDS[kind])
    trainer = build_logits(job)
    model, rows = trainer.model, job.rows[:6]
    if kind == "checkpointed":
        model.gradient_checkpointing_enable()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # at 0, A would have no gradient
    wanted = definition(recipe, model, teacher, rows)
    wanted.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected) and len(found) >= 14
    assert any("lm_head" in name for name in found) == (kind in {"whole", "head_saved"})
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 2e-3, name


@pytest.mark.slow
def test_training_brings_the_student_to_the_teacher_and_says_so(taught: Any) -> None:
    _, job, _ = taught("adapter=null", "train.max_steps=60", "train.learning_rate=1e-2", "train.log_every=1")
    trainer = build_logits(job)
    before = summary_of(trainer)
    trainer.train()
    after = summary_of(trainer)
    assert after["divergence"] < 0.6 * before["divergence"]
    assert after["agreement"] > before["agreement"] + 0.3
    assert abs(after["student_head_mass"] - after["head_mass"]) < abs(before["student_head_mass"] - before["head_mass"])
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 60
    for line in lines:
        assert all(0 <= line[name] <= 1 for name in (*METRICS, "mean_token_accuracy"))
        assert line["loss"] == pytest.approx(0.8 * line["divergence"] + 0.2 * line["token_loss"], rel=1e-4)
    assert not any(set(METRICS) & set(line) for line in trainer.state.log_history if "train_runtime" in line)


def summary_of(trainer: Any) -> dict[str, float]:
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        found = trainer.model(**batch)
    return summary(found["sums"])


@pytest.mark.slow
def test_accumulation_changes_nothing(taught: Any) -> None:
    results = []
    for micro in (8, 1):
        _, job, _ = taught(
            "adapter=null", f"train.micro_batch={micro}", "train.tokens_per_step=240", "train.max_steps=4"
        )
        assert job.layout.micro_batch == micro and job.layout.gradient_accumulation == 8 // micro
        trainer = build_logits(job)
        trainer.train()
        results.append((logged(trainer), [logged(trainer, m) for m in METRICS], trainer.model.state_dict()))
    (one, seen, weights), (other, seen_too, weights_too) = results
    assert one == pytest.approx(other, abs=2e-5) and len(one) == 4
    for a, b in zip(seen, seen_too, strict=True):
        assert a == pytest.approx(b, abs=2e-4)
    for name, weight in weights.items():
        assert float((weight - weights_too[name]).norm() / weight.norm()) < 1e-3, name


def test_no_tensor_of_all_logits_exists_in_a_step(taught: Any) -> None:
    _, job, _ = taught()
    trainer = build_logits(job)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    rows, width = batch["input_ids"].shape
    trainer.model.train()
    with Largest() as seen:
        trainer.compute_loss(trainer.model, batch).backward()
    assert seen.elements == rows * width * 96  # of the MLP; the logits would be four times as many


def test_bfloat16_and_sampled_targets_train(taught: Any) -> None:
    sections = {"teacher": {"model": "embedded:tiny-teacher", "logits": {"kind": "sampled", "draws": 20}}}
    _, job, _ = taught("model.dtype=bfloat16", "train.max_steps=3", **sections)
    trainer = build_logits(job)
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 3 and losses[-1] < losses[0]
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert bool((batch["targets"].tail == -torch.inf).all()) and 0 < float(batch["targets"].head[0]) < 1


def test_rows_without_distributions_stop_before_training(taught: Any) -> None:
    recipe, job, _ = taught()
    folder = recipe.run_dir / "logits"
    row = job.rows[3]
    changed = {**row, "input_ids": [*row["input_ids"][:-2], 7, *row["input_ids"][-1:]]}
    with pytest.raises(DataError, match=rf"row {row['_id']}: .*missing; run `retort generate`"):
        build_logits(Job(**{**vars(job), "rows": [*job.rows[:3], changed]}))
    with pytest.raises(DataError, match=r"made with temperature 1.0, the recipe says 3.0; run `retort generate`"):
        build_logits(Job(**{**vars(job), "recipe": with_logits(recipe, temperature=3.0)}))
    part = folder / "part-main-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"logits: was changed after it was written: part-main-00000.parquet"):
        build_logits(job)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no finished cache"):
        build_logits(job)


def with_logits(recipe: Recipe, **changes: Any) -> Recipe:
    assert recipe.teacher is not None
    teacher = recipe.teacher.model_copy(update={"logits": Logits(**changes)})
    return recipe.model_copy(update={"teacher": teacher})


def test_what_the_loss_does_not_know_is_refused(taught: Any) -> None:
    _, job, _ = taught("adapter.targets=[q_proj, lm_head]")
    with pytest.raises(RecipeError, match=r"adapter: cannot be set up: .*lm_head"):
        build_logits(job)
    _, job, _ = taught("train.extra.label_smoothing_factor=0.1")
    with pytest.raises(RecipeError, match=r"no label smoothing; method.cross_entropy"):
        build_logits(job)
    _, job, _ = taught()
    job.model.lm_head.register_forward_hook(lambda _module, _arguments, logits: logits * 1.5)
    with pytest.raises(RetortError, match=r"more after its output head than mode logits knows .*use mode: sequence"):
        build_logits(job)


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of another family, whose logits are scaled or capped after the head."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(t, f"{kind}Config")(vocab_size=120, intermediate_size=48, pad_token_id=0, **{**sizes, **changes})
    return getattr(t, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("Phi", {}),  # a bias on the head
    ],
)
def test_families_that_change_their_logits(kind: str, changes: dict[str, Any]) -> None:
    from finetune.distilling import head_of
    from finetune.losses import targets_of

    model = tiny(kind, **changes)
    ids = torch.randint(1, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    check_head(model, ids[0].tolist())
    assert (head_of(model).bias is not None) == (kind == "Phi")
    add_divergence(model, 0.0, 1.0)
    teacher = 2 * torch.randn(22, 120, generator=torch.Generator().manual_seed(1))
    actual = ids[:, 1:].flatten()
    targets = targets_of(sparsify(teacher, actual, Logits(k=120)), actual)
    found = model(input_ids=ids, labels=ids, targets=targets)
    logits = model(input_ids=ids).logits[:, :-1].reshape(22, 120)
    wanted = full(logits, teacher).sum()
    assert found["total"].item() == pytest.approx(wanted.item(), rel=1e-3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    one = torch.autograd.grad(found["total"], parameters, retain_graph=True)
    other = torch.autograd.grad(wanted, parameters)
    norm = torch.stack([g.norm() for g in other]).norm()
    assert torch.stack([(a - b).norm() for a, b in zip(one, other, strict=True)]).norm() < 2e-3 * norm


def test_a_mixture_of_experts_keeps_its_balancing_loss() -> None:
    from finetune.losses import targets_of

    model = tiny("Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    add_divergence(model, 0.0, 1.0)
    ids = torch.randint(1, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    actual = ids[:, 1:].flatten()
    targets = targets_of(sparsify(torch.randn(22, 120), actual, Logits(k=8)), actual)
    found = model(input_ids=ids, attention_mask=mask, labels=ids, targets=targets, output_router_logits=True)
    wanted = model(input_ids=ids, attention_mask=mask, labels=ids).aux_loss
    assert found["aux_loss"].item() == pytest.approx(wanted.item(), rel=1e-6) and wanted.item() > 0.5


@pytest.mark.slow
def test_a_resumed_run_goes_on_where_it_was(taught: Any) -> None:
    """Interrupted between two logs: the weights are the same, and so are the logs from the next whole interval on."""
    overrides = ("adapter=null", "train.max_steps=8", "train.save_every=3", "train.log_every=2", "train.micro_batch=2")
    _, job, _ = taught(*overrides)
    whole = build_logits(job)
    whole.train()
    recipe, job, _ = taught(*overrides)
    resumed = build_logits(job)
    resumed.train(resume_from_checkpoint=str(recipe.run_dir / "checkpoints" / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    later = [{line["step"]: line for line in t.state.log_history if "loss" in line} for t in (whole, resumed)]
    for step in (6, 8):
        assert all(later[0][step][name] == later[1][step][name] for name in ("loss", *METRICS))


SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:4]
from test_distilling import two_processes
two_processes(Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1")))
"""


def two_processes(path: Path, world: int) -> None:
    recipe = load_recipe(path, [f"train.micro_batch={8 // world}"])
    tokenizer = load_tokenizer(recipe.model)
    rows = read_rows(recipe.run_dir / "data", "train")
    device = find_device("cpu")
    layout = plan_layout(recipe, device, None, len(rows), 30.0, 80, world)
    assert (layout.micro_batch, layout.gradient_accumulation) == (8 // world, 1)
    trainer = build_logits(Job(recipe, layout, tokenizer, load_base(recipe, tokenizer, device), rows, recipe.run_dir))
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = {n: p.detach().double().norm().item() for n, p in base_of(trainer.model).named_parameters()}
        lines = [line for line in trainer.state.log_history if "loss" in line]
        path.with_name(f"found-{world}.json").write_text(json.dumps([lines, weights]))


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(taught: Any, tmp_path: Path) -> None:
    taught("adapter=null", "train.tokens_per_step=240", "train.max_steps=4")
    path = tmp_path / "recipe.yaml"
    content = {**json.loads(path.read_text()), "adapter": None}
    content["train"] |= {"tokens_per_step": 240, "max_steps": 4}
    path.write_text(json.dumps(content))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [str(script), str(path), str(Path(__file__).parent), str(ROOT / "tests")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([sys.executable], launch):
        done = subprocess.run(
            [*command, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    (one, weights), (two, weights_too) = (json.loads((tmp_path / f"found-{n}.json").read_text()) for n in (1, 2))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in ("loss", *METRICS):
            assert a[name] == pytest.approx(b[name], abs=2e-4), name
    assert weights == pytest.approx(weights_too, rel=1e-3)
