"""Plots of the report as hand-made SVG: text that scales with the page, the same bytes for the same numbers.

Colours are of Okabe and Ito's palette, told apart also by those who see colours differently; shape and sign repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

import numpy as np

from polyfed.run.report_comparison import SHORT, Comparison, Line
from polyfed.run.student import Standings

INK, FAINT, GRID = "#1f2933", "#5b6773", "#dfe4ea"
UP, DOWN, ALONE = "#0072b2", "#c44e00", "#5b6773"
STUDENT = "#009e73"
COLOUR = {"up": UP, "down": DOWN, "same": INK, "none": FAINT}
LABEL = 19
WIDTH = 500

Span = tuple[float, float]


def dumbbells(comparison: Comparison, span: Span) -> str:
    """Each site's metric alone and federated, joined by a line; pooled data as a tick. `span` is shared by a page."""
    lines = comparison.lines
    if not any(line.federated is not None or line.alone is not None for line in lines):
        return ""
    step = _step(len(lines))
    low, high, marks = axis(*span, limit=_limit(comparison))
    frame = _Frame(WIDTH, 12 + step * len(lines) + 46, left=_label_width(lines), right=18, top=12, bottom=46)
    at = frame.across(low, high)
    body = [frame.grid_x(marks, at, f"{comparison.short} on the site's own test rows")]
    for i, line in enumerate(lines):
        body.append(_dumbbell(comparison, line, at, 12 + step * (i + 0.5)))
        body.append(_site(line.client, frame.left, 12 + step * (i + 0.5)))
    return frame.svg(body, f"{comparison.short} of each site alone and in the federation; the table holds the numbers")


def _dumbbell(comparison: Comparison, line: Line, at: Callable[[float], float], y: float) -> str:
    colour = COLOUR[comparison.direction(line)]
    made = []
    if line.alone is not None and line.federated is not None:
        made.append(
            f'<path d="M{_n(at(line.alone))} {_n(y)}H{_n(at(line.federated))}" stroke="{colour}" stroke-width="3"/>'
        )
    if line.alone is not None:
        made.append(
            f'<circle cx="{_n(at(line.alone))}" cy="{_n(y)}" r="7.5" fill="#fff" stroke="{ALONE}" stroke-width="2"/>'
        )
    if line.pooled is not None:
        made.append(f'<path d="M{_n(at(line.pooled))} {_n(y - 10)}v20" stroke="{INK}" stroke-width="2"/>')
    if line.federated is not None:
        made.append(f'<circle cx="{_n(at(line.federated))}" cy="{_n(y)}" r="5" fill="{colour}"/>')
    return "".join(made)


def gains(comparison: Comparison, span: Span) -> str:
    """Each site's gain about zero, with its interval where one is known. `span` is shared by a page."""
    lines = comparison.lines
    if not comparison.compared:
        return ""
    step = _step(len(lines))
    low, high, marks = axis(*span, about=4)
    frame = _Frame(WIDTH, 12 + step * len(lines) + 46, left=_label_width(lines), right=68, top=12, bottom=46)
    at = frame.across(low, high)
    body = [frame.grid_x(marks, at, _gain_words(comparison))]
    body.append(f'<path d="M{_n(at(0))} 8V{_n(frame.height - frame.bottom)}" stroke="{INK}" stroke-width="1.2"/>')
    for i, line in enumerate(lines):
        y = 12 + step * (i + 0.5)
        body.append(_site(line.client, frame.left, y))
        body.append(_gain(comparison, line, at, y, frame.width - 4))
    return frame.svg(body, "gain of each site; the table holds the numbers")


