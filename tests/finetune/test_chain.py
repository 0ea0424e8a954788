"""Runs that start from an earlier run: they begin as the model that it made, whatever the base is quantised to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, colour_rows, run_cli, run_train, write_rows
from training import adapter_of, built

from data_prep.tokens import load_tokenizer
from finetune.layout import find_device
from finetune.models import load_base, load_start
from finetune.results import load_tuned
from recipes.errors import DataError, RecipeError
from recipes.load import load_recipe

TRAIN = {"tokens_per_step": 512, "seq_len": 128, "learning_rate": 2e-2, "max_steps": 12, "device": "cpu"}


def write(path: Path, **sections: Any) -> Path:
    evaluation = {"samples": 8, "max_new_tokens": 6, "resamples": 200}
    path.write_text(json.dumps({"train": TRAIN, "eval": evaluation, **sections}))
    return path


@pytest.fixture(scope="module", params=["none", "nf4"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished SFT run `sft`, and rows for what follows."""
    folder = tmp_path_factory.mktemp(f"chain-{request.param}")
    base = build_model(folder / "base")
    rows = write_rows(folder / "rows.jsonl", colour_rows())
    pairs = [
        {"prompt": row["messages"][0]["content"], "chosen": row["messages"][1]["content"], "rejected": "purple"}
        for row in colour_rows()
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    recipe = write(
        folder / "sft.yaml",
        name="sft",
        output=str(folder / "sft"),
        model={"base": str(base), "quantization": request.param},
        adapter={"r": 4},
        data={"train": [{"path": str(rows)}], "eval": {"fraction": 0.2}},
    )
    done = run_train(recipe)
    assert done.returncode == 0, done.stderr
    return folder


def dpo(folder: Path, name: str = "dpo", **model: Any) -> Path:
    return write(
        folder / f"{name}.yaml",
        name=name,
        output=str(folder / name),
        model={"run": str(folder / "sft"), **model},
        method={"type": "dpo"},
        data={"train": [{"path": str(folder / "pairs.jsonl")}], "eval": {"fraction": 0.2}},
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 40, 41, 42, 43, 60, 61]])).logits.float()


def earlier_logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the SFT run's base and its tuned model say."""
    recipe = load_recipe(folder / "sft.yaml")
    base = load_base(recipe, load_tokenizer(recipe.model), find_device("cpu"))
    before = logits(base)
    return before, logits(load_tuned(recipe, base, folder / "sft").eval())


def start(path: Path) -> Any:
    recipe = load_recipe(path)
    return load_start(recipe, load_tokenizer(recipe.model), find_device("cpu")).eval()


def test_the_same_adapter_goes_on_from_where_the_run_ended(chain: Path) -> None:
    base, tuned = earlier_logits(chain)
    model = start(dpo(chain))
    assert (tuned - base).abs().max() > 0.05, "the earlier run changed too little to be told from its base"
    assert torch.equal(logits(model), tuned)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_merging_starts_where_the_run_ended(chain: Path) -> None:
    _, tuned = earlier_logits(chain)
    model = start(dpo(chain, merge=True))
    assert not hasattr(model, "peft_config")
    assert (logits(model) - tuned).abs().max() < 2e-5
    if load_recipe(chain / "sft.yaml").model.quantization == "nf4":
        # Merged into the base's own weights, before they were rounded, it would be another model.
        from peft import PeftModel

        recipe = load_recipe(chain / "sft.yaml", ["model.quantization=none"])
        whole = load_base(recipe, load_tokenizer(recipe.model), find_device("cpu"))
        naive = PeftModel.from_pretrained(whole, chain / "sft" / "adapter").merge_and_unload().eval()
        assert (logits(naive) - tuned).abs().max() > 1e-3


def test_in_bfloat16_both_ways_start_near_where_the_run_ended(chain: Path) -> None:
    """Merged weights are rounded to 8 bits of mantissa once; that moves the logits far less than the run did."""
    recipe = load_recipe(chain / "sft.yaml", ["model.dtype=bfloat16"])
    base = logits(load_base(recipe, load_tokenizer(recipe.model), find_device("cpu")))
    kept, merged = (logits(start(dpo(chain, name="half", dtype="bfloat16", merge=merge))) for merge in (False, True))
    moved = (kept - base).abs().max()
    assert moved > 0.05 and (merged - kept).abs().max() < 0.25 * moved


