"""The section on training: the series of metrics.jsonl drawn, with what was measured on held-out rows in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from finetune.comparison import METRIC_NAMES, PERCENT
from finetune.report_curves import LineChart, Series, lines_chart
from finetune.report_panels import Panel, panels
from finetune.run_files import RunFiles, count, decimal, dig, number, percent, size

WIDE, SMALL = (1040.0, 340.0), (510.0, 270.0)
MOST_CURVES, LONGEST_NAME = 12, 24


@dataclass(frozen=True)
class Figure:
    """A drawn panel; `narrow` is there where the chart is as wide as the page, `left_out` counts curves."""

    chart: LineChart
    narrow: LineChart | None
    word: str
    note: str
    left_out: int


def training_view(run: RunFiles) -> dict[str, Any]:
    """The leading chart, the groups of others, and sentences on the whole."""
    lines, measured = run.training, run.measured
    lead, groups = panels(run)

    def drawn(panel: Panel, wide: bool = False) -> Figure | None:
        key = f"eval_{panel.held_out}"
        points = [(line["step"], v) for line in measured if (v := number(line.get(key))) is not None]
        return _figure(panel, lines, points, run.kept_step, wide)

    figures = [(title, [f for panel in found if (f := drawn(panel)) is not None]) for title, found in groups]
    return {
        "lead": drawn(lead, wide=True),
        "groups": [(title, found) for title, found in figures if found],
        "steps": count(len(lines)),
        "broken": sum(1 for line in lines if "loss" in line and number(line["loss"]) is None),
        "kept": _kept(run),
    }


def _kept(run: RunFiles) -> str:
    """Which weights were kept, and whether the search for better ones ended the run."""
    metric = str(dig(run.recipe, "train", "best", "metric") or "")
    if run.kept_step is None or not metric:
        return ""
    title, say = METRIC_NAMES.get(metric, metric).lower(), percent if metric in PERCENT else decimal
    value = next((line.get(metric) for line in run.watched if number(line.get("step")) == run.kept_step), None)
    times = len(run.watched)
    said = f"The weights of step {count(run.kept_step)} are kept: {title} {say(value)} on held-out rows, the best of "
    said += f"{count(times)} {'measurement' if times == 1 else 'measurements'}."
    planned, last = number(run.plan.get("steps")), number(run.training[-1].get("step")) if run.training else None
    patience = number(dig(run.recipe, "train", "best", "patience"))
    if run.manifest and planned and last and last < planned and patience:
        later = "the next one was" if patience == 1 else f"the next {count(patience)} were"
        said += f" Training ended at step {count(last)} of {count(planned)}: {later} no better."
    return said


def _figure(
    panel: Panel,
    lines: Sequence[dict[str, Any]],
    points: list[tuple[float, float]],
    kept: float | None,
    wide: bool,
) -> Figure | None:
    """The panel as a chart, or None where nothing of it was logged."""
    series = [s for key, name in panel.curves if np.isfinite((s := _series(lines, key, name)).values).any()]
    left_out = len(series[MOST_CURVES:])
    series = series[:MOST_CURVES]
    known = [float(v) for s in series for v in s.values if np.isfinite(v)] or [v for _, v in points]
    if not known:
        return None
    say, scale, unit = _wording(panel.kind, max(known))
    title = f"{panel.title} in {unit}" if panel.kind == "bytes" else panel.title

    def chart(width: float, height: float) -> LineChart | None:
        return lines_chart(
            title,
            series,
            width=width,
            height=height + 20.0 * max(0, len(series) - 7),  # the read-out has a line per curve
            write=say,
            scale=scale,
            unit=unit if panel.kind == "share" else "",
            smooth=panel.smooth,
            from_zero=panel.from_zero,
            points=points,
            point_name="held out",
            kept=kept,
            reach=(lines[0]["step"], lines[-1]["step"]) if lines else None,
        )

    word = {"last": known[-1], "peak": max(known), "median": median(known)}[panel.word]
    found = chart(*(WIDE if wide else SMALL))
    if found is None:
        return None
    beside = f"{panel.word} {say(word)}" if len(series) < 2 and not wide else ""
    return Figure(found, chart(*SMALL) if wide else None, beside, panel.note, left_out)


def _series(lines: Sequence[dict[str, Any]], key: str, name: str) -> Series:
    there = [line for line in lines if line.get(key) is not None]
    values = [number(line[key]) for line in there]
    ys = np.array([np.nan if v is None else v for v in values], dtype=float)
    name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    return Series(name, np.array([float(line["step"]) for line in there]), ys)


def _wording(kind: str, highest: float) -> tuple[Callable[[Any], str], float, str]:
    """How values are worded, what they are divided by for the axis, and the axis' unit."""
    if kind == "share":
        return percent, 0.01, "%"
    if kind == "bytes":
        return (size, float(2**30), "GiB") if highest >= 2**30 else (size, float(2**20), "MiB")
    return (count if kind == "whole" else decimal), 1.0, ""
