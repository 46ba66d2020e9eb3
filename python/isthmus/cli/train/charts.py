"""Charts as inline SVG. Colours come from the style sheet of the page, so they follow light and dark screens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 32
POINTS = 300


@dataclass(frozen=True)
class Series:
    """A line: its points in the order of x, and the class of its colour in the style sheet."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, series: Sequence[Series], x_label: str) -> str:
    """Lines over a common x. Values that are not finite leave a gap; the scale is logarithmic if it must be."""
    series = [Series(one.label, one.colour, _thinned(one.points)) for one in series]
    series = [one for one in series if _runs(one.points)]
    finite = [point for one in series for run in _runs(one.points) for point in run]
    if not finite:
        return _figure(title, '<p class="nothing">no finite values</p>')
    lowest, highest = min(y for _, y in finite), max(y for _, y in finite)
    log = lowest > 0.0 and highest > 30.0 * lowest
    x_axis = _Axis(_round_ticks([x for x, _ in finite]), LEFT, WIDTH - RIGHT)
    values = [y for _, y in finite]
    y_axis = _Axis(_log_ticks(values) if log else _round_ticks(values), HEIGHT - BOTTOM, TOP, log=log)
    parts = [_grid(x_axis, y_axis), _x_label(x_label)]
    for one in series:
        for run in _runs(one.points):
            places = [(x_axis(x), y_axis(y)) for x, y in run]
            if len(places) == 1:
                ((x, y),) = places
                parts.append(f'<circle class="{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                parts.append(f'<polyline class="{one.colour}" points="{path}"/>')
    return _figure(title, _svg(title, parts) + (_legend(series) if len(series) > 1 else ""))


def histogram(title: str, values: Sequence[float], *, silent: int, x_label: str, bins_per_unit: int = 5) -> str:
    """How often each range of ``values`` occurs; ``silent`` more, which have no value, get a bar of their own."""
    if not values and not silent:
        return _figure(title, '<p class="nothing">no finite values</p>')
    low, high = (
        (math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)) if values else (0, 1)
    )
    counts = [0] * ((high - low) * bins_per_unit)
    for value in values:
        counts[min(int((value - low) * bins_per_unit), len(counts) - 1)] += 1
    # Two empty bins lie between the bar of the silent and the rest.
    width = 1.0 / bins_per_unit
    first = low - 3 * width if silent else low
    x_axis = _Axis(range(low, high + 1), LEFT, WIDTH - RIGHT, low=first)
    y_axis = _Axis(_round_ticks([0, *counts, silent]), HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, y_axis), _x_label(x_label)]
    bars = [(low + i * width, count, "isthmus") for i, count in enumerate(counts) if count]
    if silent:
        bars.append((first, silent, "alarm"))
        parts.append(f'<text class="tick" x="{x_axis(first + width / 2):.1f}" y="{HEIGHT - BOTTOM + 14}">never</text>')
    for left, count, colour in bars:
        x, end, y = x_axis(left), x_axis(left + width), y_axis(count)
        parts.append(
            f'<rect class="{colour}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(end - x - 1.0, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{count}</title></rect>'
        )
    return _figure(title, _svg(title, parts))


def number(value: float | None) -> str:
    """A number for people: three or four digits, thousands kept together, a dash for what is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.4g}"


class _Axis:
    """From numbers to pixels: the first tick, or ``low``, lies at ``start`` and the last at ``end``."""

    def __init__(
        self, ticks: Sequence[float], start: float, end: float, *, log: bool = False, low: float | None = None
    ) -> None:
        self.ticks = ticks
        self._transform = math.log10 if log else float
        self._low = self._transform(ticks[0] if low is None else low)
        self._pixels = (end - start) / (self._transform(ticks[-1]) - self._low)
        self._start = start

    def __call__(self, value: float) -> float:
        return self._start + (self._transform(value) - self._low) * self._pixels


def _round_ticks(values: Sequence[float]) -> list[float]:
    """Three to six round numbers, evenly apart, that hold all values between them."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    size = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= size * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten, or of little more than a decade also twice and five times these, around all values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    if high - low > 3:
        step = -(-(high - low) // 6)
        return [10.0**power for power in range(low, high + step, step)]
    ticks = [digit * 10.0**power for power in range(low, high) for digit in (1, 2, 5)] + [10.0**high]
    first = max(i for i, tick in enumerate(ticks) if tick <= min(values) * 1.001)
    last = min(i for i, tick in enumerate(ticks) if tick >= max(values) * 0.999)
    return ticks[first : last + 1]


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick left" x="{LEFT - 6}" y="{y + 4:.1f}">{_tick(tick)}</text>')
    for tick in x_axis.ticks:
        parts.append(f'<text class="tick" x="{x_axis(tick):.1f}" y="{HEIGHT - BOTTOM + 14}">{_tick(tick)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}".replace("-", "−")


def _x_label(text: str) -> str:
    return f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}">{escape(text)}</text>'


def _legend(series: Sequence[Series]) -> str:
    return (
        '<p class="legend">'
        + " ".join(f'<span class="{one.colour}">{escape(one.label)}</span>' for one in series)
        + "</p>"
    )


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _figure(title: str, body: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{body}</figure>"


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Pieces without a value that is not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``POINTS`` points: the median of each stretch, for the curve matters more than its fuzz."""
    size = -(-len(points) // POINTS) or 1
    thinned = []
    for i in range(0, len(points), size):
        stretch = sorted(y for _, y in points[i : i + size] if math.isfinite(y))
        thinned.append((points[i][0], stretch[len(stretch) // 2] if stretch else math.nan))
    return thinned
