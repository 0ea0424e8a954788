"""Geometry of the report's curves over optimiser steps: numbers in, paths, labels and read-outs out.

All lengths are SVG user units; y grows downwards, as in SVG. The markup is in charts.jinja.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from finetune.charts import Point, Tick, nice_ticks, place_ticks

MAX_POINTS = 600  # of a raw curve as wide as the page; more cannot be told apart on a screen
MAX_SMOOTH = 150  # points of a moving average
MAX_RAW = 3  # curves whose raw values are drawn beneath their moving averages; those of more are a blur
MAX_HITS = 72  # places along a curve as wide as the page that answer to the pointer; half as many with several curves
MAX_DOTS = 60  # of a sparse series; with more of them only the line through them is drawn


@dataclass(frozen=True)
class Read:
    """What a curve says under the pointer: its number (-1: held out), where its dot stands, and the value in words."""

    curve: int
    y: float
    text: str


@dataclass(frozen=True)
class Hit:
    """A strip under the pointer: shows what every curve says at `x`; `text` is the first line of it."""

    left: float
    width: float
    x: float
    text: str
    reads: list[Read]


@dataclass(frozen=True)
class Curve:
    """A curve; `smooth` is its moving average, empty where there is none. `last` words its last value."""

    name: str
    raw: str
    smooth: str
    last: str


@dataclass(frozen=True)
class LineChart:
    """`held_out` is the path through `points`, `held_out_last` the last of them in words, `kept` the kept weights'."""

    title: str
    summary: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    held_out: str
    held_out_last: str
    points: list[Point]
    kept: Point | None
    hits: list[Hit]
    box: float

    @property
    def smooth(self) -> str:
        return next((curve.smooth for curve in self.curves if curve.smooth), "")


