"""The report and the card of runs that learn from preferences and rewards: what they show, and of damaged files too."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from run_fixture import (
    DPO,
    GRPO,
    HOSTILE,
    INPUTS,
    MANIFEST,
    RECIPE,
    REWARDS,
    completion_rows,
    preferred_lines,
    rewarded_lines,
    watched_rows,
    write_method,
    write_run,
)
from test_report import DAMAGED, Page, change, front_matter, luminance, report

from finetune.report import write_report

SHOWN = " ".join(HOSTILE.split())


def grpo(folder: Path, steps: int = 40) -> Path:
    return write_method(folder, GRPO, rewarded_lines(steps))


def dpo(folder: Path, steps: int = 40, **changes: Any) -> Path:
    return write_method(folder, DPO, preferred_lines(steps), **changes)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def titles(folder: Path) -> list[str]:
    """The headings of the charts, in order."""
    text = write_report(folder).read_text(encoding="utf-8")
    return re.findall(r"<figcaption><h\d>(.*?)</h\d>", text)


def test_grpo_curves_stand_in_groups(tmp_path: Path) -> None:
    page = report(grpo(tmp_path))
    training = page.text("training")
    assert titles(tmp_path) == [
        "Rewards",
        "Groups without a difference",
        "Spread of the reward",
        "Completion length",
        "Truncated completions",
        "Entropy",
        "KL to the start",
        "Clipped share",
        "Training loss",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Memory in GiB",
    ]
    summary = "Rewards over 40 logged steps: weighted sum first 0.258, last 0.960; math first 0.205, last 0.705; think"
    assert summary in training and "held out first 0.564, last 0.775" in training
    assert "weighted sum 0.960 math 0.705 think 0.702" in training  # the legend
    assert "Groups without a difference last 72.5% Groups whose completions all earn the same" in training
    assert "Truncated completions last 6.2% Cut at 64 tokens. Healthy: near zero." in training
    assert "is no measure of progress: the rewards are." in training
    assert page.open == [] and page.headings.count(4) == 12
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))


def test_a_sole_reward_is_one_curve(tmp_path: Path) -> None:
    method = GRPO | {"rewards": [{"exact": {"weight": 1.0}}]}
    write_method(tmp_path, method, rewarded_lines(40, ("exact",)))
    assert titles(tmp_path)[0] == "Reward: exact"
    write_method(tmp_path, GRPO | {"rewards": [{"exact": {"weight": 0.5}}]}, rewarded_lines(40, ("exact",)))
    assert titles(tmp_path)[0] == "Rewards"  # half of it is another curve


def test_dpo_curves_and_the_kept_weights(tmp_path: Path) -> None:
    train = RECIPE["train"] | {"eval_every": 0.25, "best": {"metric": "preference_accuracy", "patience": 1}}
    dpo(tmp_path, train=train)
    lines = preferred_lines(40)
    write_rows(tmp_path, "watched.jsonl", watched_rows(lines, kept=(10, 20, 30)))
    page = report(tmp_path)
    training = page.text("training")
    said = "The weights of step 30 are kept: preference accuracy 67.5% on held-out rows, the best of 4 measurements."
    ended = "Training ended at step 40 of 160: the next one was no better."
    assert f"{said} {ended}" in training
    assert titles(tmp_path) == [
        "Training loss",
        "Reward accuracy",
        "Margin",
        "Rewards of chosen and rejected answers",
        "Log-probability of chosen and rejected answers",
        "Preference accuracy",
        "Held-out loss",
        "Learning rate",
        "Entropy",
    ]
    assert "Reward accuracy over 40 logged steps: first 51.0%, last 90.0%; held out first 56.2%, last 75.0%" in training
    assert "chosen first -19.88, last -15.00; rejected first -22.38, last -37.00" in training
    assert "Preference accuracy over 4 measured steps: held out first 62.5%, last 70.0%" in training
    assert "step 30: 80.0%, held out 68.8%" in training  # the read-out of the reward accuracy
    kept = [attrs for tag, attrs in page.tags if tag == "circle" and attrs.get("class") == "eval-dot best"]
    assert len(kept) == 3  # reward accuracy, preference accuracy, held-out loss
    assert {round(float(str(attrs["cx"]))) for attrs in kept} == {385}  # step 30 of 1 to 40, from 62 to 496
    assert "Rewards before training" not in page.text("top") and page.count("section") == 11


def test_held_out_loss_joins_only_a_loss_of_its_kind(tmp_path: Path) -> None:
    """DPO's loss is no loss of answers; the imitation loss of ORPO is, and supervised fine-tuning's."""
    lines = [line | ({"imitation_loss": 2.0} if "loss" in line else {}) for line in preferred_lines(40)]
    write_method(tmp_path, {"type": "orpo", "beta": 0.1, "imitate": "answer"}, lines)
    training = report(tmp_path).text("training")
    average = "the bold line is a moving average over 5 steps"
    assert "Imitation loss over 40 logged steps: first 2.000, last 2.000; held out first 2.750, last 2.000" in training
    assert f"Training loss over 40 logged steps: first 0.693, last 0.400; {average}" in training
    assert "Held-out loss" not in titles(tmp_path)
    write_method(tmp_path, {"type": "orpo", "beta": 0.1, "imitate": "all"}, lines)
    assert "Held-out loss" in titles(tmp_path)
    report(write_run(tmp_path / "sft"))
    assert "Held-out loss" not in titles(tmp_path / "sft")


def test_rewards_before_training(tmp_path: Path) -> None:
    page = report(grpo(tmp_path))
    rewards = page.text("rewards")
    assert "Completions 32 8 prompts × 4 Groups without a difference 37.5% all earn the same" in rewards
    assert "Mean length 21.50 tokens; 6.2% cut at 64 Engine continuous plain 4.8 s, continuous 3.8 s" in rewards
    assert "math 1 where the answer is mathematically equal to the wanted one" in rewards
    assert "1 0.125 0.500 0.000 to 1.000 2 math: 0: 26 completions; 1: 4 completions" in rewards
    assert "weighted sum 0.271 0.500 0.000 to 1.300 0 sum: 0: 14 completions; 0.3: 13 completions; 1: 2" in rewards
    assert f"Prompt {SHOWN} {SHOWN} sum –" in rewards and "<think> 4 </think> 4 sum 1.3" in rewards
    bars = [attrs for tag, attrs in page.tags if tag == "rect" and attrs.get("class") == "count"]
    assert len(bars) == 2 + 2 + 4
    assert [str(bar["height"]) for bar in bars[:2]] == ["36.0", "5.5"]  # 26 and 4 completions


def test_completions_of_the_first_middle_and_last_step(tmp_path: Path) -> None:
    page = report(grpo(tmp_path))
    shown = page.text("completions")
    assert "Shown are the first, the middle and the last of 5 kept steps" in shown
    assert [step in shown for step in ("Step 1 ", "Step 10 ", "Step 20 ", "Step 30 ", "Step 40 ")] == [1, 0, 1, 0, 1]
    assert f"Step 40 mean of the sums 0.325 Prompt 56 or 99 at 40? {SHOWN}" in shown
    assert "<think> 9 + 9 = 14 </think> 14 math 0 think 1 sum 0.3 advantage +0.39" in shown
    assert "The answer is 56. math 1 think 0 sum 1 advantage +2.36" in shown
    assert f"{SHOWN} math 0 think 0 sum 0 advantage −0.46" in shown
    assert "math – think 0 sum 0 advantage 0.00" in shown  # where a reward does not apply
    assert page.count("dd", **{"class": "good"}) == 6 and page.count("dd", **{"class": "bad"}) == 3
    assert page.count("script") == page.count("img") == 0


def test_facts_of_the_method_and_the_chain(tmp_path: Path) -> None:
    top = report(grpo(tmp_path)).text("top")
    assert "Method GRPO, LoRA, r 16, alpha 32 group-relative policy optimisation" in top
    assert "Loss dapo Beta 0.02 Completions per step 8 prompts × 4 of up to 64 tokens Rewards math + 0.3 × think" in top
    model = {"base": "embedded:tiny", "quantization": "none", "run": "runs/x", "merge": False}
    page = report(dpo(tmp_path, model=model))
    assert "Start continues runs/x the same adapter is trained on Method DPO, LoRA" in page.text("top")
    assert "direct preference optimisation Loss sigmoid + 0.2 × sft Beta 0.1" in page.text("top")
    assert "Base is the model of runs/x, where this run began." in page.text("comparison")
    page = report(dpo(tmp_path, model=model | {"merge": True}))
    assert "Start on runs/x, merged a new adapter on its merged weights" in page.text("top")


def test_an_earlier_run_has_its_licences_in_its_manifest(tmp_path: Path) -> None:
    dpo(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    manifest["inputs"].insert(1, {"role": "run", "ref": "runs/x", "sha256": "ab" * 32, "license": None})
    page = report(change(tmp_path, "manifest.json", manifest))
    assert "run runs/x see its manifest – abababababab" in page.text("lineage")
    assert "| run | `runs/x` | see its manifest | – | `abababababab` |" in front_matter(tmp_path)[1]
    assert len(manifest["inputs"]) == len(INPUTS) + 1


def test_preference_metrics_and_rewards_are_compared(tmp_path: Path) -> None:
    found = {
        "exact_match": {"base": {"value": 0.1}, "tuned": {"value": 0.2}, "p_value": 0.4},
        "reward": {
            "base": {"value": 0.225, "low": 0.1, "high": 0.35},
            "tuned": {"value": 1.4, "low": 1.325, "high": 1.5},
            "p_value": 0.002,
        },
    }
    result = report(change(grpo(tmp_path), "eval.json", {"n": 40, "metrics": found})).text("result")
    assert "Reward, base to tuned 0.225 → 1.400 Better; the intervals do not overlap. +1.175, p = 0.002" in result
    sides = {"base": {"value": 0.5, "low": 0.5, "high": 0.5}, "tuned": {"value": 0.75, "low": 0.7, "high": 0.8}}
    metrics = {name: sides | {"p_value": 0.001} for name in ("loss", "reward_accuracy", "preference_accuracy")}
    page = report(change(dpo(tmp_path), "eval.json", {"n": 40, "metrics": metrics}))
    assert "Preference accuracy, base to tuned 50.0% → 75.0%" in page.text("result")
    assert "Reward accuracy 50.0% 50.0% to 50.0% 75.0% 70.0% to 80.0% +25.0 points 0.001" in page.text("comparison")
    assert "The base's reward accuracy is one half by definition" in page.text("comparison")


def test_samples_without_generated_answers(tmp_path: Path) -> None:
    row = {"_id": "a", "prompt": "Which?", "reference": "this", "base": None, "tuned": None}
    row |= {"base_correct": False, "tuned_correct": False}
    page = report(write_rows(dpo(tmp_path), "samples.jsonl", [row, row]))
    assert "2 of the measured rows. No answers were generated" in page.text("samples")
    assert "both wrong" not in page.text("samples") and "Tuned" not in page.text("samples")
    assert page.text("samples").count("Reference this") == 2


def test_prompts_carry_no_loss_and_no_alarm(tmp_path: Path) -> None:
    page = report(change(grpo(tmp_path), "masks.json", [{"_id": "a", "pieces": [["only a prompt", False]]}]))
    assert "none of their tokens carries loss: what is trained is the completions." in page.text("masks")
    assert "Nothing in this row is trained." not in page.text("masks")
    assert "Trained tokens – completions are trained, not prompts" in page.text("data")


@pytest.mark.parametrize("name", ["rewards.json", "completions.jsonl", "watched.jsonl"])
def test_each_missing_piece_is_named(tmp_path: Path, name: str) -> None:
    (grpo(tmp_path) / name).unlink()
    page = report(tmp_path)
    assert page.text("result").count("not written") == 1 and f"{name}: not written" in page.text("result")
    assert ("rewards" in page.texts, "completions" in page.texts) == (name != "rewards.json", name[:4] != "comp")
    assert "not written" not in report(write_run(tmp_path / "sft")).text("result")


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", ["rewards.json", "completions.jsonl", "watched.jsonl", "metrics.jsonl"])
def test_damaged_pieces_do_not_crash(tmp_path: Path, name: str, content: str) -> None:
    (grpo(tmp_path) / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    page = report(tmp_path)
    assert page.open == [] and f"{name}: " in page.text("result")
    assert front_matter(tmp_path)[0]["library_name"] == "peft"


def test_a_torn_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    path = grpo(tmp_path) / "completions.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 50, "prompt": "x", "comp', encoding="utf-8")
    page = report(tmp_path)
    assert "completions.jsonl: 1 line left out: not a JSON object" in page.text("result")
    assert "Step 40 " in page.text("completions") and "Step 50 " not in page.text("completions")
    rows = [*completion_rows((1,)), {"step": None, "completion": "x"}, {"step": 2}, {"step": 3, "completion": "only"}]
    page = report(write_rows(tmp_path, "completions.jsonl", rows))
    assert "completions.jsonl: 2 lines left out: no step or no completion" in page.text("result")
    assert "Step 3" in page.text("completions") and "only" in page.text("completions")


def test_rewards_of_another_shape_are_left_out_part_by_part(tmp_path: Path) -> None:
    math, think = REWARDS["rewards"]["math"], REWARDS["rewards"]["think"]
    rewards = {"math": math | {"counts": [[0.0, "many"]]}, "think": think, "odd": 3, "sum": {"std": 0.1}}
    found = {"groups": 8, "rewards": rewards, "samples": [{"prompt": "x", "completions": ["y"], "rewards": []}]}
    page = report(change(grpo(tmp_path), "rewards.json", found))
    for problem in (
        "the counts of math left out: not pairs of a value and a number",
        "the reward odd left out: it has no mean",
        "the reward sum left out: it has no mean",
        "a sample left out: not as many rewards as completions",
        "no number for generations, zero_variance_groups, completion_length",
    ):
        assert f"rewards.json: {problem}" in page.text("result")
    assert "think: 0: 16 completions; 1: 16 completions" in page.text("rewards")
    page = report(change(tmp_path, "rewards.json", {"rewards": [1, 2]}))
    assert "rewards.json: rewards left out: not a table of them" in page.text("result")
    assert "rewards" not in page.texts


@pytest.mark.parametrize("wrong", [None, True, 3, "x", [], {}, [3], [{}], {"a": [1]}, 1e308, -1e308, 5e-324], ids=repr)
def test_wrong_types_and_extreme_numbers_do_not_crash(tmp_path: Path, wrong: object) -> None:
    grpo(tmp_path)
    spoilt = {name: dict.fromkeys(entry, wrong) for name, entry in REWARDS["rewards"].items()}
    for rewards in (dict.fromkeys(REWARDS, wrong), REWARDS | {"rewards": spoilt, "samples": [spoilt["sum"]]}):
        assert report(change(tmp_path, "rewards.json", rewards)).open == []
    for name in ("metrics.jsonl", "watched.jsonl", "completions.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").split("\n")[:-1]]
        write_rows(tmp_path, name, [*rows[:-1], dict.fromkeys(rows[-1], wrong) | {"step": 41}])
        assert report(tmp_path).open == []
    recipe = RECIPE | {"method": dict.fromkeys(GRPO, wrong) | {"type": "grpo"}, "model": {"run": wrong}, "train": wrong}
    assert report(change(tmp_path, "manifest.json", MANIFEST | {"recipe": recipe})).open == []
    assert front_matter(tmp_path)[0]["pipeline_tag"] == "text-generation"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    method = GRPO | {"rewards": [{"function": {"path": f"pkg:{HOSTILE}", "weight": 1.0}}, {HOSTILE: {"weight": 2.0}}]}
    model = {"base": "embedded:tiny", "run": HOSTILE, "merge": True}
    write_method(tmp_path, method, rewarded_lines(40, (HOSTILE, "other")), model=model)
    rewards = {HOSTILE: REWARDS["rewards"]["math"], "sum": REWARDS["rewards"]["sum"]}
    change(tmp_path, "rewards.json", REWARDS | {"engine": HOSTILE, "seconds": {HOSTILE: 1.0}, "rewards": rewards})
    rows = [{"step": 1, "prompt": HOSTILE, "completion": HOSTILE, "rewards": {HOSTILE: 1.0}, "advantage": 1.0}]
    page = report(write_rows(tmp_path, "completions.jsonl", rows))
    assert page.count("script") == page.count("img") == page.count("iframe") == 0 and page.count("style") == 1
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")] and page.open == []
    for section in ("top", "rewards", "completions"):
        assert SHOWN in page.text(section)
    body = front_matter(tmp_path)[1].split("<details>")[0]
    assert "<script>" not in re.sub(r"`[^`\n]+`", "", body)


def test_a_huge_run_renders_quickly_and_stays_small(tmp_path: Path) -> None:
    names = tuple(f"judge_of_style_{i}" for i in range(20))
    lines = rewarded_lines(10_000, names)
    assert len(lines[0]) == 20 + 15
    rewards = [{"function": {"path": f"pkg.mod:{name}", "weight": 1.0}} for name in names]
    write_method(tmp_path, GRPO | {"rewards": rewards}, lines)
    write_rows(tmp_path, "completions.jsonl", completion_rows(tuple(range(1, 10_000, 10))))
    measured = [{"step": step, "eval_reward": 0.5} for step in range(1, 10_001)]  # as often as can be
    write_rows(tmp_path, "metrics.jsonl", sorted(lines + measured, key=lambda line: line["step"]))
    started = time.monotonic()
    page = report(tmp_path)
    assert time.monotonic() - started < 20  # about 1.5 s on an idle core
    assert (tmp_path / "report.html").stat().st_size < 650_000
    training = page.text("training")
    assert "Rewards over 10,000 logged steps" in training and "9 more in metrics.jsonl" in training
    drawn = [str(attrs["d"]) for tag, attrs in page.tags if tag == "path" and "held-out" in str(attrs.get("class"))]
    assert len(drawn) == 2 and max(path.count("L") for path in drawn) <= 300
    assert page.count("circle", **{"class": "eval-dot"}) == 0  # a dot each would be a band


def test_curves_have_contrast_in_both_schemes(tmp_path: Path) -> None:
    """WCAG 2.2, 1.4.11: what has to be seen to understand a figure needs a ratio of 3."""
    text = write_report(grpo(tmp_path)).read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\n *\}", text, re.S)
    for block in blocks[:2]:
        scheme = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        colours = [scheme[name] for name in ("tuned", "eval", *(f"line-{i}" for i in range(1, 6)))]
        for colour in colours:
            low, high = sorted((luminance(colour), luminance(scheme["surface"])))
            assert (high + 0.05) / (low + 0.05) >= 3, colour
        assert len(set(colours)) == 7


def test_cards_name_method_rewards_and_chain(tmp_path: Path) -> None:
    fields, body = front_matter(grpo(tmp_path))
    assert fields["tags"] == ["retort", "grpo", "lora"]
    assert "A LoRA adapter for `embedded:tiny`, trained with GRPO from one Retort recipe." in body
    settings = "loss dapo; beta 0.02; completions per step 8 prompts × 4"
    assert f"| Method | GRPO, group-relative policy optimisation; {settings} |" in body
    assert "- `think`, weight 0.3: 1 where the completion is one thinking block and then an answer" in body
    assert "| Loss on | completions that it writes itself" in body and "tokens per step" not in body
    model = {"base": "embedded:tiny", "quantization": "none", "run": "runs/x", "merge": False}
    _, body = front_matter(dpo(tmp_path, model=model))
    assert "It continues `runs/x`." in body and 'PeftModel.from_pretrained(base, "adapter")' in body
    assert "| Start | continues `runs/x`: the same adapter is trained on |" in body
    assert "Base is the model of `runs/x`, where this run began." in body
    _, body = front_matter(dpo(tmp_path, model=model | {"merge": True}))
    assert "It was trained on the merged model of `runs/x`." in body
    assert "The adapter sits on `runs/x`, merged, and on nothing else." in body
    assert "PeftModel" not in body and 'AutoModelForCausalLM.from_pretrained("export")' in body
    compile(body.split("```python\n")[1].split("```")[0], "snippet", "exec")


def test_card_of_a_reward_model_loads_scores(tmp_path: Path) -> None:
    fields, body = front_matter(write_method(tmp_path, {"type": "reward", "center": None}, preferred_lines(40)))
    assert fields["pipeline_tag"] == "text-classification"
    assert "trained as a reward model from one Retort recipe." in body
    assert 'AutoModelForSequenceClassification.from_pretrained("recipes/embedded/tiny", num_labels=1)' in body
    assert "model.generate" not in body and "logits[0, 0]" in body
    compile(body.split("```python\n")[1].split("```")[0], "snippet", "exec")


def test_page_parses_for_every_method(tmp_path: Path) -> None:
    for kind, lines in (("kto", preferred_lines(40)), ("reward", preferred_lines(40)), ("new", rewarded_lines(40))):
        write_method(tmp_path, {"type": kind}, lines)
        page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
        assert page.open == [] and {"kto": "KTO", "reward": "Reward model", "new": "NEW"}[kind] in page.text("top")
