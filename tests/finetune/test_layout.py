"""The batch layout: what the user asked for is kept, what does not fit is refused, all by hand-computed numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli

from finetune.layout import Device, ModelFacts, model_facts, plan_layout
from recipes.errors import MemoryFitError, RecipeError
from recipes.schema import Recipe

CARD = Device("cuda", 24 * 2**30, "a 24 GB card")
CPU = Device("cpu", 24 * 2**30, "2 processor cores")
EIGHT_B = ModelFacts(parameters=8_190_735_360, layers=36, hidden=4096, intermediate=12288, vocabulary=151_936)
TINY = ModelFacts(parameters=2_000_000, layers=4, hidden=192, intermediate=512, vocabulary=4096)


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {"name": "x", "model": {"base": "a/b"}, "data": {"train": [{"path": "x.jsonl"}]}, **sections}
    )


def test_tokens_per_step_become_rows() -> None:
    asked = recipe(train={"tokens_per_step": 16_000, "seq_len": 512, "epochs": 2})
    layout = plan_layout(asked, CPU, TINY, rows=1000, mean_tokens=100.0, longest=400, world_size=1)
    # 160 rows a step; at most 8192 // 400 = 20 of the longest in one forward -> 8 forwards of 20.
    assert (layout.micro_batch, layout.gradient_accumulation, layout.rows_per_step) == (20, 8, 160)
    # 1000 rows are 50 forwards, 50 / 8 -> 7 steps an epoch.
    assert (layout.steps, layout.tokens_per_step, layout.dtype) == (14, 16_000, "float32")
    assert not layout.gradient_checkpointing


def test_the_step_stays_the_same_on_more_devices() -> None:
    asked = recipe(train={"tokens_per_step": 16_000, "seq_len": 512})
    one, two = (plan_layout(asked, CPU, TINY, 1000, 100.0, 400, world) for world in (1, 2))
    assert one.rows_per_step == two.rows_per_step == 160
    assert two.micro_batch * two.gradient_accumulation == 80


def test_rows_longer_than_the_context_are_refused() -> None:
    asked = recipe(train={"tokens_per_step": 16_000, "seq_len": 1024})
    small = replace(TINY, context=512)
    with pytest.raises(RecipeError, match=r"train.seq_len: 1024 tokens are more than the context of a/b \(512\)"):
        plan_layout(asked, CPU, small, 1000, 100.0, 400, 1)
    plan_layout(asked, CPU, replace(TINY, context=1024), 1000, 100.0, 400, 1)
    with pytest.raises(RecipeError, match="float16 trains on a GPU only"):
        plan_layout(recipe(model={"base": "a/b", "dtype": "float16"}), CPU, None, 1000, 100.0, 400, 1)


def test_packing_counts_sequences() -> None:
    asked = recipe(train={"tokens_per_step": 8192, "seq_len": 1024, "packing": True})
    layout = plan_layout(asked, CPU, TINY, rows=1000, mean_tokens=100.0, longest=400, world_size=1)
    # 100,000 tokens in 101 packs (97 % full) of 990 tokens each
    assert layout.rows_per_step == 8 and layout.tokens_per_step == 7921
    counted = plan_layout(asked, CPU, TINY, 1000, 600.0, 600, 1, packs=1000)  # no two rows of 600 fit together
    assert (counted.steps, counted.rows_per_step, counted.tokens_per_step) == (72, 14, 8400)
    assert layout.steps == 13  # 100,000 tokens at 97 % full are 101 packs of 1024


def test_pinned_values_win() -> None:
    asked = recipe(train={"tokens_per_step": 16_000, "micro_batch": 8, "max_steps": 5, "gradient_checkpointing": True})
    layout = plan_layout(asked, CPU, TINY, 1000, 100.0, 400, 1)
    assert (layout.micro_batch, layout.gradient_accumulation, layout.steps) == (8, 20, 5)
    assert layout.gradient_checkpointing
    small = plan_layout(asked, CPU, TINY, rows=10, mean_tokens=100.0, longest=400, world_size=1)
    assert small.rows_per_step <= 16, "a step never asks for more rows than there are"


def test_an_8b_model_fits_a_card_quantised() -> None:
    train = {"tokens_per_step": 65_536, "seq_len": 4096}
    middle = Device("cuda", 16 * 2**30, "a 16 GB card")
    with pytest.raises(MemoryFitError, match=r"one row needs about 1[6-9]\.\d GiB, a 16 GB card has 16\.0; .*nf4"):
        plan_layout(recipe(train=train), middle, EIGHT_B, 1000, 2000.0, 4096, 1)
    asked = recipe(model={"base": "a/b", "quantization": "nf4"}, train=train)
    layout = plan_layout(asked, CARD, EIGHT_B, 1000, 2000.0, 4096, 1)
    assert layout.gradient_checkpointing and layout.dtype == "bfloat16"
    assert layout.estimated_bytes is not None and layout.estimated_bytes < 24 * 2**30 * 0.85
    assert layout.rows_per_step in range(30, 36)
    small = Device("cuda", 6 * 2**30, "a 6 GB card")
    with pytest.raises(MemoryFitError, match=r"shorten train\.seq_len"):
        plan_layout(asked, small, EIGHT_B, 1000, 2000.0, 4096, 1)


def test_facts_come_from_files(tiny_model: Path, tmp_path: Path) -> None:
    facts = model_facts(tiny_model)
    assert (facts.layers, facts.hidden, facts.intermediate) == (2, 48, 96)
    # embeddings and head (2 V d), per layer q, o (d^2 each), k, v (d^2 / 2 each), 3 MLP matrices, 2 norms; final norm
    assert facts.parameters == 2 * facts.vocabulary * 48 + 2 * (3 * 48 * 48 + 3 * 48 * 96 + 2 * 48) + 48
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(RecipeError, match="is no readable model folder"):
        model_facts(tmp_path)


def test_plan_command(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = make_recipe()
    done = run_cli("plan", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "steps    about 6 of" in done.stdout and "64 rows" in done.stdout and "not judged" in done.stdout
    wrong = run_cli("plan", str(path), "--set", f"model.base={tmp_path}/none", cwd=tmp_path)
    assert wrong.returncode == 2 and "does not exist" in wrong.stderr and "Traceback" not in wrong.stderr


H100 = Device("cuda", 80 * 2**30, "a card")
SEVEN_B = ModelFacts(7_000_000_000, 32, 4096, 11008, 32000)


@pytest.mark.parametrize(
    "train, mean, world, remedy",
    [
        # 16.5 packs of 3,972 tokens: one on each of 32 cards would be twice the step
        (
            {"tokens_per_step": 65_536, "seq_len": 4096, "packing": True},
            1000.0,
            32,
            r"start 19 devices, or raise it to 127136",
        ),
        # 4.1 rows of 2,000 tokens
        ({"tokens_per_step": 8192, "seq_len": 4096}, 2000.0, 8, r"start 4 devices, or raise it to 16000"),
        ({"tokens_per_step": 8192, "seq_len": 4096}, 2000.0, 3, r"start 2 devices, or raise it to 12000"),
        # 11 rows: 8 would be a smaller step than said, 16 a larger one
        ({"tokens_per_step": 11_000, "seq_len": 2048}, 1000.0, 8, r"start 6 devices, or raise it to 16000"),
    ],
)
def test_a_step_that_devices_cannot_share_out_is_refused(
    train: dict[str, Any], mean: float, world: int, remedy: str
) -> None:
    with pytest.raises(
        RecipeError, match=rf"train\.tokens_per_step: {world} devices cannot share out .*; {remedy}"
    ) as said:
        plan_layout(recipe(train=train), H100, SEVEN_B, 100_000, mean, train["seq_len"], world)
    fewer, larger = (int(n) for n in re.findall(r"start (\d+) .* to (\d+)", str(said.value))[0])
    for asked, devices in ((train, fewer), ({**train, "tokens_per_step": larger}, world)):
        layout = plan_layout(recipe(train=asked), H100, SEVEN_B, 100_000, mean, train["seq_len"], devices)
        assert layout.tokens_per_step == pytest.approx(asked["tokens_per_step"], rel=0.21), "the remedies hold"


@pytest.mark.parametrize(
    "micro, world, layout",
    [(8, 1, (8, 2)), (8, 8, (2, 1)), (8, 16, (1, 1)), (5, 1, (5, 3)), (12, 1, (12, 1)), (64, 1, (16, 1))],
)
def test_a_pinned_micro_batch_makes_no_step_larger(micro: int, world: int, layout: tuple[int, int]) -> None:
    asked = recipe(train={"tokens_per_step": 16_384, "seq_len": 2048, "micro_batch": micro})  # 16 rows
    made = plan_layout(asked, H100, SEVEN_B, 100_000, 1000.0, 2048, world)
    assert (made.micro_batch, made.gradient_accumulation) == layout
    assert made.tokens_per_step <= 16_384


def test_fewer_rows_than_a_step_asks_for_are_no_reason_to_refuse() -> None:
    asked = recipe(train={"tokens_per_step": 16_384, "seq_len": 2048})
    assert plan_layout(asked, H100, SEVEN_B, 10, 1000.0, 2048, 8).rows_per_step == 16
