"""Geometry of the pages' figures: numbers in, positions and labels out. The markup is in charts.jinja.

All lengths are SVG user units; y grows downwards, as in SVG. Curves over steps are in report_curves.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


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


def _bounded(value: float) -> float:
    """Far values as a bound, so that the difference of two is a number too."""
    return min(max(value, -1e300), 1e300)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values that cover [low, high] in at most `wanted` intervals of 1, 2, 2.5 or 5 times a power of ten."""
    low, high = _bounded(low), _bounded(high)
    if not high - low > 1e-300:
        pad = abs(low) * 0.1 if abs(low) > 1e-290 else 1.0
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


def place_ticks(values: Sequence[float], place: Callable[[float], Any]) -> list[Tick]:
    """Labelled ticks where `place` puts their values."""
    return [Tick(float(place(t)), label) for t, label in zip(values, tick_labels(values), strict=True)]


def shortened(text: str, most: int) -> str:
    """`text` in one line of at most `most` characters, cut in the middle: both ends of a reference tell it apart."""
    text = " ".join(text.split())
    head = (most - 1) // 2
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


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
    slots = [
        (n * step, (n + 1) * step, counted, f"{n * step + 1:,} to {(n + 1) * step:,} {axis}: {_times(counted, 'row')}")
        for n, counted in enumerate(counts)
    ]
    reach = len(counts) * step
    said = f"{title}: {sum(counts):,} rows of up to {reach:,} {axis}"
    return _upright(said, slots, (0, reach), width=width, height=height, axis=axis, marks=marks)


def spread_chart(
    title: str,
    counts: Sequence[float],
    edges: Sequence[float],
    *,
    reach: tuple[float, float],
    width: float,
    height: float,
    axis: str,
    noun: str,
) -> BarChart | None:
    """A histogram of whole numbers that were counted in bars with given edges, or None where nothing was counted.

    Args:
        counts: how many lie in each bar, (n,).
        edges: ascending, (n + 1,); a bar holds what is at least its lower edge and below its upper one, the last bar
            its upper edge too.
        reach: the ends of the x axis, which several charts may share.
        noun: what is counted, in the singular.
    """
    if not any(counts):
        return None

    def within(n: int) -> str:
        first = math.ceil(edges[n])
        last = math.floor(edges[n + 1]) if n == len(counts) - 1 else math.ceil(edges[n + 1]) - 1
        return f"{first:,} {axis}" if last <= first else f"{first:,} to {last:,} {axis}"

    slots = [
        (edges[n], edges[n + 1], counted, f"{within(n)}: {_times(counted, noun)}") for n, counted in enumerate(counts)
    ]
    said = f"{title}: {_times(sum(counts), noun)} of {math.ceil(edges[0]):,} to {math.floor(edges[-1]):,} {axis}"
    return _upright(said, slots, reach, width=width, height=height, axis=axis)


def _times(counted: float, noun: str) -> str:
    return f"{counted:,.0f} {noun if counted == 1 else f'{noun}s'}"


def _upright(
    summary: str,
    slots: Sequence[tuple[float, float, float, str]],
    reach: tuple[float, float],
    *,
    width: float,
    height: float,
    axis: str,
    marks: Sequence[tuple[str, float]] = (),
) -> BarChart:
    """Bars that stand on the x axis: (from, to, how many, the bar in words) each."""
    highest = nice_ticks(0, max(counted for _, _, counted, _ in slots), 5)
    left, right, top, bottom = 62.0, width - 14, 20.0 + 18 * len(marks), height - 44

    def to_x(value: float) -> float:
        return left + (value - reach[0]) / (reach[1] - reach[0]) * (right - left)

    def bar(start: float, end: float, counted: float, text: str) -> Bar:
        high = max(1.5, counted / highest[-1] * (bottom - top))  # one row among thousands stays visible
        slot = to_x(end) - to_x(start)
        return Bar(to_x(start), bottom - high, slot - min(1.5, slot / 4), high, text)

    x_values = [t for t in nice_ticks(*reach, 6) if reach[0] <= t <= reach[1]]
    y_values = [t for t in highest if t == int(t)]
    return BarChart(
        summary=summary,
        axis=axis,
        width=width,
        height=height,
        left=left,
        right=right,
        bottom=bottom,
        x_ticks=place_ticks(x_values, to_x),
        y_ticks=place_ticks(y_values, lambda t: bottom - t / highest[-1] * (bottom - top)),
        bars=[bar(*slot) for slot in slots if slot[2]],
        marks=[Point(to_x(value), 14.0 + 18 * n, label) for n, (label, value) in enumerate(marks)],
    )


