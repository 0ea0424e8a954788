"""The numbers of eval.json against values computed by hand and against scipy-free reference formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune.stats import Answer, compare, is_exact, normalise, token_f1


def answers(texts: list[str], references: list[str], nll: float = 1.0, groups: list[str] | None = None) -> list[Answer]:
    names = groups or [str(i) for i in range(len(texts))]
    return [
        Answer(str(i), names[i], nll * (i + 1), i + 1, text, reference)
        for i, (text, reference) in enumerate(zip(texts, references, strict=True))
    ]


def test_values_by_hand() -> None:
    references = ["rent", "audit", "rent", "5 May 2024"]
    base = answers(["rent", "rent", "nothing", "5 May"], references, nll=2.0)
    tuned = answers(["rent", "audit", "rent", "5 May 2024 "], references, nll=0.5)
    metrics = ["loss", "perplexity", "exact_match", "token_f1", "label_accuracy", "macro_f1"]
    result = compare(base, tuned, metrics, labels=["rent", "audit", "payment"], resamples=500)
    value = {k: (m["base"]["value"], m["tuned"]["value"]) for k, m in result["metrics"].items()}
    assert result["n"] == 4
    assert value["loss"] == pytest.approx((2.0, 0.5))
    assert value["perplexity"] == pytest.approx((math.exp(2.0), math.exp(0.5)))
    assert value["exact_match"] == (0.25, 1.0)
    assert value["token_f1"] == pytest.approx(((1 + 0 + 0 + 0.8) / 4, 1.0))
    assert value["label_accuracy"] == pytest.approx((1 / 3, 1.0))
    # base: rent TP 1, predicted 2, actual 2 -> F1 0.5; audit TP 0, actual 1 -> 0; payment never occurs.
    assert value["macro_f1"] == pytest.approx((0.25, 1.0))
    for metric in result["metrics"].values():
        for who in ("base", "tuned"):
            assert metric[who]["low"] <= metric[who]["value"] + 1e-12
            assert metric[who]["high"] >= metric[who]["value"] - 1e-12


def test_the_interval_of_a_proportion_agrees_with_the_normal_formula() -> None:
    texts = ["a" if i % 5 else "b" for i in range(400)]
    base = answers(texts, ["a"] * 400)
    metric = compare(base, base, ["exact_match"], resamples=8000, seed=3)["metrics"]["exact_match"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert metric["base"]["low"] == pytest.approx(0.8 - half, abs=0.006)
    assert metric["base"]["high"] == pytest.approx(0.8 + half, abs=0.006)
    assert metric["p_value"] == 1.0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        texts = ["a" if hit else "b" for hit in generator.random(80) < 0.7]
        drawn = answers(texts, ["a"] * 80)
        interval = compare(drawn, drawn, ["exact_match"], resamples=400, seed=trial)["metrics"]["exact_match"]["base"]
        covered += interval["low"] <= 0.7 <= interval["high"]
    assert 0.89 <= covered / 200 <= 0.99


def test_the_permutation_test_agrees_with_the_exact_sign_test() -> None:
    """8 rows improve and 1 worsens: exact two-sided sign test 2 * (1 + 9) / 2^9 = 0.0391."""
    references = ["a"] * 30
    base = answers(["b"] * 8 + ["a"] + ["a"] * 21, references)
    tuned = answers(["a"] * 8 + ["b"] + ["a"] * 21, references)
    p = compare(base, tuned, ["exact_match"], resamples=20_000, seed=1)["metrics"]["exact_match"]["p_value"]
    assert p == pytest.approx(20 / 512, abs=0.005)


def test_false_alarms_are_as_rare_as_promised() -> None:
    generator = np.random.default_rng(5)
    alarms = 0
    for trial in range(200):
        texts = [["a" if hit else "b" for hit in generator.random(60) < 0.5] for _ in range(2)]
        base, tuned = (answers(t, ["a"] * 60) for t in texts)
        alarms += (
            compare(base, tuned, ["exact_match"], resamples=300, seed=trial)["metrics"]["exact_match"]["p_value"] < 0.05
        )
    assert alarms / 200 <= 0.085


def test_groups_are_drawn_whole() -> None:
    """Ten copies of each row are no more evidence than the row: the interval must not shrink."""
    texts = ["a" if i % 4 else "b" for i in range(40)]
    single = answers(texts, ["a"] * 40)
    copies = [Answer(f"{a.id}-{k}", a.group, a.nll, a.tokens, a.text, a.reference) for a in single for k in range(10)]
    one, ten = (
        compare(x, x, ["exact_match"], resamples=6000)["metrics"]["exact_match"]["base"] for x in (single, copies)
    )
    assert ten["high"] - ten["low"] == pytest.approx(one["high"] - one["low"], abs=0.03)


def test_normalisation_and_f1() -> None:
    assert normalise("  a\u00a0 b\n") == "a b" and normalise("ﬁve") == "five"
    assert is_exact(Answer("1", "1", 0, 1, "Five ", "Five")) and not is_exact(Answer("1", "1", 0, 1, "five", "Five"))
    assert not is_exact(Answer("1", "1", 0, 1, None, ""))
    assert token_f1("The cat sat.", "a cat sat down") == pytest.approx(2 * (2 / 2) * (2 / 3) / (1 + 2 / 3))
    assert (token_f1("", ""), token_f1("x", ""), token_f1("", "x")) == (1.0, 0.0, 0.0)


def test_metrics_without_rows_are_left_out_and_other_rows_refused() -> None:
    base = [Answer("1", "1", 2.0, 4, None, "x"), Answer("2", "2", 2.0, 4, None, "x")]
    assert set(compare(base, base, ["loss", "exact_match"], resamples=200)["metrics"]) == {"loss"}
    written = answers(["x", "y"], ["x", "y"])
    assert "macro_f1" not in compare(written, written, ["macro_f1"], labels=["p", "q"], resamples=200)["metrics"]
    with pytest.raises(ValueError, match="same rows"):
        compare(base, base[::-1], ["loss"])
    with pytest.raises(ValueError, match="same rows"):
        compare([], [], ["loss"])