def test_the_reference_is_the_earlier_run(chain: Path) -> None:
    """The first loss of DPO is ln 2: policy and reference are the same, though the base alone is another model."""
    for merge in (False, True):
        found = built(dpo(chain, name=f"dpo-{merge}", merge=merge))
        before = adapter_of(found.trainer)
        found.trainer.train()
        first = next(entry for entry in found.trainer.state.log_history if "loss" in entry)
        assert first["loss"] == pytest.approx(0.693147, abs=2e-4)
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
        after = adapter_of(found.trainer)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and not any(".ref." in name for name in moved), "the copy to compare with must stay"


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["nf4"], indirect=True)  # the harder one
def test_a_chain_keeps_its_lineage_and_measures_against_its_start(chain: Path) -> None:
    path = dpo(chain, name="second")
    done = run_train(path)
    assert done.returncode == 0, done.stderr
    run = chain / "second"
    saved = sorted(p.name for p in (run / "adapter").iterdir() if p.is_dir() or p.suffix == ".safetensors")
    assert saved == ["adapter_model.safetensors"], "the copy that DPO compares with is not part of the result"
    manifest = json.loads((run / "manifest.json").read_text())
    roles = {entry["role"]: entry for entry in manifest["inputs"]}
    assert roles["run"]["ref"] == str(chain / "sft") and len(roles["run"]["sha256"]) == 64
    asset = next(entry for entry in manifest["lineage"] if entry["name"] == str(chain / "sft"))
    assert asset["parents"], "the earlier run's own lineage comes along"
    again = run_cli("eval", str(path), "--set", "eval.confidence=0.9", cwd=chain)
    assert again.returncode == 0, again.stderr
    result = json.loads((run / "eval.json").read_text())["metrics"]
    assert result["reward_accuracy"]["base"]["value"] == 0.5
    assert result["reward_accuracy"]["tuned"]["value"] > 0.9
    third = write(
        chain / "third.yaml",
        name="third",
        output=str(chain / "third"),
        model={"run": str(run), "merge": True},
        adapter={"r": 2},
        method={
            "type": "grpo",
            "rewards": [{"regex": {"pattern": "[aeiou]"}}, {"length": {"most": 8, "slack": 8, "weight": 0.5}}],
            "beta": 0.1,
            "temperature": 2.0,
            "max_new_tokens": 8,
            "generations": 4,
            "prompts_per_step": 2,
            "engine": "plain",
        },
        data={"train": [{"path": str(chain / "rows.jsonl")}], "eval": {"fraction": 0.2}},
    )
    recipe = load_recipe(path)
    under = load_start(recipe, load_tokenizer(recipe.model), find_device("cpu"))
    second = logits(load_tuned(recipe, under, run).eval())
    assert (logits(start(third)) - second).abs().max() < 2e-5
    done = run_train(third)
    assert done.returncode == 0, done.stderr
    logs = [json.loads(line) for line in (chain / "third" / "metrics.jsonl").read_text().splitlines()]
    kl = [line["kl"] for line in logs if "kl" in line]
    assert abs(kl[0]) < 1e-6 < max(kl), "the reference of the third run is its own start"
    alone = run_cli("export", str(third), cwd=chain)
    assert alone.returncode == 2 and "--merged" in alone.stderr


def test_what_cannot_go_on_is_refused_in_one_line(chain: Path, tmp_path: Path) -> None:
    quantised = load_recipe(chain / "sft.yaml").model.quantization
    other = "none" if quantised == "nf4" else "nf4"
    for model, more, message in [
        ({"run": str(tmp_path / "nothing")}, {}, "there is no run in"),
        ({"base": "org/other@main"}, {}, "leave model.base out"),
        ({"quantization": other}, {}, "its adapter fits those weights"),
        ({}, {"adapter": {"r": 8}}, "has r: 4; leave it out"),
        ({}, {"adapter": None}, "set model.merge: true"),
        ({"merge": True, "quantization": "nf4"}, {}, "rounds the earlier adapter to 4 bits"),
        ({}, {"method": "reward"}, "a reward model neither continues a run"),
    ]:
        path = dpo(chain, name="bad", **model)
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_swapped_weights_of_the_earlier_run_are_seen(chain: Path) -> None:
    copy = chain / "copy"
    shutil.copytree(chain / "sft", copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="was changed after it was finished: adapter/adapter_model"):
        start(dpo(chain, run=str(copy)))
    shutil.rmtree(copy)
