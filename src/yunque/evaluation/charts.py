"""Charts of the report as inline SVG: classes for a style sheet, a title and a description for screen readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from yunque.metrics.bootstrap import Interval

_WIDTH, _HEIGHT = 360, 230  # of a chart's drawing, so that 1 unit is about 1 pixel on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 40
_MAX_POINTS = 300  # of a curve
_CHAR = 5.8  # width of a character of the labels


@dataclass(frozen=True)
class Point:
    """One model in a scatter plot: a cost and a metric's interval; ``number`` gives its color."""

    name: str
    x: float
    y: Interval
    shown: str
    number: int


class _Axis:
    """A linear map of values to units of the drawing, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if not high > low:
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        self.low, self.high, self.start, self.end = low, high, start, end
        self.step = _round_step((high - low) / 4)

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [(self.at(n * self.step), _tick(n * self.step, digits)) for n in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(step for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def _tick(value: float, digits: int) -> str:
    if abs(value) >= 1e5:
        return f"{value:.3g}"
    return f"{value:z,.{digits}f}"


def interval_bar(interval: Interval, reach: float, verdict: str, words: str) -> Markup:
    """A difference with its interval beside a line at 0, drawn so that ``reach`` is the half width."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)) or reach <= 0:
        reach, interval = 1.0, Interval(0.0, 0.0, 0.0)
    axis = _Axis(-reach, reach, 6, 154)
    low, mid, high = (axis.at(value) for value in (interval.low, interval.mean, interval.high))
    return Markup(
        '<svg class="bar {}" viewBox="0 0 160 22" role="img" aria-label="{}">'
        '<line class="zero" x1="80" y1="1" x2="80" y2="21"/><line class="span" x1="{}" y1="11" x2="{}" y2="11"/>'
        '<line class="span" x1="{}" y1="6" x2="{}" y2="16"/><line class="span" x1="{}" y1="6" x2="{}" y2="16"/>'
        '<circle class="dot" cx="{}" cy="11" r="4"/></svg>'
    ).format(verdict, words, low, high, low, low, high, high, mid)


def pareto(
    points: Sequence[Point], *, title: str, x_label: str, y_label: str, higher_is_better: bool, numbered: bool = False
) -> Markup:
    """Metric against cost: a point with its interval per model, and the line of those that no other model beats.

    Points bear their names, or with ``numbered`` their numbers from 1, where the names would hide each other.
    """
    top = max(point.x for point in points)
    x = _Axis(0, top * 1.06, _LEFT, _WIDTH - _RIGHT)
    ends = [end for point in points for end in (point.y.low, point.y.high, point.y.mean) if math.isfinite(end)]
    room = (max(ends) - min(ends)) * 0.08
    y = _Axis(min(ends) - room, max(ends) + room, _HEIGHT - _BOTTOM, _TOP)
    best = frontier(points, higher_is_better)
    corners = [(x.at(point.x), y.at(point.y.mean)) for point in best]
    path = f"M{corners[0][0]} {corners[0][1]}" + "".join(f" H{right} V{height}" for right, height in corners[1:])
    parts = [Markup('<path class="frontier" d="{}"/>').format(path)]
    taken: list[tuple[float, float, float]] = []
    for point in points:
        number = point.number
        across, height = x.at(point.x), y.at(point.y.mean)
        if math.isfinite(point.y.low):
            ends_y = (y.at(point.y.low), y.at(point.y.high))
            parts.append(
                Markup('<line class="span m{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    number % 6, across, across, *ends_y
                )
            )
        parts.append(
            Markup('<g><title>{}</title><circle class="dot m{}{}" cx="{}" cy="{}" r="5"/></g>').format(
                point.shown, number % 6, "" if point in best else " beaten", across, height
            )
        )
        name = str(number + 1) if numbered else point.name
        parts.append(_label(name, "name number" if numbered else "name", across, height, taken))
    words = f"{title}. {'; '.join(point.shown for point in points)}. Not beaten: {', '.join(p.name for p in best)}."
    return _frame(title, words, x, y, x_label, y_label, parts)


