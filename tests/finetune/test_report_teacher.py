"""The report and the card of a distillation: costs, what became of the answers, the teacher beside base and student."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from run_fixture import (
    EVAL,
    HOSTILE,
    MANIFEST,
    RECIPE,
    metric_lines,
    preferred_lines,
    sample_rows,
    write_method,
)
from test_report import DAMAGED, Page, change, front_matter, luminance, report
from test_report_methods import SHOWN, titles, write_rows

from finetune.callbacks import watched
from finetune.charts import funnel, spread_chart
from finetune.comparison import compared
from finetune.report import write_report
from finetune.report_panels import panels
from finetune.run_files import read_run

TEACHER: dict[str, Any] = {
    "model": "example-org/large-teacher@0123456789abcdef",
    "engine": {"http": {"urls": ["http://127.0.0.1:8000/v1"]}},
    "samples": 3,
    "filters": [{"truncated": {}}, {"empty": {}}, {"verified": {"at_least": 1.0}}, {"length": {"max_tokens": None}}],
    "keep": "best",
    "logits": {"kind": "topk", "k": 32, "draws": 50, "temperature": 1.0, "spread": 1.0},
    "price": {"currency": "EUR", "prompt": 0.5, "completion": 2.0, "hour": 1.5},
}
STATS: dict[str, Any] = {
    "requests": 440,
    "calls_made": 40,
    "from_journal": 400,
    "completions": 440,
    "prompt_tokens": 40_000,
    "completion_tokens": 20_000,
    "truncated": 11,
    "kept": 80,
    "rejected": {"truncated": 10, "verified": 150, "not_best": 120, "round_1_truncated": 4},
    "paid": {"answers": 440, "prompt_tokens": 40_000, "completion_tokens": 20_000},
    "seconds": 160.0,
    "cost": 0.127,
}
ANSWER = {"prompt": "Which clause?", "completion": "a cap", "reason": "", "detail": "", "tokens": 3, "score": 1.0}
SUMMARY: dict[str, Any] = {
    "teacher": TEACHER["model"],
    "engine": "http",
    "sampling": "preset large (its card); temperature from the recipe",
    "samples": 3,
    "rounds": ["question", "answer"],
    "candidates": 360,
    "kept": 80,
    "tagged": {"empty": 0, "length": 2, "truncated": 10, "verified": 155, "vote": 90},
    "rejected": {"not_best": 120, "truncated": 10, "verified": 150},
    "prompt_tokens": 40_000,
    "completion_tokens": 20_000,
    "journal_bytes": 102_400,
    "currency": "EUR",
    "scores": 0.5694,
    "lengths": {
        "all": {"counts": [200, 159, 0, 1], "edges": [2.0, 9.5, 17.0, 24.5, 32.0]},
        "kept": {"counts": [60, 20], "edges": [2.0, 7.0, 12.0]},
    },
    "samples_kept": [ANSWER, ANSWER | {"score": None}],
    "samples_rejected": [
        ANSWER | {"reason": "truncated", "detail": "cut after 32 tokens", "tokens": 32, "score": 0.0},
        ANSWER | {"reason": "verified", "detail": "marked 0", "completion": "no cap", "score": 0.0},
        ANSWER | {"reason": "verified", "detail": "marked 0", "score": 0.0},
    ],
}
SESSIONS = [  # the first tells of itself twice
    {"began": "2026-11-27T17:12:19+00:00", "seconds": 30.0, "calls": 1, "engine": "http", "shard": [1, 2]},
    {"began": "2026-11-27T17:12:19+00:00", "seconds": 70.0, "calls": 399, "engine": "http", "shard": [1, 2]},
    {"began": "2026-11-27T18:12:19+00:00", "seconds": 60.0, "calls": 40, "engine": "http", "shard": [1, 1]},
]
LOGITS: dict[str, Any] = {
    "kind": "logits",
    "about": {"logits": TEACHER["logits"], "teacher": {"model": TEACHER["model"]}},
    "counts": {"rows": 80, "positions": 4_000, "bytes": 819_200, "bytes_per_token": 204.8, "head_mass": 0.9903},
}
PROMPTS = [
    {"role": "data", "ref": "embedded:legal:train", "sha256": "ab" * 32, "license": "CC0-1.0", "rows": 120},
    {"role": "eval", "ref": "embedded:legal:heldout", "sha256": "cd" * 32, "license": "CC0-1.0"},
]
LINEAGE = [
    {"name": TEACHER["model"], "role": "teacher", "kind": "model", "claims": [{"stated": "MIT", "licence": "mit"}]},
]
MODES: dict[str, dict[str, Any]] = {
    "sequence": {"type": "distill", "mode": "sequence"},
    "logits": {"type": "distill", "mode": "logits", "answers": "teacher", "cross_entropy": 0.1},
    "on_policy": {"type": "distill", "mode": "on_policy", "beta": 1.0, "prompts_per_step": 16, "max_new_tokens": 64},
    "preference": {
        "type": "distill",
        "mode": "preference",
        "pairs": "teacher",
        "dpo": {"type": "dpo", "loss": {"sigmoid": 1.0}, "beta": 0.1, "reference_free": False},
    },
}
FILES = (
    "teacher/stats.json",
    "teacher/summary.json",
    "teacher/sessions.jsonl",
    "teacher/answers.jsonl",
    "teacher/identity.json",
    "teacher/rows/manifest.json",
    "prompts/manifest.json",
    "logits/manifest.json",
)


def side(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": value - 0.05 if low is None else low, "high": value + 0.05 if high is None else high}


def taught_eval() -> dict[str, Any]:
    """The fixture's evaluation with a teacher for the metrics of texts."""
    found = json.loads(json.dumps(EVAL))
    for name, value in {"exact_match": 0.95, "label_accuracy": 0.95, "macro_f1": 0.12, "token_f1": 0.9}.items():
        found["metrics"][name] |= {"teacher": side(value), "teacher_p_value": 0.002}
    return found


