"""The geometry of the report's figures."""

import numpy as np
import pytest

from finetune.charts import line_chart, nice_ticks, smoothed, thinned, tick_labels


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


def test_one_step_is_a_dot_and_no_step_no_chart() -> None:
    chart = line_chart("Loss", [1], [2.5], width=500, height=250, write=str)
    assert chart is not None and [hit.text for hit in chart.hits] == ["step 1: 2.5"] and chart.smooth == ""
    assert line_chart("Loss", [1, 2], [None, float("nan")], width=500, height=250, write=str) is None