def frontier(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Points that no cheaper or equally cheap one beats, cheapest first."""
    sign = 1 if higher_is_better else -1
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y.mean)):
        if not kept or sign * point.y.mean > sign * kept[-1].y.mean:
            kept.append(point)
    return kept


def _label(name: str, kind: str, across: float, height: float, taken: list[tuple[float, float, float]]) -> Markup:
    """The model's name beside its point, moved up or down past the names that stand there."""
    name = name if len(name) <= 22 else f"…{name[-21:]}"
    width = len(name) * _CHAR
    left = across + 9 if across + 9 + width < _WIDTH - 2 else max(2.0, across - 9 - width)
    places = [height + 4 + shift for shift in (-11, 13, 0, -24, 26, -37, 39)]
    free = [
        place
        for place in places
        if all(abs(place - line) > 11 or left > end or left + width < start for start, end, line in taken)
    ]
    place = (free or places)[0]
    taken.append((left, left + width, place))
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, round(left, 1), round(place, 1), name)


def curve(steps: np.ndarray, values: np.ndarray, *, title: str, x_label: str) -> Markup:
    """A training curve, (num_steps,) each: every step thin, the centred mean of a tenth of the run thick."""
    window = 2 * round(0.05 * len(steps)) + 1
    kernel = np.ones(window)
    smooth = np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")
    pick = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).round().astype(int))
    x = _Axis(float(steps[0]), float(steps[-1]), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(float(values.min()), float(values.max()), _HEIGHT - _BOTTOM, _TOP)
    lines = [
        Markup('<polyline class="{}" points="{}"/>').format(
            kind, " ".join(f"{x.at(float(steps[row]))},{y.at(float(column[row]))}" for row in pick)
        )
        for kind, column in (("each", values), ("mean", smooth))
    ]
    words = f"{title}: from {smooth[0]:.3g} at step {steps[0]:g} to {smooth[-1]:.3g} at step {steps[-1]:g}"
    return _frame(title, words, x, y, x_label, "", lines)


def lines(
    x_values: Sequence[float], series: Mapping[str, Sequence[float]], *, title: str, x_label: str, y_label: str
) -> Markup:
    """Several measures over one axis, from 0 up, each named at its end; NaN is left out."""
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    names = 22 + 1.15 * _CHAR * max(map(len, series))  # bold
    x = _Axis(min(x_values), max(x_values), _LEFT + 8, _WIDTH - names)
    y = _Axis(0.0, (max(finite, default=0.0) or 1.0) * 1.06, _HEIGHT - _BOTTOM, _TOP)
    parts: list[Markup] = []
    ends: list[tuple[float, float, int, str]] = []
    for number, (name, values) in enumerate(series.items()):
        corners = [(x.at(a), y.at(b)) for a, b in zip(x_values, values, strict=True) if math.isfinite(b)]
        if not corners:
            continue
        path = " L".join(f"{across} {height}" for across, height in corners)
        parts.append(Markup('<path class="line m{}" d="M{}"/>').format(number % 6, path))
        parts += [
            Markup('<circle class="dot m{}" cx="{}" cy="{}" r="3.5"/>').format(number % 6, across, height)
            for across, height in corners
        ]
        ends.append((corners[-1][1], corners[-1][0], number, name))
    free = float(_HEIGHT - _BOTTOM + 8)
    for height, across, number, name in sorted(ends, reverse=True):  # lowest first, each name above the one before
        free = min(height + 4, free - 12)
        parts.append(
            Markup('<text class="series m{}" x="{}" y="{}">{}</text>').format(
                number % 6, across + 8, round(free, 1), name
            )
        )
    words = "; ".join(
        f"{name}: {', '.join(f'{value:.3g} at {at:g}' for at, value in zip(x_values, values, strict=True))}"
        for name, values in series.items()
    )
    return _frame(title, f"{title}. {words}", x, y, x_label, y_label, parts)


def _frame(title: str, words: str, x: _Axis, y: _Axis, x_label: str, y_label: str, parts: Sequence[Markup]) -> Markup:
    grid = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick" x="{}" y="{}">{}</text>').format(
            _LEFT, _WIDTH - _RIGHT, height, height, _LEFT - 6, height + 4, shown
        )
        for height, shown in y.ticks()
    ]
    below = _HEIGHT - _BOTTOM
    grid += [
        Markup('<text class="tick x" x="{}" y="{}">{}</text>').format(across, below + 15, shown)
        for across, shown in x.ticks()
    ]
    axis = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, below, below)
    labels = Markup('<text class="tick x" x="{}" y="{}">{}</text>').format(
        (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label
    )
    caption = f"{title}{f' ({y_label})' if y_label else ''}"
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">'
        "{}{}{}{}</svg></figure>"
    ).format(caption, _WIDTH, _HEIGHT, words, Markup("").join(grid), axis, labels, Markup("").join(parts))