def soft_lines(steps: int = 40) -> list[dict[str, Any]]:
    """metrics.jsonl of mode logits, measured every quarter."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        gain = step / steps
        line = {"loss": 4.0 - 3 * gain, "divergence": 4.0 - 3.5 * gain, "token_loss": 4.5 - 3 * gain}
        line |= {"head_mass": 0.99, "student_head_mass": 0.6 + 0.35 * gain, "agreement": 0.4 + 0.5 * gain}
        lines.append({"step": step, "seconds": 2.0 * step, "learning_rate": 1e-4, **line, "calibration_error": 0.12})
        if step % (steps // 4) == 0:
            lines.insert(-1, {"step": step, "eval_loss": 3.0 - gain})
    return lines


def own_lines(steps: int = 40) -> list[dict[str, Any]]:
    """metrics.jsonl of mode on_policy, under the names that TRL's trainer logs."""
    lines = []
    for step in range(1, steps + 1):
        logs = {"loss": 1.0 / step, "entropy": 1.1, "completions/mean_length": 20.0 + step, "step_time": 1.0}
        logs |= {"completions/clipped_ratio": 0.0625, "completions/max_length": 60.0, "num_tokens": 100.0}
        lines.append({"step": step, "seconds": 2.0 * step, "loss": logs["loss"], **watched(logs)})
    return lines


LINES = {"sequence": metric_lines, "logits": soft_lines, "on_policy": own_lines, "preference": preferred_lines}


def distilled(folder: Path, mode: str = "logits", without: tuple[str, ...] = (), **changes: Any) -> Path:
    """A finished distillation with the files of its teacher.

    Args:
        without: files of the teacher that are not there.
        changes: sections of the recipe.
    """
    lines = preferred_lines(40) if mode == "preference" else LINES[mode]()
    write_method(folder, MODES[mode], lines, **({"teacher": TEACHER} | changes))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = [{"role": role, "ref": f"/somewhere/else/teacher/{name}", "sha256": "ef" * 32, "license": None}
            for role, name in (("data", "rows"), ("eval", "heldout"))]  # fmt: skip
    manifest |= {"inputs": [manifest["inputs"][0], *rows], "lineage": LINEAGE}
    change(folder, "manifest.json", manifest)
    change(folder, "eval.json", taught_eval())
    answers = [{"_prompt": str(i), "answer": "60 days", "reference": "60 days" if i else None} for i in range(4)]
    samples = [row | {"teacher": "sixty days", "teacher_correct": False} for row in sample_rows(4)]
    write_rows(folder, "samples.jsonl", samples)
    contents: dict[str, Any] = {
        "teacher/stats.json": STATS,
        "teacher/summary.json": SUMMARY,
        "teacher/sessions.jsonl": SESSIONS,
        "teacher/answers.jsonl": answers,
        "teacher/identity.json": {"model": TEACHER["model"], "sha256": "12" * 32},
        "teacher/rows/manifest.json": {"kind": "data", "counts": {"rows": 64 if mode == "preference" else 80}},
        "prompts/manifest.json": {"kind": "data", "inputs": PROMPTS},
        "logits/manifest.json": LOGITS,
    }
    left = {"teacher/summary.json", "teacher/rows/manifest.json"} if mode == "on_policy" else set()
    left |= {"logits/manifest.json"} if mode != "logits" else set()
    for name in contents.keys() - left - {*without}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            write_rows(folder, name, contents[name])
        else:
            change(folder, name, contents[name])
    return folder


