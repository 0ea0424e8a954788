"""Geometry of the report's figures: numbers in, positions and labels out. The markup is in charts.jinja.

All lengths are SVG user units; y grows downwards, as in SVG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 600  # of a raw curve; more cannot be told apart on a screen
MAX_HITS = 72  # places along a curve that answer to the pointer


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Hit:
    """A strip under the pointer: shows `text` and a dot at (x, y)."""

    left: float
    width: float
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class LineChart:
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
    raw: str
    smooth: str
    points: list[Point]
    hits: list[Hit]


@dataclass(frozen=True)
class Whisker:
    """One estimate with its interval on the shared axis; `low` and `high` are None where no interval is known."""

    who: str
    y: float
    at: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class IntervalPlot:
    title: str
    width: float
    height: float
    left: float
    right: float
    axis: float
    ticks: list[Tick]
    whiskers: list[Whisker]


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class BarChart:
    """`marks` are upright lines with a label; `y` of their points is where the label stands."""

    summary: str
    axis: str
    width: float
    height: float
    left: float
    right: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[Bar]
    marks: list[Point]


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values that cover [low, high] in at most `wanted` intervals of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    magnitude = 10.0 ** math.floor(math.log10((high - low) / wanted))
    steps = (factor * magnitude for factor in (1, 2, 2.5, 5, 10, 20))
    step = next(s for s in steps if math.ceil(high / s - 1e-9) - math.floor(low / s + 1e-9) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step >= 1e-9 else i * step for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as text with just the decimals that their step needs."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(ticks[0]) or 1.0
    biggest = max(abs(t) for t in ticks)
    if biggest < 1e-3 or biggest >= 1e7:
        return ["0" if t == 0 else _scientific(t) for t in ticks]
    decimals = next((d for d in range(8) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * 10**d * step), 8)
    return [f"{t:,.{decimals}f}" for t in ticks]


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


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


def svg_path(xs: np.ndarray, ys: np.ndarray) -> str:
    """An SVG path through the points; a non-finite y breaks it."""
    parts, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if np.isfinite(y):
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = bool(np.isfinite(y))
    return "".join(parts)


def line_chart(
    title: str,
    steps: Sequence[float],
    values: Sequence[float | None],
    *,
    width: float,
    height: float,
    write: Callable[[float], str],
    scale: float = 1.0,
    smooth: bool = False,
    from_zero: bool = True,
    points: Sequence[tuple[float, float]] = (),
    point_name: str = "",
) -> LineChart | None:
    """A curve over optimiser steps, or None where there is no finite value to draw.

    Args:
        steps, values: (n,) each; None, NaN and infinities are gaps.
        write: words a value for the pointer's read-out.
        scale: what values are divided by before ticks are chosen (2**30 for GiB).
        smooth: adds the moving average; the raw curve is then drawn thin.
        from_zero: the y axis starts at zero.
        points: (step, value) of a second, sparse series, drawn as dots.
    """
    xs = np.asarray(steps, dtype=float)
    ys = np.array([np.nan if v is None else v for v in values], dtype=float)
    finite = np.flatnonzero(np.isfinite(ys))
    if not len(finite):
        return None
    shown = np.concatenate([ys[finite], [v for _, v in points]]) / scale
    y_values = nice_ticks(min(0.0, shown.min()) if from_zero else shown.min(), shown.max(), 5)
    all_x = np.concatenate([xs, [s for s, _ in points]])
    x_low, x_high = all_x.min(), all_x.max()
    left, right, top, bottom = 62.0, width - 14, 34.0, height - 44

    def to_x(step: np.ndarray | float) -> np.ndarray:
        share = (step - x_low) / (x_high - x_low) if x_high > x_low else np.full(np.shape(step), 0.5)
        return left + np.asarray(share) * (right - left)

    def to_y(value: np.ndarray | float) -> np.ndarray:
        return bottom - (np.asarray(value) / scale - y_values[0]) / (y_values[-1] - y_values[0]) * (bottom - top)

    average, span = smoothed(ys) if smooth and len(finite) > 4 else (ys, 1)
    thin = thinned(ys)
    x_values = [t for t in nice_ticks(x_low, x_high, 6) if x_low <= t <= x_high] if x_high > x_low else [x_low]
    return LineChart(
        title=title,
        summary=f"{title} over {len(xs):,} logged steps: first {write(ys[finite[0]])}, last {write(ys[finite[-1]])}"
        + (f"; the bold line is a moving average over {span} steps" if smooth and span > 1 else ""),
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=_ticks(x_values, to_x),
        y_ticks=_ticks(y_values, lambda t: to_y(t * scale)),
        raw=svg_path(to_x(xs[thin]), to_y(ys[thin])),
        smooth=svg_path(to_x(xs[thin]), to_y(average[thin])) if smooth and span > 1 else "",
        points=[Point(float(to_x(s)), float(to_y(v)), f"step {s:,.0f}: {point_name} {write(v)}") for s, v in points],
        hits=_hits(xs, ys, to_x(xs), to_y(ys), finite, write, (left, right)),
    )


def _ticks(values: Sequence[float], place: Callable[[float], Any]) -> list[Tick]:
    """Labelled ticks where `place` puts their values."""
    return [Tick(float(place(t)), label) for t, label in zip(values, tick_labels(values), strict=True)]


def _hits(
    steps: np.ndarray,
    values: np.ndarray,
    xs: np.ndarray,
    ys: np.ndarray,
    finite: np.ndarray,
    write: Callable[[float], str],
    span: tuple[float, float],
) -> list[Hit]:
    """Strips that tile the plot from `span[0]` to `span[1]`, meeting halfway between neighbouring points."""
    chosen = finite[np.unique(np.linspace(0, len(finite) - 1, min(len(finite), MAX_HITS)).round().astype(int))]
    edges = [span[0], *((xs[chosen][1:] + xs[chosen][:-1]) / 2), span[1]]
    return [
        Hit(float(a), float(b - a), float(xs[i]), float(ys[i]), f"step {steps[i]:,.0f}: {write(values[i])}")
        for i, a, b in zip(chosen, edges[:-1], edges[1:], strict=True)
    ]


def bar_chart(
    title: str,
    counts: Sequence[int],
    step: int,
    *,
    width: float,
    height: float,
    axis: str,
    marks: Sequence[tuple[str, float]] = (),
) -> BarChart | None:
    """A histogram of whole numbers, or None where nothing was counted.

    Args:
        counts: how many lie in 1..step, step+1..2*step, and so on.
        axis: what the x axis counts.
        marks: (label, value) of values worth a line, from left to right.
    """
    if not any(counts):
        return None
    reach, highest = len(counts) * step, nice_ticks(0, max(counts), 5)
    left, right, top, bottom = 62.0, width - 14, 20.0 + 18 * len(marks), height - 44
    slot = (right - left) / len(counts)

    def bar(number: int, counted: int) -> Bar:
        high = max(1.5, counted / highest[-1] * (bottom - top))  # one row among thousands stays visible
        text = (
            f"{number * step + 1:,} to {(number + 1) * step:,} {axis}: {counted:,} {'row' if counted == 1 else 'rows'}"
        )
        return Bar(left + number * slot, bottom - high, slot - min(1.5, slot / 4), high, text)

    def to_x(value: float) -> float:
        return left + value / reach * (right - left)

    x_values = [t for t in nice_ticks(0, reach, 6) if t <= reach]
    y_values = [t for t in highest if t == int(t)]
    return BarChart(
        summary=f"{title}: {sum(counts):,} rows of up to {reach:,} {axis}",
        axis=axis,
        width=width,
        height=height,
        left=left,
        right=right,
        bottom=bottom,
        x_ticks=_ticks(x_values, to_x),
        y_ticks=_ticks(y_values, lambda t: bottom - t / highest[-1] * (bottom - top)),
        bars=[bar(number, counted) for number, counted in enumerate(counts) if counted],
        marks=[Point(to_x(value), 14.0 + 18 * n, label) for n, (label, value) in enumerate(marks)],
    )


def interval_plot(
    title: str,
    estimates: Sequence[tuple[str, float, float | None, float | None, str]],
    *,
    bounds: tuple[float, float] | None = None,
    scale: float = 1.0,
    unit: str = "",
) -> IntervalPlot:
    """Dots with whiskers on one axis.

    Args:
        estimates: (who, value, low, high, text) each, drawn from top to bottom.
        bounds: the axis' ends; by default the round values around all estimates.
        scale: factor on values for the tick labels (100 for percent).
        unit: ends every tick label.
    """
    width, height, left, right = 340.0, 40 + 26.0 * len(estimates), 16.0, 318.0
    ends = [v for _, value, low, high, _ in estimates for v in (value, low, high) if v is not None]
    lowest, highest = bounds or (min(ends), max(ends))
    ticks = nice_ticks(scale * lowest, scale * highest, 4)

    def to_x(value: float) -> float:
        return left + (value * scale - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    return IntervalPlot(
        title=title,
        width=width,
        height=height,
        left=left,
        right=right,
        axis=height - 26,
        ticks=[Tick(to_x(t / scale), label + unit) for t, label in zip(ticks, tick_labels(ticks), strict=True)],
        whiskers=[
            Whisker(who, 16.0 + 26 * i, to_x(value), _maybe(to_x, low), _maybe(to_x, high), text)
            for i, (who, value, low, high, text) in enumerate(estimates)
        ],
    )


def _maybe(place: Callable[[float], float], value: float | None) -> float | None:
    return None if value is None else place(value)


def shortened(text: str, most: int) -> str:
    """`text` in one line of at most `most` characters, cut in the middle: both ends of a reference tell it apart."""
    text = " ".join(text.split())
    head = (most - 1) // 2
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