def _gain(comparison: Comparison, line: Line, at: Callable[[float], float], y: float, edge: float) -> str:
    if line.gain is None:
        return text(edge, y + 4.5, "–", "end", FAINT)
    colour, made = COLOUR[comparison.direction(line)], []
    if line.interval is not None:
        a, b = at(line.interval[0]), at(line.interval[1])
        path = f"M{_n(a)} {_n(y)}H{_n(b)}M{_n(a)} {_n(y - 5)}v10M{_n(b)} {_n(y - 5)}v10"
        made.append(f'<path d="{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
    else:
        made.append(f'<path d="M{_n(at(0))} {_n(y)}H{_n(at(line.gain))}" stroke="{colour}" stroke-width="3"/>')
    made.append(f'<circle cx="{_n(at(line.gain))}" cy="{_n(y)}" r="5" fill="{colour}"/>')
    return "".join([*made, text(edge, y + 4.5, comparison.signed(line.gain), "end", colour, "600")])


def standings(found: Standings) -> str:
    """Each teacher on everyone's test rows, alone and after the run; their ensemble; the student, and a line down from it."""
    values = [v for line in found.lines for v in (line.all.value, line.all_alone.value)]
    values += [found.ensemble.value, None if found.student is None else found.student.value]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    names = [*(line.client for line in found.lines), "their ensemble", "student"]
    step = 36.0 if len(names) <= 12 else 26.0
    low, high, marks = axis(min(known), max(known), limit=None if found.is_lower_better else 1.0)
    left = 24 + 7.2 * max(min(LABEL, len(name)) for name in names)
    frame = _Frame(WIDTH, 12 + step * len(names) + 46, left=left, right=18, top=12, bottom=46)
    at, short = frame.across(low, high), SHORT.get(found.metric, found.metric.replace("_", " "))
    body = [frame.grid_x(marks, at, f"{short} on everyone's test rows")]
    if found.student is not None and found.student.value is not None:
        body.append(_mark_down(at(found.student.value), 12 + step * (len(names) - 0.5)))
    for i, line in enumerate(found.lines):
        body.append(_standing(line.all_alone.value, line.all.value, at, 12 + step * (i + 0.5)))
    for i, score in enumerate((found.ensemble, found.student), len(found.lines)):
        if score is not None and score.value is not None:
            body.append(_diamond(at(score.value), 12 + step * (i + 0.5), STUDENT if i == len(names) - 1 else INK))
    body += [_site(name, frame.left, 12 + step * (i + 0.5)) for i, name in enumerate(names)]
    return frame.svg(body, f"{short} of each teacher, their ensemble and the student; the table holds the numbers")


def _standing(alone: float | None, value: float | None, at: Callable[[float], float], y: float) -> str:
    made = []
    if alone is not None:
        made.append(
            f'<circle cx="{_n(at(alone))}" cy="{_n(y)}" r="7.5" fill="#fff" stroke="{ALONE}" stroke-width="2"/>'
        )
    if value is not None:
        made.append(f'<circle cx="{_n(at(value))}" cy="{_n(y)}" r="5" fill="{INK}"/>')
    return "".join(made)


def _mark_down(x: float, y: float) -> str:
    return f'<path d="M{_n(x)} 8V{_n(y)}" stroke="{STUDENT}" stroke-width="1.5" stroke-dasharray="4 4"/>'


def _diamond(x: float, y: float, colour: str) -> str:
    return f'<path d="M{_n(x)} {_n(y - 7)}l7 7l-7 7l-7 -7Z" fill="{colour}"/>'


def value_span(lines: Sequence[Line]) -> Span:
    """Lowest and highest of all shown metrics; (0, 1) where there is none."""
    values = [v for line in lines for v in (line.alone, line.pooled, line.federated) if v is not None]
    return (min(values), max(values)) if values else (0.0, 1.0)


def gain_span(lines: Sequence[Line]) -> Span:
    """Lowest and highest of 0, all gains and their intervals."""
    ends = [0.0, *(v for line in lines for v in (line.gain, *(line.interval or ())) if v is not None)]
    return min(ends), max(ends)


def curve(comparison: Comparison, name: str, points: Sequence[tuple[int, float]], span: Span, rounds: int) -> str:
    """One site's validation values over the rounds; all sites of a page share `span` and `rounds`."""
    low, high, marks = axis(*span, about=3, limit=_limit(comparison))
    frame = _Frame(260, 168, left=48, right=16, top=30, bottom=34)
    across, up = frame.across(1, max(2, rounds)), frame.up(low, high)
    body = [text(2, 14, _short(name, 30), "start", INK, "600", name), frame.grid_y(marks, up)]
    body.append(frame.rounds(rounds, across))
    if points:
        path = "M" + "L".join(f"{_n(across(r))} {_n(up(v))}" for r, v in points)
        body.append(f'<path d="{path}" stroke="{UP}" stroke-width="2" fill="none"/>')
        shown = points if len(points) <= 15 else points[-1:]
        body += [f'<circle cx="{_n(across(r))}" cy="{_n(up(v))}" r="3" fill="{UP}"/>' for r, v in shown]
        body.append(text(frame.width - 2, 14, comparison.value(points[-1][1]), "end", UP, "600"))
    else:
        body.append(text(frame.left + 8, 86, "no values", "start", FAINT))
    return frame.svg(body, f"validation of {name} over {rounds} rounds")


def curves_of_many(comparison: Comparison, series: Sequence[Sequence[tuple[int, float]]], rounds: int) -> str:
    """Median, middle half and middle 80 % of the sites, round by round."""
    by_round: dict[int, list[float]] = {}
    for points in series:
        for round_num, value in points:
            by_round.setdefault(round_num, []).append(value)
    if not by_round:
        return ""
    order = sorted(by_round)
    levels = np.array([np.quantile(by_round[r], [0.1, 0.25, 0.5, 0.75, 0.9]) for r in order])
    low, high, marks = axis(float(levels.min()), float(levels.max()), about=4, limit=_limit(comparison))
    frame = _Frame(WIDTH, 250, left=56, right=18, top=14, bottom=36)
    across, up = frame.across(1, max(2, rounds)), frame.up(low, high)
    body = [frame.grid_y(marks, up), frame.rounds(rounds, across)]
    for lower, upper, colour in ((0, 4, "#dceaf4"), (1, 3, "#a9cfe6")):
        there = [f"{_n(across(r))} {_n(up(v))}" for r, v in zip(order, levels[:, lower], strict=True)]
        back = [f"{_n(across(r))} {_n(up(v))}" for r, v in zip(order, levels[:, upper], strict=True)]
        body.append(f'<path d="M{"L".join([*there, *reversed(back)])}Z" fill="{colour}"/>')
    middle = "L".join(f"{_n(across(r))} {_n(up(v))}" for r, v in zip(order, levels[:, 2], strict=True))
    body.append(f'<path d="M{middle}" stroke="{UP}" stroke-width="2.5" fill="none"/>')
    return frame.svg(body, f"{comparison.short} on validation rows: median and spread over sites, round by round")


def histogram(comparison: Comparison) -> str:
    """How many sites gained and lost how much."""
    values = np.array([line.gain for line in comparison.compared], np.float64)
    if not len(values):
        return ""
    low, high, marks = axis(min(0.0, float(values.min())), max(0.0, float(values.max())), about=5)
    width = (marks[1] - marks[0]) / 5
    first, last = math.floor(low / width), math.ceil(high / width)
    edges = np.arange(first, last + 1) * width
    counts, _ = np.histogram(values, edges)
    frame = _Frame(WIDTH, 250, left=48, right=18, top=14, bottom=48)
    across, up = frame.across(float(edges[0]), float(edges[-1])), frame.up(0.0, float(counts.max()) * 1.06)
    body = [frame.grid_y(ticks(0.0, float(counts.max()), 4, whole=True), up)]
    body.append(frame.grid_x(marks, across, _gain_words(comparison), lines=False))
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            x, top = across(float(left)), up(float(count))
            box = (
                f'x="{_n(x + 0.5)}" y="{_n(top)}" width="{_n(across(float(right)) - x - 1)}" height="{_n(up(0) - top)}"'
            )
            body.append(f'<rect {box} fill="{UP if left >= -width / 2 else DOWN}"/>')
    body.append(f'<path d="M{_n(across(0))} 8V{_n(up(0))}" stroke="{INK}" stroke-width="1.2"/>')
    body.append(text(frame.left + 6, 20, "sites", "start", FAINT))
    return frame.svg(body, "how many sites gained and lost how much")


def scatter(comparison: Comparison) -> str:
    """Alone against federated, a dot a site; above the diagonal the federation has the larger number."""
    pairs = [(line, line.alone, line.federated) for line in comparison.compared]
    values = [v for _, a, f in pairs for v in (a, f) if v is not None]
    if not values:
        return ""
    low, high, marks = axis(min(values), max(values), about=6, limit=_limit(comparison))
    frame = _Frame(WIDTH, 380, left=60, right=18, top=22, bottom=48)
    across, up = frame.across(low, high), frame.up(low, high)
    body = [frame.grid_y(marks, up), frame.grid_x(marks, across, f"{comparison.short} alone")]
    body.append(f'<path d="M{_n(across(low))} {_n(up(low))}L{_n(across(high))} {_n(up(high))}" stroke="{FAINT}"/>')
    for way in ("same", "up", "down"):
        dots = "".join(
            f'<circle cx="{across(a):.0f}" cy="{up(f):.0f}" r="3"/>'
            for line, a, f in pairs
            if a is not None and f is not None and comparison.direction(line) == way
        )
        body.append(f'<g fill="{COLOUR[way]}" fill-opacity=".55">{dots}</g>' if dots else "")
    body.append(text(2, 13, f"{comparison.short} in the federation", "start", FAINT))
    return frame.svg(body, "each site alone and in the federation")


# ------------------------------------------------------------------------------------------ frame, axes and text


class _Frame:
    """The drawing area of one plot and its margins, in SVG units."""

    def __init__(self, width: float, height: float, *, left: float, right: float, top: float, bottom: float) -> None:
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = left, right, top, bottom

    def across(self, low: float, high: float) -> Callable[[float], float]:
        scale = (self.width - self.left - self.right) / (high - low)
        return lambda value: self.left + (value - low) * scale

    def up(self, low: float, high: float) -> Callable[[float], float]:
        scale = (self.height - self.top - self.bottom) / (high - low)
        return lambda value: self.height - self.bottom - (value - low) * scale

    def grid_x(self, marks: Sequence[float], at: Callable[[float], float], title: str, *, lines: bool = True) -> str:
        foot = self.height - self.bottom
        drawn = "".join(f"M{_n(at(mark))} {_n(self.top - 4)}V{_n(foot)}" for mark in marks) if lines else ""
        made = [f'<path d="{drawn}" stroke="{GRID}"/>' if drawn else ""]
        made += [
            text(at(mark), foot + 17, word, "middle", FAINT) for mark, word in zip(marks, _words(marks), strict=True)
        ]
        made.append(text(min(self.left + 2, self.width - 6.6 * len(title)), self.height - 8, title, "start", FAINT))
        return "".join(made)

    def grid_y(self, marks: Sequence[float], at: Callable[[float], float]) -> str:
        drawn = "".join(f"M{_n(self.left)} {_n(at(mark))}H{_n(self.width - self.right)}" for mark in marks)
        words = [text(self.left - 7, at(m) + 4.5, w, "end", FAINT) for m, w in zip(marks, _words(marks), strict=True)]
        return f'<path d="{drawn}" stroke="{GRID}"/>' + "".join(words)

    def rounds(self, rounds: int, at: Callable[[float], float]) -> str:
        """The first and the last round, and a few between."""
        marks = [1] if rounds <= 1 else [int(m) for m in ticks(1, rounds, 3, whole=True) if 1 < m < rounds]
        gap = max(1, rounds) * 0.12
        marks = [1, *(m for m in marks if gap < m - 1 and gap < rounds - m), rounds] if rounds > 1 else marks
        words = [text(at(m), self.height - self.bottom + 17, str(m), "middle", FAINT) for m in marks]
        return "".join(words) + text((self.left + self.width) / 2, self.height - 3, "round", "middle", FAINT)

    def svg(self, body: Sequence[str], label: str) -> str:
        size = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}" style="max-width:{_n(self.width * 1.1)}px"'
        return f'<svg {size} role="img" aria-label="{escape(label, quote=True)}">{"".join(body)}</svg>'


