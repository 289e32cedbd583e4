"""Charts as inline SVG: plain functions from numbers to markup, coloured by the page's style.

Text that does not come from us (names of layers) is escaped here, for the markup goes into the page
as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from streamconv.errors import shown
from streamconv.units import format_duration

# Drawn at about the size they are shown at: half the page, lanes the whole of it.
_WIDTH, _HEIGHT = 540, 230
_LANES_WIDTH = 1100
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 26, 28
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_TICKS = 4
_MOST_STRIPS = 120
_TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Limit:
    """A horizontal line to measure a curve by, such as the budget."""

    value: float
    label: str


def ticks(top: float, wanted: int = _TICKS) -> list[float]:
    """Return round numbers from 0 to about ``top``.

    >>> ticks(100.0)
    [0.0, 25.0, 50.0, 75.0, 100.0]
    >>> ticks(7.3)
    [0.0, 2.0, 4.0, 6.0]
    """
    if top <= 0:
        return [0.0]
    raw = top / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    return [i * step for i in range(int(top / step * 1.0001) + 1)]


def time_ticks(end: float, wanted: int) -> list[float]:
    """Return moments that people think in: whole seconds, minutes or hours.

    >>> time_ticks(230.0, 5)
    [0.0, 60.0, 120.0, 180.0]
    """
    step = next((s for s in _TIME_STEPS if end / s <= wanted), None)
    if step is None or end < 1:
        return ticks(end, wanted)
    return [float(i * step) for i in range(int(end / step) + 1)]


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    value_text: Callable[[float], str],
    limit: Limit | None = None,
    phases: Sequence[tuple[float, str]] = (),
) -> str:
    """Return a curve over seconds, filled below; ``phases`` are (begin, name) along the top."""
    end = max((x for x, _ in points), default=0.0) or 1.0
    top = max([y for _, y in points] + [limit.value if limit else 0.0], default=0.0) * 1.08 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / end * _PLOT_WIDTH,
            _TOP + (1 - min(max(y, 0.0), top) / top) * _PLOT_HEIGHT,
        )

    parts = [_open(title), *_grid(top, end, value_text)]
    base = _TOP + _PLOT_HEIGHT
    for i, (begin, name) in enumerate(phases):
        x = at(begin, 0)[0]
        until = at(phases[i + 1][0], 0)[0] if i + 1 < len(phases) else _LEFT + _PLOT_WIDTH
        css = "phase odd" if i % 2 else "phase"
        parts.append(
            f'<rect class="{css}" x="{x:.1f}" y="{_TOP}" width="{max(0.0, until - x):.1f}" '
            f'height="{_PLOT_HEIGHT}"/>'
        )
        if until - x > 7 * len(name):  # else it would run into the next one
            parts.append(
                f'<text class="tick" x="{x + 4:.1f}" y="{_TOP - 8}">{_escaped(name)}</text>'
            )
    if points:
        curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
        first, last = at(*points[0])[0], at(*points[-1])[0]
        parts.append(
            f'<polygon class="area" points="{first:.1f},{base} {curve} {last:.1f},{base}"/>'
            f'<polyline class="line" points="{curve}"/>'
        )
        parts += _hovered(points, at, value_text)
    if limit is not None:
        y = at(0, limit.value)[1]
        parts.append(
            f'<line class="limit" x1="{_LEFT}" x2="{_LEFT + _PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="limit-text" x="{_LEFT + _PLOT_WIDTH - 4}" y="{y - 5:.1f}">'
            f"{_escaped(limit.label)}</text>"
        )
    return "".join([*parts, "</svg>"])


def _hovered(
    points: Sequence[tuple[float, float]],
    at: Callable[[float, float], tuple[float, float]],
    value_text: Callable[[float], str],
) -> list[str]:
    """Return invisible strips over a curve that say its value where the pointer is."""
    step = max(1, len(points) // _MOST_STRIPS)
    chosen = points[::step]
    edges = [at(x, 0)[0] for x, _ in chosen]
    ends = [*edges[1:], _LEFT + _PLOT_WIDTH]
    return [
        f'<rect class="strip" x="{x:.1f}" y="{_TOP}" width="{max(0.5, end - x):.1f}" '
        f'height="{_PLOT_HEIGHT}"><title>{_seconds(seconds)}: {_escaped(value_text(value))}</title>'
        "</rect>"
        for x, end, (seconds, value) in zip(edges, ends, chosen, strict=True)
    ]


def bar_chart(
    bars: Sequence[tuple[str, float]], *, title: str, value_text: Callable[[float], str]
) -> str:
    """Return upright bars with their names below, as many of these as fit."""
    top = max((value for _, value in bars), default=0.0) * 1.08 or 1.0
    width = _PLOT_WIDTH / max(1, len(bars))
    every = max(1, math.ceil(len(bars) * 34 / _PLOT_WIDTH))
    parts = [_open(title), *_grid(top, None, value_text)]
    for i, (name, value) in enumerate(bars):
        height = value / top * _PLOT_HEIGHT
        x = _LEFT + i * width
        gap = min(2.0, width * 0.2)
        parts.append(
            f'<rect class="bar" x="{x + gap / 2:.2f}" y="{_TOP + _PLOT_HEIGHT - height:.1f}" '
            f'width="{max(0.3, min(width - gap, 48.0)):.2f}" height="{height:.1f}">'
            f"<title>{_escaped(name)}: {_escaped(value_text(value))}</title></rect>"
        )
        if i % every == 0:
            middle = x + min(width, 48.0 + gap) / 2
            parts.append(
                f'<text class="tick middle" x="{middle:.1f}" y="{_HEIGHT - 10}">{_escaped(name)}</text>'
            )
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True)
class Span:
    """A job in a lane: from when to when, what it is called, how it ended."""

    begin: float
    end: float
    name: str
    state: str


def lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Return spans in as few lanes as keep them from overlapping, in order of their beginnings."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: s.begin):
        row = next((r for r in rows if r[-1].end <= span.begin), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows


def gantt(spans: Sequence[Span], *, title: str) -> str:
    """Return jobs as bars over time, one lane for each that ran beside others."""
    rows = lanes(spans)
    end = max((s.end for s in spans), default=0.0) or 1.0
    row_height, bottom, left = 30, 30, 28
    plot_width = _LANES_WIDTH - left - _RIGHT
    height = 8 + row_height * len(rows) + bottom
    parts = [_open(title, height, _LANES_WIDTH)]
    for tick in time_ticks(end, 10):
        x = left + tick / end * plot_width
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - bottom}"/>'
            f'<text class="tick middle" x="{x:.1f}" y="{height - 10}">{_seconds(tick)}</text>'
        )
    for i, row in enumerate(rows):
        y = 8 + i * row_height
        parts.append(f'<text class="tick end" x="{left - 8}" y="{y + 17}">{i + 1}</text>')
        for span in row:
            x = left + span.begin / end * plot_width
            width = max(1.5, (span.end - span.begin) / end * plot_width - 1)
            name, state = _escaped(span.name), _escaped(span.state)
            parts.append(
                f'<rect class="job {state}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="24" rx="4">'
                f"<title>{name}: {state}, {_seconds(span.end - span.begin)}</title></rect>"
            )
            if width > 7 * len(span.name):
                parts.append(f'<text class="job-name" x="{x + 6:.1f}" y="{y + 16}">{name}</text>')
    return "".join([*parts, "</svg>"])


def _open(title: str, height: int = _HEIGHT, width: int = _WIDTH) -> str:
    text = _escaped(title)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text}" '
        f'preserveAspectRatio="xMidYMid meet">'
    )


def _grid(top: float, end: float | None, value_text: Callable[[float], str]) -> list[str]:
    parts = []
    for tick in ticks(top):
        y, value = _TOP + (1 - tick / top) * _PLOT_HEIGHT, _escaped(value_text(tick))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">{value}</text>'
        )
    for tick in time_ticks(end, 5) if end is not None else ():
        x = _LEFT + tick / end * _PLOT_WIDTH if end else _LEFT
        parts.append(
            f'<text class="tick middle" x="{x:.1f}" y="{_HEIGHT - 10}">{_seconds(tick)}</text>'
        )
    return parts


def _escaped(text: str) -> str:
    """Return a text of a checkpoint as people may see it, as a part of markup."""
    return escape(shown(text))


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 60 else format_duration(value)
