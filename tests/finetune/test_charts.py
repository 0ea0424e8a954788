"""The geometry of the report's figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from finetune.charts import histogram, nice_ticks, tick_labels
from finetune.report_curves import Series, lines_chart, smoothed, svg_path, thinned


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 4.02, ["0", "1", "2", "3", "4", "5"]),
        (0, 1.13, ["0.00", "0.25", "0.50", "0.75", "1.00", "1.25"]),
        (0, 2e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0, 5300, ["0", "2,000", "4,000", "6,000"]),
        (2.0, 2.0, ["1.8", "1.9", "2.0", "2.1", "2.2"]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, labels: list[str]) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert tick_labels(ticks) == labels


def test_smoothing_keeps_a_line_and_skips_gaps() -> None:
    line = np.arange(100.0)
    average, span = smoothed(line)
    assert span == 9 and np.allclose(average[4:-4], line[4:-4])
    line[50] = np.nan
    average, _ = smoothed(line)
    assert np.isnan(average[50]) and np.isfinite(np.delete(average, 50)).all()
    spike = np.zeros(10_000)
    spike[7777] = 1.0
    kept = thinned(spike)
    assert 7777 in kept and len(kept) <= 602


def line_chart(title: str, steps: Sequence[float], values: Sequence[float | None], **options: Any) -> Any:
    """One curve without a name."""
    ys = np.array([np.nan if v is None else v for v in values], dtype=float)
    return lines_chart(title, [Series("", np.asarray(steps, dtype=float), ys)], **options)


def test_one_step_is_a_dot_and_no_step_no_chart() -> None:
    chart = line_chart("Loss", [1], [2.5], width=500, height=250, write=str)
    assert chart is not None and [hit.text for hit in chart.hits] == ["step 1: 2.5"] and chart.smooth == ""
    assert line_chart("Loss", [1, 2], [None, float("nan")], width=500, height=250, write=str) is None


def series(name: str, values: list[float], first: int = 1) -> Series:
    return Series(name, np.arange(first, first + len(values), dtype=float), np.array(values))


def test_curves_share_an_axis_and_a_read_out() -> None:
    pair = [series("chosen", [-1.0, 1.0, 3.0]), series("rejected", [-2.0, float("nan"), -6.0])]
    chart = lines_chart("Rewards", pair, width=510, height=270, write="{:g}".format)
    assert chart is not None and [tick.label for tick in chart.y_ticks] == ["-6", "-4", "-2", "0", "2", "4"]
    assert [(curve.name, curve.last) for curve in chart.curves] == [("chosen", "3"), ("rejected", "-6")]
    # 192 units for 10: from the bottom at 226, five units are -1 and nine are 3.
    assert chart.curves[0].raw == "M62.0 130.0L279.0 91.6L496.0 53.2"
    assert chart.curves[1].raw == "M62.0 149.2h0M496.0 226.0h0"  # a gap leaves two dots
    assert [[read.text for read in hit.reads] for hit in chart.hits] == [
        ["chosen -1", "rejected -2"],
        ["chosen 1"],
        ["chosen 3", "rejected -6"],
    ]
    assert chart.summary == "Rewards over 3 logged steps: chosen first -1, last 3; rejected first -2, last -6"


def test_what_was_not_logged_at_a_step_is_joined_across() -> None:
    every_other = Series("", np.array([1.0, 3.0, 5.0]), np.array([0.0, 1.0, 2.0]))
    chart = lines_chart("KL", [every_other], width=510, height=270, write=str, reach=(1, 9))
    assert chart is not None and chart.curves[0].raw.count("M") == 1
    assert chart.curves[0].raw.endswith("L279.0 34.0")  # step 5 is the middle of 1 to 9


def test_held_out_measurements_and_the_kept_one() -> None:
    points = [(10, 0.5), (20, 0.75), (30, 0.625)]
    options = {"width": 510, "height": 270, "write": "{:.0%}".format, "scale": 0.01, "unit": "%"}
    chart = lines_chart("Accuracy", [], **options, points=points, point_name="held out", kept=20)
    assert chart is not None and chart.curves == [] and len(chart.points) == 3
    assert [tick.label for tick in chart.y_ticks] == ["0%", "20%", "40%", "60%", "80%"]
    assert chart.kept == chart.points[1] and chart.kept is not None and chart.kept.y == pytest.approx(46.0)
    assert [hit.text for hit in chart.hits][1] == "step 20: held out 75%"
    many = [(step, 0.5) for step in range(1, 1001)]
    chart = lines_chart("Accuracy", [], **options, points=many, point_name="held out", kept=500)
    assert chart is not None and len(chart.points) == 1 and chart.held_out.count("L") <= 300


def test_many_curves_are_drawn_as_averages_only() -> None:
    rng = np.random.default_rng(0)
    noisy = [series(str(i), list(rng.normal(size=5000))) for i in range(4)]
    chart = lines_chart("Rewards", noisy, width=1040, height=340, write=str, smooth=True)
    assert chart is not None and [curve.raw for curve in chart.curves] == [""] * 4
    assert [curve.smooth.count("L") for curve in chart.curves] == [149] * 4 and len(chart.hits) == 36
    chart = lines_chart("Rewards", noisy[:3], width=1040, height=340, write=str, smooth=True)
    assert chart is not None and all(300 < curve.raw.count("L") <= 602 for curve in chart.curves)


def test_a_flat_zero_has_an_axis_from_zero() -> None:
    chart = line_chart("Clipped", [1, 2], [0.0, 0.0], width=510, height=270, write=str, scale=0.01, unit="%")
    assert chart is not None and [tick.label for tick in chart.y_ticks][:2] == ["0.0%", "0.2%"]
    assert chart.curves[0].raw == "M62.0 226.0L496.0 226.0"


@pytest.mark.parametrize("far", [1e308, -1e308, 5e-324])
def test_extreme_numbers_have_ticks(far: float) -> None:
    assert len(tick_labels(nice_ticks(min(0, far), max(0, far)))) >= 2
    assert line_chart("Loss", [1, 2], [far, -far], width=510, height=270, write=str) is not None


def test_a_path_breaks_at_gaps() -> None:
    xs, ys = np.array([0.0, 1.0, 2.0, 3.0]), np.array([5.0, float("nan"), 6.0, 7.0])
    assert svg_path(xs, ys) == "M0.0 5.0h0M2.0 6.0L3.0 7.0"


def test_histogram_of_a_few_and_of_many_values() -> None:
    chart = histogram("math", [(1.0, 4), (0.0, 60)], "completions", "{:g}".format)
    assert chart is not None and [(bar.x, bar.text) for bar in chart.bars] == [
        (1.0, "0: 60 completions"),
        (188.5, "1: 4 completions"),
    ]
    assert chart.bars[0].height == 36 and chart.bars[1].height == pytest.approx(2.4)
    assert [(end.at, end.label) for end in chart.ends] == [(0.0, "0"), (200.0, "1")]
    chart = histogram("judge", [(i / 100, 1) for i in range(101)], "completions", "{:g}".format)
    assert chart is not None and len(chart.bars) == 16 and chart.bars[0].text == "0 to 0.06: 7 completions"
    chart = histogram("flat", [(0.3, 8)], "completions", "{:g}".format)
    assert chart is not None and [end.label for end in chart.ends] == ["0.3"] and len(chart.bars) == 1
    assert histogram("none", [], "completions", str) is None