def test_costs_of_a_kept_row(tmp_path: Path) -> None:
    teacher = report(distilled(tmp_path)).text("teacher")
    assert "example-org/large-teacher@0123456789abcdef gave 3 answers to each prompt, after question." in teacher
    assert "Rows that ended before their last round: 4 round 1 truncated." in teacher
    assert "Engine http Sampling preset large (its card); temperature from the recipe" in teacher
    assert "Answers kept 80 22.2% of 360 answers Answers of the teacher 440 440 questions" in teacher
    assert "Cut at the longest length 11 2.5% of them Mean mark 0.569 of all answers" in teacher
    assert "In all Per kept row Prompt tokens read 40,000 500.0 every round" in teacher
    assert "Answer tokens written 20,000 250.0" in teacher
    assert "Time 2 min 40 s 2 s 2 sessions with 440 calls; filters and scoring included; machines added up" in teacher
    assert "Journal 100.00 KiB 1.25 KiB" in teacher and "Distributions 800.00 KiB 10.00 KiB in logits/" in teacher
    # 0.04 × 0.5 + 0.02 × 2 + 160 / 3600 × 1.5
    assert "Money 0.127 EUR 0.00158 EUR at 0.5 a million prompt tokens, 2 a million answer tokens, 1.5 an" in teacher


def test_answers_that_are_not_in_use_any_more_are_counted_and_named(tmp_path: Path) -> None:
    paid = {"answers": 441, "prompt_tokens": 48_000, "completion_tokens": 24_000}
    teacher = report(change(distilled(tmp_path), "teacher/stats.json", STATS | {"paid": paid})).text("teacher")
    assert (
        "Prompt tokens read 48,000 600.0" in teacher and "Answer tokens written 24,000 300.0 1 answer that" in teacher
    )
    assert "Money 0.139 EUR" in teacher  # 0.048 × 0.5 + 0.024 × 2 + 160 / 3600 × 1.5
    # An older run tells no more than what is in use.
    without = {key: value for key, value in STATS.items() if key != "paid"}
    older = report(change(tmp_path, "teacher/stats.json", without)).text("teacher")
    assert "Answer tokens written 20,000 250.0" in older


def test_without_a_price_there_is_no_money(tmp_path: Path) -> None:
    distilled(tmp_path, teacher=TEACHER | {"price": None})
    assert "Money" not in report(tmp_path).text("teacher")