def smoothed(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Centred moving average with a Hann window: it does not lag behind a falling loss.

    Args:
        values: (n,) floats; NaN and infinities are skipped and stay gaps.

    Returns:
        (n,) floats, and the number of points that the window spans.
    """
    reach = max(1, round(len(values) / 25))
    window = np.hanning(2 * reach + 3)[1:-1]
    there = np.isfinite(values)
    total = np.convolve(np.where(there, values, 0.0), window, "full")[reach : reach + len(values)]
    weight = np.convolve(there.astype(float), window, "full")[reach : reach + len(values)]
    return np.where(there, total / np.maximum(weight, 1e-12), np.nan), 2 * reach + 1


def thinned(values: np.ndarray, most: int = MAX_POINTS) -> np.ndarray:
    """Indices of at most about `most` points that keep every stretch's lowest and highest value, so spikes stay."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    for stretch in np.array_split(np.arange(len(values)), most // 2):
        there = stretch[np.isfinite(values[stretch])]
        # A stretch without a finite value keeps one point, so that the gap stays a gap.
        kept += [there[np.argmin(values[there])], there[np.argmax(values[there])]] if len(there) else [stretch[0]]
    return np.unique(kept)


def _evenly(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` things, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def svg_path(xs: np.ndarray, ys: np.ndarray) -> str:
    """An SVG path through the points; a non-finite y breaks it, and a point between two breaks is a dot."""
    there = np.isfinite(ys)
    parts = []
    for i in np.flatnonzero(there):
        begins, ends = i == 0 or not there[i - 1], i + 1 == len(ys) or not there[i + 1]
        parts.append(f"{'M' if begins else 'L'}{xs[i]:.1f} {ys[i]:.1f}{'h0' if begins and ends else ''}")
    return "".join(parts)


@dataclass(frozen=True)
class Series:
    """What is drawn as one curve.

    Attributes:
        steps, values: (n,) each; NaN is a gap. What was not logged at a step is left out, and joined across.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray


@np.errstate(over="ignore", invalid="ignore")  # the farthest values may leave the plot
def lines_chart(
    title: str,
    series: Sequence[Series],
    *,
    width: float,
    height: float,
    write: Callable[[float], str],
    scale: float = 1.0,
    unit: str = "",
    smooth: bool = False,
    from_zero: bool = True,
    points: Sequence[tuple[float, float]] = (),
    point_name: str = "",
    kept: float | None = None,
    reach: tuple[float, float] | None = None,
) -> LineChart | None:
    """Curves over optimiser steps on one axis, or None where there is no finite value to draw.

    Args:
        write: words a value for the pointer's read-out.
        scale: what values are divided by before ticks are chosen (2**30 for GiB, 0.01 for percent).
        unit: ends every tick label.
        smooth: adds the moving averages; the raw curves are then drawn thin, or not at all where they are many.
        from_zero: the y axis starts at zero.
        points: (step, value) of a second, sparse series, drawn as dots.
        kept: the step of the kept weights; marked where `points` has it.
        reach: the first and the last step of the x axis, where more was logged than is drawn.
    """
    series = [s for s in series if np.isfinite(s.values).any()]
    shown = np.concatenate([*(s.values[np.isfinite(s.values)] for s in series), [v for _, v in points]]) / scale
    if not len(shown):
        return None
    low, high = (min(0.0, shown.min()), max(0.0, shown.max())) if from_zero else (shown.min(), shown.max())
    y_values = nice_ticks(low, high if high > low or not from_zero else 1.0, 5)
    all_x = np.concatenate([*(s.steps for s in series), [s for s, _ in points], reach or []])
    x_low, x_high = all_x.min(), all_x.max()
    left, right, top, bottom = 62.0, width - 14, 34.0, height - 44

    def to_x(step: np.ndarray | float) -> np.ndarray:
        share = (step - x_low) / (x_high - x_low) if x_high > x_low else np.full(np.shape(step), 0.5)
        return left + np.asarray(share) * (right - left)

    def to_y(value: np.ndarray | float) -> np.ndarray:
        return bottom - (np.asarray(value) / scale - y_values[0]) / (y_values[-1] - y_values[0]) * (bottom - top)

    averages = [smoothed(s.values) if smooth and len(s.values) > 4 else (s.values, 1) for s in series]
    span = max((window for _, window in averages), default=1)
    curves = []
    for s, (average, window) in zip(series, averages, strict=True):
        fine = thinned(s.values, min(MAX_POINTS, int(0.6 * width)))
        raw = svg_path(to_x(s.steps[fine]), to_y(s.values[fine])) if window == 1 or len(series) <= MAX_RAW else ""
        even = _evenly(len(s.values), MAX_SMOOTH)
        smoothly = svg_path(to_x(s.steps[even]), to_y(average[even])) if window > 1 else ""
        curves.append(Curve(s.name, raw, smoothly, write(s.values[np.isfinite(s.values)][-1])))
    measured = Series(point_name, np.array([s for s, _ in points], float), np.array([v for _, v in points], float))
    dots = [Point(float(to_x(s)), float(to_y(v)), f"step {s:,.0f}: {point_name} {write(v)}") for s, v in points]
    best = next((dot for dot, (step, _) in zip(dots, points, strict=True) if step == kept), None)
    x_values = [t for t in nice_ticks(x_low, x_high, 6) if x_low <= t <= x_high] if x_high > x_low else []
    return LineChart(
        title=title,
        summary=_summary(title, series, points, point_name, write, span),
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=place_ticks(x_values or [x_low], to_x),
        y_ticks=[Tick(tick.at, tick.label + unit) for tick in place_ticks(y_values, lambda t: to_y(t * scale))],
        curves=curves,
        held_out=_path_through(dots),
        held_out_last=write(points[-1][1]) if points and curves else "",
        points=dots if len(dots) <= MAX_DOTS else [best] if best else [],
        kept=best,
        hits=_hits(series, measured, to_x, to_y, write, (left, right)),
        box=34 + 8.6 * max((len(f"{c.name} {c.last}") for c in curves), default=0),
    )


def _summary(
    title: str,
    series: Sequence[Series],
    points: Sequence[tuple[float, float]],
    point_name: str,
    write: Callable[[float], str],
    span: int,
) -> str:
    """The chart in words, for those who do not see it."""

    def ends(name: str, values: Sequence[float]) -> str:
        return f"{name} first {write(values[0])}, last {write(values[-1])}".strip()

    said = [ends(s.name, s.values[np.isfinite(s.values)]) for s in series]
    steps = len(np.unique(np.concatenate([s.steps for s in series]))) if series else len(points)
    what = "logged" if series else "measured"
    said += [ends(point_name, [v for _, v in points])] if points else []
    said += [f"the bold line is a moving average over {span} steps"] if span > 1 else []
    return f"{title} over {steps:,} {what} steps: {'; '.join(said)}"


def _path_through(dots: Sequence[Point]) -> str:
    if len(dots) < 2:
        return ""
    kept = thinned(np.array([dot.y for dot in dots]), MAX_POINTS // 2)
    return svg_path(np.array([dots[i].x for i in kept]), np.array([dots[i].y for i in kept]))


def _hits(
    series: Sequence[Series],
    measured: Series,
    to_x: Callable[[Any], Any],
    to_y: Callable[[Any], Any],
    write: Callable[[float], str],
    span: tuple[float, float],
) -> list[Hit]:
    """Strips that tile the plot from `span[0]` to `span[1]`, meeting halfway between neighbouring steps."""
    found = [dict(zip(s.steps.tolist(), s.values.tolist(), strict=True)) for s in (*series, measured)]
    steps = sorted({step for curve in found[:-1] for step, v in curve.items() if math.isfinite(v)})
    most = int(MAX_HITS * min(1.0, (span[1] - span[0]) / 650)) // (1 if len(series) < 2 else 2)
    often = len(measured.steps) <= MAX_HITS // 3 or not series
    chosen = sorted({*(steps[i] for i in _evenly(len(steps), most)), *(found[-1] if often else ())})
    if not chosen:
        return []
    xs = [float(to_x(step)) for step in chosen]
    edges = [span[0], *((b + a) / 2 for a, b in pairwise(xs)), span[1]]
    hits = []
    for step, x, a, b in zip(chosen, xs, edges[:-1], edges[1:], strict=True):
        there = [(i, curve[step]) for i, curve in enumerate(found) if math.isfinite(curve.get(step, math.nan))]
        named = zip(there, [f"{(*series, measured)[i].name} {write(v)}".strip() for i, v in there], strict=True)
        reads = [Read(i if i < len(series) else -1, float(to_y(v)), text) for (i, v), text in named]
        alone = f": {', '.join(read.text for read in reads)}" if len(series) < 2 else ""
        hits.append(Hit(a, b - a, x, f"step {step:,.0f}{alone}", reads))
    return hits