def axis(low: float, high: float, *, about: int = 5, limit: float | None = None) -> tuple[float, float, list[float]]:
    """(first, last, ticks) of an axis that holds low to high with a little room; `limit` is a scale's own end.

    >>> axis(0.67, 0.92, limit=1.0)
    (0.6, 1.0, [0.6, 0.7, 0.8, 0.9, 1.0])
    """
    room = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    flat = low == high
    marks = ticks(low - (room if low or flat else 0), high + (room if high or flat else 0), about, outside=True)
    if limit is not None and high <= limit:
        marks = [mark for mark in marks if mark <= limit + 1e-9]
    return min(marks[0], low), max(marks[-1], high), marks


def ticks(low: float, high: float, about: int, *, whole: bool = False, outside: bool = False) -> list[float]:
    """Round numbers within low to high, or just around them."""
    raw = max(high - low, 1e-12) / max(1, about)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = (math.floor, math.ceil) if outside else (math.ceil, math.floor)
    numbers = range(
        first(low / step + (1e-9 if outside else -1e-9)), last(high / step + (-1e-9 if outside else 1e-9)) + 1
    )
    return [round(k * step, 12) for k in numbers]


def _gain_words(comparison: Comparison) -> str:
    what = f"{comparison.short} lowered by" if comparison.is_lower_better else f"in {comparison.short}"
    return f"gain over alone ({what}); right is better"


def _limit(comparison: Comparison) -> float | None:
    """The upper end of a metric's own scale."""
    return None if comparison.is_lower_better else 1.0


def _words(marks: Sequence[float]) -> list[str]:
    """Ticks with as many decimals as their distance needs."""
    step = min((b - a for a, b in pairwise(marks)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{mark:.{digits}f}".replace("-", "−") for mark in marks]


def text(x: float, y: float, word: str, anchor: str, colour: str, weight: str = "400", title: str = "") -> str:
    full = f"<title>{escape(title)}</title>" if title and title != word else ""
    bold = "" if weight == "400" else f' font-weight="{weight}"'
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{_n(x)}" y="{_n(y)}"{where} fill="{colour}"{bold}>{full}{escape(word)}</text>'


def _site(name: str, left: float, y: float) -> str:
    return text(left - 14, y + 4.5, _short(name, LABEL), "end", INK, title=name)


def _short(name: str, most: int) -> str:
    """A long name without its middle: numbers at its end tell sites apart."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"


def _label_width(lines: Sequence[Line]) -> float:
    return 24 + 7.2 * max(min(LABEL, len(line.client)) for line in lines)


def _step(count: int) -> float:
    return 36.0 if count <= 12 else 26.0


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