def test_funnel_from_all_answers_to_the_kept(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    assert (
        "What became of the answers: answers: 360, 100.0%; truncated: 10, 2.8%; not verified: 150, 41.7%; "
        "not best: 120, 33.3%; kept: 80, 22.2%"
    ) in page.text("teacher")
    kinds = [attrs for tag, attrs in page.tags if tag == "rect" and attrs.get("class") in ("all", "lost", "kept")]
    assert [bar["class"] for bar in kinds] == 2 * ["all", "lost", "lost", "lost", "kept"]  # for wide and narrow pages
    narrow = [(float(str(bar["x"])), float(str(bar["width"]))) for bar in kinds[5:]]
    # 120 units for 360 answers: each loss begins where the next bar ends.
    assert narrow == [(150.0, 120.0), (266.7, 3.3), (216.7, 50.0), (176.7, 40.0), (150.0, 26.7)]


def test_a_funnel_that_does_not_add_up_still_fits() -> None:
    found = funnel("Answers", ("answers", 10), [("a", 20), ("b", 0)], ("kept", 20), 420.0)
    assert found is not None
    assert [(step.x, step.width, step.value) for step in found.steps] == [
        (150.0, 30.0, "10"),  # what is said to have been there, though 40 were accounted for
        (210.0, 60.0, "20 · 50.0%"),
        (210.0, 0.0, "0 · 0.0%"),
        (150.0, 60.0, "20 · 50.0%"),
    ]
    assert funnel("Answers", ("answers", 0), [], ("kept", 0), 510.0) is None


def test_what_was_only_counted_is_told_from_what_was_dropped(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    teacher = page.text("teacher")
    assert "truncated 10 2.8% 10 The answer was cut at max_tokens" in teacher
    assert "empty 0 0.0% 0 There is no answer" in teacher
    assert "length 2 0.6% 0 The answer is shorter or longer, in tokens" in teacher
    assert "verified 155 43.1% 150 The sum of teacher.verify is lower (at least 1)" in teacher
    assert "vote 90 25.0% only counted The answer differs from that of most samples of its prompt" in teacher
    assert "not best 120 33.3% 120 A better answer to the prompt is kept" in teacher
    assert page.count("td", **{"class": "num care"}) == 1 and page.count("td", **{"class": "num bad"}) == 3


def test_lengths_of_all_and_kept_answers_share_an_axis(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    teacher = page.text("teacher")
    assert "Length of all answers: 360 answers of 2 to 32 tokens" in teacher
    assert "2 to 9 tokens: 200 answers 10 to 16 tokens: 159 answers 25 to 32 tokens: 1 answer" in teacher
    assert "Length of kept answers: 80 answers of 2 to 12 tokens" in teacher
    bars = [attrs for tag, attrs in page.tags if tag == "rect" and attrs.get("class") == "count"]
    # From 62 to 496 for 0 to 32 tokens.
    assert [str(bar["x"]) for bar in bars] == ["89.1", "190.8", "394.3", "89.1", "156.9"]


def test_a_spread_of_one_value_is_one_bar() -> None:
    said: dict[str, Any] = {"width": 510.0, "height": 250.0, "axis": "tokens", "noun": "answer"}
    chart = spread_chart("Length", [7], [2.5, 3.5], reach=(0.0, 3.5), **said)
    assert chart is not None and [bar.text for bar in chart.bars] == ["3 tokens: 7 answers"]
    chart = spread_chart("Length", [1], [-0.5, 0.5], reach=(-0.5, 0.5), **said)
    assert chart is not None and [bar.text for bar in chart.bars] == ["0 tokens: 1 answer"]
    assert spread_chart("Length", [0, 0], [1, 2, 3], reach=(1, 3), **said) is None


def test_distributions_and_their_curves(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    teacher, training = page.text("teacher"), page.text("training")
    assert "What is kept of its distributions: the 32 likeliest tokens and the rest's mass" in teacher
    assert "Bytes a token 204.8 800.00 KiB in all Head mass 99.0% of the teacher's probability lies on" in teacher
    assert "Tokens 4,000 of 80 rows" in teacher
    assert titles(tmp_path)[:3] == ["What became of the answers", "All answers by length", "Kept answers by length"]
    assert titles(tmp_path)[3:] == [
        "Training loss",
        "Divergence from the teacher",
        "Agreement",
        "Probability on the kept tokens",
        "Calibration error",
        "Cross-entropy",
        "Learning rate",
    ]
    average = "the bold line is a moving average over 5 steps"
    assert f"Training loss over 40 logged steps: first 3.925, last 1.000; {average}" in training  # another loss
    assert "student first 60.9%, last 95.0%; teacher first 99.0%, last 99.0%" in training
    assert "Agreement over 40 logged steps: first 41.2%, last 90.0%" in training
    assert "Calibration error last 12.0% Between how sure the student is of its likeliest token" in training
    assert "Cross-entropy over 40 logged steps: first 4.425, last 1.500; held out first 2.750, last 2.000" in training
    assert page.open == [] and all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))


def test_sampled_distributions_are_said_to_be_draws(tmp_path: Path) -> None:
    spec = TEACHER["logits"] | {"kind": "sampled", "temperature": 2.0}
    distilled(tmp_path, teacher=TEACHER | {"logits": spec})
    page = report(change(tmp_path, "logits/manifest.json", LOGITS | {"about": {"logits": spec}}))
    assert "What is kept of its distributions: 50 draws, at temperature 2" in page.text("teacher")
    assert "its importance weights stand for the whole" in page.text("teacher")
    assert "Kullback-Leibler, over tokens that were drawn of it, in nats per token." in page.text("training")


def test_the_loss_logs_under_the_names_that_are_drawn(tmp_path: Path) -> None:
    """From the sums of a real loss to the series of the report."""
    import torch

    from finetune.losses import BINS, SUMS, summary

    sums = torch.ones(len(SUMS) + 3 * BINS, dtype=torch.float64)
    logged = watched(summary(sums))
    keys = {"divergence", "token_loss", "head_mass", "student_head_mass", "agreement", "calibration_error"}
    assert set(logged) == keys and logged["head_mass"] == 1.0
    assert watched({"matched_loss": 2.0, "unmatched_loss": 1.0}) == {"matched_loss": 2.0, "unmatched_loss": 1.0}
    _, groups = panels(read_run(distilled(tmp_path)))
    drawn = {key for title, found in groups if title == "Teacher and student" for p in found for key, _ in p.curves}
    assert drawn == {*keys, "matched_loss", "unmatched_loss"}


def test_on_policy_shows_completions_and_the_teacher_beside(tmp_path: Path) -> None:
    page = report(distilled(tmp_path, "on_policy"))
    assert "works beside the student while it trains, and marks its answers token by token." in page.text("teacher")
    assert "Answer tokens written 20,000 –" in page.text("teacher") and "kept" not in page.text("teacher")
    assert titles(tmp_path) == ["Training loss", "Completion length", "Truncated completions", "Entropy"]
    training = page.text("training")
    assert "Divergence from the teacher on the student's own answers, in nats per token." in training
    assert "Completion length last 60.00 Mean, in tokens. Healthy: comes near the length of the teacher's" in training
    top = page.text("top")
    assert "Method Distillation (on policy), LoRA, r 16, alpha 32 a teacher marks every token" in top
    assert "Beta 1 reverse KL Completions per step 16 of up to 64 tokens" in top
    assert "Trained tokens – completions are trained, not prompts" in page.text("data")
    assert "none of their tokens carries loss" in page.text("masks")
    assert "not written" not in page.text("result")
    body = front_matter(tmp_path)[1]
    assert "| Loss on | completions that it writes itself, marked token by token by the teacher |" in body


def test_on_policy_without_the_stage_has_no_section(tmp_path: Path) -> None:
    distilled(tmp_path, "on_policy", without=FILES)
    page = report(tmp_path)
    assert "teacher" not in page.texts and "not written" not in page.text("result")


def test_gold_draws_matched_and_other_tokens(tmp_path: Path) -> None:
    distilled(tmp_path, "on_policy")
    write_rows(tmp_path, "metrics.jsonl", [line | {"matched_loss": 2.0, "unmatched_loss": 1.0} for line in own_lines()])
    report(tmp_path)
    assert titles(tmp_path)[1] == "Loss of matched and of other tokens"


def test_sequence_is_read_as_supervised_fine_tuning(tmp_path: Path) -> None:
    page = report(distilled(tmp_path, "sequence"))
    assert "Method Distillation (sequence), LoRA" in page.text("top")
    assert "Falls fast, then levels off. A held-out loss that rises again" in page.text("training")
    assert "; held out first" in page.text("training") and "Held-out loss" not in titles(tmp_path)
    assert "Distributions" not in page.text("teacher") and "of its distributions" not in page.text("teacher")
    assert "not written" not in page.text("result").replace("watched.jsonl: not written", "")


def test_preference_is_read_as_dpo(tmp_path: Path) -> None:
    page = report(distilled(tmp_path, "preference"))
    assert "Distillation (preference), LoRA" in page.text("top") and "Loss sigmoid Beta 0.1" in page.text("top")
    assert {"Reward accuracy", "Margin", "Preference accuracy", "Held-out loss"} <= set(titles(tmp_path))
    assert "Pairs 64 of an answer of the teacher and one of the student" in page.text("teacher")
    assert "In all Per pair Prompt tokens read 40,000 625.0" in page.text("teacher")
    assert "80 of 360 answers kept, 64 rows made of them" in front_matter(tmp_path)[1]


def test_base_student_and_teacher_are_compared(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    result, comparison = page.text("result"), page.text("comparison")
    assert "Exact match, base to student 12.1% → 82.9%" in result
    assert "Teacher 95.0% . The student closes 85.4% of the gap between base and teacher." in result.replace(
        "%.", "% ."
    )
    assert "It is still below its teacher (p = 0.002)." in result and "teacher 90.0% to 100.0%" in result
    assert "Base, student and teacher All on the same 240 held-out rows." in comparison
    assert "1 of 4 of the held-out prompts have no answer of their own" in comparison
    assert (
        "Exact match 12.1% 8.3% to 16.2% 82.9% 77.9% to 87.5% 95.0% 90.0% to 100.0% +70.8 points p < 0.001 0.002 better"
        in comparison
    )
    assert "Held-out loss 3.912 3.801 to 4.020 0.634 0.581 to 0.690 – −3.278 p < 0.001 – better" in comparison
    assert "The teacher is not shown to be better than the base here, so there is no gap to close." in comparison
    dots = [attrs for tag, attrs in page.tags if tag == "circle" and attrs.get("class") == "dot teacher"]
    assert len(dots) == 5  # four metrics and the headline


@pytest.mark.parametrize(
    ("base", "tuned", "teacher", "p", "teacher_p", "said"),
    [
        (
            0.2,
            0.5,
            0.8,
            0.001,
            0.001,
            "closes 50.0% of the gap between base and teacher. It is still below its teacher",
        ),
        (0.2, 0.7, 0.8, 0.001, 0.2, "It is below its teacher; that the two differ is not shown (p = 0.200)."),
        (0.2, 0.3, 0.8, 0.3, 0.001, "closes 16.7% of the gap between base and teacher, a gain that is not shown to be"),
        (0.2, 0.9, 0.8, 0.001, 0.01, "The student stands above its teacher (p = 0.010)."),
        (0.2, 0.8, 0.8, 0.001, None, "The student does as well as its teacher."),
        (0.2, 0.1, 0.8, 0.001, 0.0001, "The student closes nothing of the gap to its teacher (p < 0.001)."),
        (0.2, 0.5, 0.25, 0.001, 0.001, "The teacher is not shown to be better than the base here"),
        (0.8, 0.5, 0.2, 0.001, 0.001, "The teacher is not shown to be better than the base here"),
    ],
)
def test_the_gap_in_words(base: float, tuned: float, teacher: float, p: float, teacher_p: float, said: str) -> None:
    result = {"base": side(base), "tuned": side(tuned), "teacher": side(teacher)}
    result |= {"p_value": p, "teacher_p_value": teacher_p}
    (metric,) = compared({"metrics": {"exact_match": result}})
    assert said in metric["gap"] and metric["student"] == "student"
    # A metric where less is better is read the other way round.
    turned = {who: side(1 - result[who]["value"]) for who in ("base", "tuned", "teacher")}
    (metric,) = compared({"metrics": {"loss": result | turned}})
    assert said in metric["gap"]


def test_without_a_teacher_nothing_is_said_of_a_gap() -> None:
    (metric, *_) = compared(EVAL)
    assert metric["teacher"] is None and metric["gap"] == "" and metric["student"] == "tuned"


def test_samples_stand_side_by_side(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    samples = page.text("samples")
    assert (
        "Reference 60 days Base ✗ wrong the party the party of the Student ✓ right 60 days Teacher ✗ wrong sixty"
        in (samples)
    )
    assert page.count("div", **{"class": "answers four"}) == 4


def test_rejected_answers_are_shown_by_reason(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    teacher = page.text("teacher")
    assert "Truncated: 1 of 10 32 tokens, mark 0.000 cut after 32 tokens Prompt Which clause?" in teacher
    assert "Not verified: 2 of 150 3 tokens, mark 0.000 marked 0 Prompt Which clause? Teacher no cap" in teacher
    assert "Some of the kept answers 3 tokens, mark 1.000 Prompt Which clause? Teacher a cap 3 tokens Prompt" in teacher


def test_lineage_names_teacher_and_prompts(tmp_path: Path) -> None:
    page = report(distilled(tmp_path))
    lineage = page.text("lineage")
    assert "Lineage: 6 inputs, the run legal, its adapter" in lineage and "distill, logits legal" in lineage
    assert f"teacher {TEACHER['model']} MIT – 121212121212" in lineage
    assert "prompts embedded:legal:train CC0-1.0 120 abababababab eval embedded:legal:heldout CC0-1.0" in lineage
    assert "data teacher/rows as its sources – efefefefefef eval teacher/heldout as its sources" in lineage


def test_card_says_who_taught_it(tmp_path: Path) -> None:
    fields, body = front_matter(distilled(tmp_path))
    assert fields["tags"] == ["retort", "distillation", "lora"]
    model = TEACHER["model"]
    assert "trained by distillation (logits) from one Retort recipe." in body
    assert f"What it learnt comes from the teacher `{model}`, in mode logits: 80 of 360 answers kept." in body
    assert "The teacher has 95.0%. The student closes 85.4% of the gap between base and teacher." in body
    assert f"| Teacher | `{model}`, run by http |" in body
    assert "| Its answers | 80 of 360 answers kept; dropped: 10 truncated, 150 not verified, 120 not best |" in body
    kept = "the 32 likeliest tokens and the rest's mass"
    assert f"| Its distributions | {kept}; 204.8 bytes a token, head mass 99.0% |" in body
    assert f"kept beforehand; kept of each {kept}; cross-entropy 10% of the loss |" in body
    assert f"| teacher | `{model}` | MIT | – | `121212121212` |" in body
    table = next(line for line in body.split("\n") if line.startswith("| Exact match"))
    assert table == (
        "| Exact match | 12.1% | 8.3% to 16.2% | 82.9% | 77.9% to 87.5% | +70.8 points | &lt; 0.001 | 95.0% | "
        "90.0% to 100.0% | 0.002 |"
    )
    rows = body[body.index("| Metric |") :].split("\n\n")[0].split("\n")
    assert {line.count("|") for line in rows} == {11} and len(rows) == 2 + 6
    compile(body.split("```python\n")[1].split("```")[0], "snippet", "exec")


def test_rows_that_were_given_are_scored(tmp_path: Path) -> None:
    distilled(tmp_path, without=("teacher/summary.json", "teacher/rows/manifest.json"))
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    manifest["recipe"]["method"] = MODES["logits"] | {"answers": "given"}
    page = report(change(tmp_path, "manifest.json", manifest))
    assert "scored rows that were there already." in page.text("teacher")
    assert "In all Per row Prompt tokens read 40,000 500.0" in page.text("teacher")
    assert "summary.json" not in page.text("result")


@pytest.mark.parametrize("name", ["teacher/stats.json", "teacher/summary.json", "logits/manifest.json"])
def test_each_missing_piece_of_the_teacher_is_named(tmp_path: Path, name: str) -> None:
    page = report(distilled(tmp_path, without=(name,)))
    assert page.text("result").count("not written") == 1 and f"{name}: not written" in page.text("result")
    assert "teacher" in page.texts and page.open == []


def test_nothing_of_the_teacher(tmp_path: Path) -> None:
    page = report(distilled(tmp_path, without=FILES))
    assert "teacher" not in page.texts and page.text("result").count("not written") == 4
    assert "in mode logits." in front_matter(tmp_path)[1]


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("name", FILES)
def test_damaged_pieces_of_the_teacher_do_not_crash(tmp_path: Path, name: str, content: str) -> None:
    (distilled(tmp_path) / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    page = report(tmp_path)
    noted = f"{name}: " in page.text("result")
    # A whole object without what is looked for is no damage that can be told; what is missing is shown as a dash.
    assert page.open == [] and (noted or content.startswith('{"metrics"'))
    assert front_matter(tmp_path)[0]["library_name"] == "peft"


def test_parts_of_another_shape_are_left_out_and_named(tmp_path: Path) -> None:
    lengths = {"all": {"counts": [1, 2], "edges": [1, 2]}, "kept": {"counts": [1], "edges": [3, 2]}}
    found = SUMMARY | {
        "lengths": lengths,
        "tagged": [1],
        "rejected": {"truncated": "many", "verified": 150},
        "kept": -1,
    }
    page = report(change(distilled(tmp_path), "teacher/summary.json", found))
    for problem in (
        "no number for kept",
        "rejected of truncated left out: not a number",
        "tagged left out: not a table of counts",
        "the lengths of all answers left out: not counts between ascending edges",
        "the lengths of kept answers left out: not counts between ascending edges",
    ):
        assert f"teacher/summary.json: {problem}" in page.text("result")
    assert "Answers kept 80 22.2% of 360 answers" in page.text("teacher")  # as stats.json has it
    assert "by length" not in page.text("teacher")


@pytest.mark.parametrize(
    "wrong", [None, True, 3, "x", [], {}, [3], [{}], {"a": [1]}, 1e308, -1e308, 5e-324, [[1, 2], {}]], ids=repr
)
def test_wrong_types_and_extreme_numbers_of_the_teacher(tmp_path: Path, wrong: object) -> None:
    distilled(tmp_path)
    lengths = {"all": {"counts": wrong, "edges": wrong}, "kept": {"counts": [wrong], "edges": [0, wrong]}}
    answers = [dict.fromkeys(ANSWER, wrong)]
    for name, content in {
        "teacher/stats.json": dict.fromkeys(STATS, wrong),
        "teacher/summary.json": dict.fromkeys(SUMMARY, wrong),
        "logits/manifest.json": {"about": {"logits": dict.fromkeys(TEACHER["logits"], wrong)}, "counts": wrong},
        "teacher/identity.json": {"sha256": wrong},
        "prompts/manifest.json": {"inputs": wrong},
    }.items():
        assert report(change(tmp_path, name, content)).open == []
    counts = dict.fromkeys(LOGITS["counts"], wrong)
    change(tmp_path, "logits/manifest.json", {"about": wrong, "counts": counts})
    spoilt = {key: dict.fromkeys(SUMMARY[key], wrong) for key in ("tagged", "rejected")} | {"lengths": lengths}
    spoilt |= {"samples_rejected": answers, "samples_kept": answers}
    assert report(change(tmp_path, "teacher/summary.json", SUMMARY | spoilt)).open == []
    write_rows(tmp_path, "teacher/sessions.jsonl", [dict.fromkeys(SESSIONS[0], wrong)])
    write_rows(tmp_path, "teacher/answers.jsonl", [{"reference": wrong}])
    assert report(tmp_path).open == []
    metrics = {"exact_match": EVAL["metrics"]["exact_match"] | {"teacher": wrong, "teacher_p_value": wrong}}
    values = {"exact_match": EVAL["metrics"]["exact_match"] | {"teacher": {"value": wrong, "low": wrong, "high": 0.5}}}
    for found in (metrics, values):
        assert report(change(tmp_path, "eval.json", {"n": 4, "metrics": found})).open == []
    for method in (MODES["logits"], dict.fromkeys(MODES["logits"], wrong) | {"type": "distill"}):
        for teacher in (wrong, dict.fromkeys(TEACHER, wrong), TEACHER | {"price": {"hour": wrong}, "filters": [wrong]}):
            recipe = RECIPE | {"method": method, "teacher": teacher}
            assert report(change(tmp_path, "manifest.json", MANIFEST | {"recipe": recipe})).open == []
            assert front_matter(tmp_path)[0]["pipeline_tag"] == "text-generation"


def test_hostile_text_of_the_teacher_stays_text(tmp_path: Path) -> None:
    spec = TEACHER["logits"] | {"kind": HOSTILE}
    teacher = {"model": HOSTILE, "engine": {HOSTILE: {}}, "filters": [{HOSTILE: {HOSTILE: HOSTILE}}], "logits": spec}
    distilled(tmp_path, teacher=teacher | {"price": {"currency": HOSTILE, "hour": 1.0}, "license": HOSTILE})
    answer = dict.fromkeys(ANSWER, HOSTILE)
    counts = {HOSTILE: 3}
    found = SUMMARY | {"sampling": HOSTILE, "engine": HOSTILE, "rounds": [HOSTILE, HOSTILE], "currency": HOSTILE}
    found |= {"tagged": counts, "rejected": counts, "samples_kept": [answer], "samples_rejected": [answer]}
    change(tmp_path, "teacher/summary.json", found)
    change(tmp_path, "teacher/stats.json", STATS | {"rejected": {f"round_{HOSTILE}": 3}})
    change(tmp_path, "teacher/identity.json", {"sha256": HOSTILE})
    change(tmp_path, "prompts/manifest.json", {"inputs": [dict.fromkeys(PROMPTS[0], HOSTILE)]})
    write_rows(tmp_path, "samples.jsonl", [sample_rows(2)[0] | {"teacher": HOSTILE, "teacher_correct": HOSTILE}])
    page = report(tmp_path)
    assert page.count("script") == page.count("img") == page.count("iframe") == 0 and page.count("style") == 1
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")] and page.open == []
    assert [section for section in ("top", "teacher", "lineage", "samples") if SHOWN not in page.text(section)] == []
    body = front_matter(tmp_path)[1].split("<details>")[0]
    assert "<script>" not in re.sub(r"(`+)[^\n]+?\1", "", body)


def test_the_teacher_has_a_colour_of_its_own(tmp_path: Path) -> None:
    """WCAG 2.2, 1.4.11: what has to be seen to understand a figure needs a ratio of 3."""
    text = write_report(distilled(tmp_path)).read_text(encoding="utf-8")
    for block in re.findall(r":root \{(.*?)\n *\}", text, re.S)[:2]:
        scheme = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        low, high = sorted((luminance(scheme["teacher"]), luminance(scheme["surface"])))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # it colours text too
        assert scheme["teacher"] not in (scheme["tuned"], scheme["base"], scheme["eval"])


@pytest.mark.parametrize("width", (390, 760, 1280))
@pytest.mark.parametrize("mode", ["logits", "preference"])
def test_the_page_of_a_distillation_fits(browser: Browser, tmp_path: Path, width: int, mode: str) -> None:
    counts = {"not_best": 1_234_567, "a_reason_with_a_very_long_name_that_nobody_foresaw": 3_000_000}
    distilled(tmp_path, mode)
    found = SUMMARY | {"candidates": 9_000_000, "kept": 4_765_433, "rejected": counts}
    browser.open(write_report(change(tmp_path, "teacher/summary.json", found)), width)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.complaints == [] and browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('section').length") == 12
    outside = """[...document.querySelectorAll('main p, main h2, main h3, main dd, main svg')].filter(e =>
        !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""
    assert browser.value(outside) == 0
    # No label of the bars runs into a bar, and no count either.
    clash = """[...document.querySelectorAll('svg.funnel')].filter(s => s.getBoundingClientRect().width).flatMap(s =>
        [...s.querySelectorAll(':scope > g')].filter(g => {
            const [label, count] = [...g.querySelectorAll('text')].map(t => t.getBoundingClientRect());
            const bars = [...g.querySelectorAll('rect')].map(r => r.getBoundingClientRect());
            const svg = s.getBoundingClientRect();
            return label.left < svg.left - 1 || bars.some(b => label.right > b.left || count.left < b.right);
        })).length"""
    assert browser.value("document.querySelectorAll('svg.funnel').length") == 2
    assert browser.value(clash) == 0


def test_a_run_by_another_method_has_no_teacher(tmp_path: Path) -> None:
    page = Page(write_report(write_method(tmp_path, {"type": "sft"}, metric_lines())).read_text(encoding="utf-8"))
    assert "teacher" not in page.texts and page.count("div", **{"class": "answers four"}) == 0
    assert "Base and tuned" in page.text("comparison") and "eacher" not in page.text("comparison")


@pytest.mark.slow
def test_the_files_of_a_real_teacher_are_read_without_a_complaint(tmp_path: Path) -> None:
    """The stage itself, and the report of what it left, before any training."""
    from distill.generate import generate
    from recipes.load import load_recipe

    content = {
        "name": "taught",
        "output": str(tmp_path / "run"),
        "model": {"base": "embedded:tiny"},
        "data": {
            "train": [{"embedded": "legal", "limit": 16}],
            "eval": [{"embedded": "legal", "split": "heldout", "limit": 4}],
        },
        "teacher": {
            "model": "embedded:tiny-teacher",
            "sampling": {"max_tokens": 6},
            "filters": ["truncated", "empty"],
            "logits": {"k": 16},
            "price": {"completion": 1e6},
        },
        "method": {"type": "distill", "mode": "logits"},
        "train": {"seq_len": 352, "device": "cpu"},
        "eval": {"samples": 4},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content), encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    stats = generate(recipe, say=lambda _: None)
    (recipe.run_dir / "recipe.yaml").write_text(json.dumps(recipe.resolved()), encoding="utf-8")
    page = report(recipe.run_dir)
    teacher, result = page.text("teacher"), page.text("result")
    cut, kept = stats["rejected"]["truncated"], stats["kept"]
    assert cut > 0 and kept + cut == 16
    assert f"answers: 16, 100.0%; truncated: {cut}, {100 * cut / 16:.1f}%; kept: {kept}, " in teacher
    tokens = stats["completion_tokens"]
    assert f"Answer tokens written {tokens} {tokens / kept:.1f}" in teacher
    assert f"Money {tokens:,}.00 USD {tokens / kept:,.2f} USD at 1,000,000 a million answer tokens" in teacher
    assert "Length of all answers: 16 answers of" in teacher and f"Length of kept answers: {kept} answers" in teacher
    assert f"of {json.loads((recipe.run_dir / 'logits/manifest.json').read_text())['counts']['rows']} rows" in teacher
    assert f"Truncated: {min(3, cut)}" in teacher and "cut after 6 tokens" in teacher
    assert "teacher/" not in result and "logits/" not in result and "eval.json: not written" in result