@dataclass(frozen=True)
class FunnelStep:
    """A bar of a funnel. `rest` is the width of what was left before it, drawn faintly; `kind` is all, lost or kept."""

    label: str
    y: float
    x: float
    width: float
    rest: float
    kind: str
    value: str
    text: str


@dataclass(frozen=True)
class Funnel:
    summary: str
    width: float
    height: float
    left: float
    right: float
    steps: list[FunnelStep]


def funnel(
    title: str, whole: tuple[str, float], losses: Sequence[tuple[str, float]], kept: tuple[str, float], width: float
) -> Funnel | None:
    """What was there, what each step took away from the rest, and what was kept: lying bars, from top to bottom.

    Args:
        whole, losses, kept: (label, how many) each, none below zero. Shares are of the whole, or of the losses and what
            is kept where these are more.

    Returns:
        None where there was nothing.
    """
    most = max(whole[1], kept[1] + sum(n for _, n in losses))
    if not most > 0:
        return None
    left, right, row = 150.0, width - 150.0, 30.0

    def long(n: float) -> float:
        return n / most * (right - left)

    def step(place: int, label: str, n: float, before: float, kind: str) -> FunnelStep:
        start = left + long(max(0.0, before - n)) if kind == "lost" else left
        share = f"{100 * n / most:.1f}%"
        said = f"{label}: {n:,.0f}, {share}"
        value = f"{n:,.0f}" if kind == "all" else f"{n:,.0f} · {share}"
        wide = max(long(n), 1.5 if n else 0.0)
        return FunnelStep(shortened(label, 16), 10 + row * place, start, wide, long(before), kind, value, said)

    steps, before = [step(0, *whole, most, "all")], most
    for label, n in losses:
        steps.append(step(len(steps), label, n, before, "lost"))
        before -= n
    steps.append(step(len(steps), *kept, kept[1], "kept"))
    summary = f"{title}: {'; '.join(one.text for one in steps)}"
    return Funnel(summary, width, 16 + row * len(steps), left, right, steps)


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


@dataclass(frozen=True)
class Histogram:
    """A small picture of how values are spread; `ends` label the lowest and the highest."""

    summary: str
    width: float
    height: float
    axis: float
    bars: list[Bar]
    ends: list[Tick]


def histogram(
    title: str, counts: Sequence[tuple[float, float]], noun: str, write: Callable[[float], str]
) -> Histogram | None:
    """Bars of equal width from the lowest to the highest value, or None where nothing was counted.

    Args:
        counts: (value, how often) each, values finite and in any order.
        noun: what is counted, in the plural.
    """
    counts = sorted((_bounded(value), _bounded(times)) for value, times in counts if times > 0)
    if not counts:
        return None
    width, height, axis, places = 200.0, 58.0, 40.0, 16
    low, high = counts[0][0], counts[-1][0]
    slots: dict[int, list[tuple[float, float]]] = {}
    for value, times in counts:
        share = (value - low) / (high - low) if high > low else 0.5
        slots.setdefault(min(int(share * places), places - 1), []).append((value, times))
    slot, most = width / places, max(sum(times for _, times in found) for found in slots.values())

    def bar(place: int, found: list[tuple[float, float]]) -> Bar:
        times = sum(n for _, n in found)
        tall = max(1.5, times / most * (axis - 4))
        ends = dict.fromkeys(write(value) for value in (found[0][0], found[-1][0]))
        return Bar(place * slot + 1, axis - tall, slot - 2, tall, f"{' to '.join(ends)}: {times:,.0f} {noun}")

    bars = [bar(place, found) for place, found in sorted(slots.items())]
    labels = [Tick(0.0, write(low)), Tick(width, write(high))] if high > low else [Tick(width / 2, write(low))]
    return Histogram(f"{title}: {'; '.join(b.text for b in bars)}", width, height, axis, bars, labels)
