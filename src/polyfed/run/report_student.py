"""The page's section on a student: beside every teacher, their ensemble, and each teacher alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from polyfed.run import report_plots as plots
from polyfed.run.report_comparison import MEANING, SHORT, Comparison, plain_name
from polyfed.run.result import Result
from polyfed.run.student import Score, Standings


@dataclass(frozen=True)
class Row:
    """One line of the section's table, in words; `way` colours the student's gain."""

    who: str
    own_alone: str
    own: str
    all_alone: str
    all: str
    gain: str
    span: str
    way: str
    model: str


@dataclass(frozen=True)
class Section:
    """What the page says of a student."""

    found: Standings
    short: str
    meaning: str
    say: str
    figure: str
    rows: list[Row]
    mean: Row
    ends: list[Row]
    left_away: int

    @property
    def percent(self) -> str:
        return f"{self.found.level * 100:g} %"


def section(result: Result, compared: Comparison, *, most: int) -> Section | None:
    """None where there is no student, or the test rows were not read; of more than `most` teachers only the means."""
    if not (result.has_student and result.test):
        return None
    found = result.comparison()
    few = len(found.lines) <= most
    plain = {line.client: line.plain for line in compared.lines}
    student = result.federation.trainers["student"].model
    return Section(
        found=found,
        short=SHORT.get(found.metric, found.metric.replace("_", " ")),
        meaning=MEANING.get(found.metric, found.metric),
        say=headline(found),
        figure=plots.standings(found) if few else "",
        rows=[
            _row(line.client, line.all, plain[line.client], line.own_alone, line.own, line.all_alone.value)
            for line in (found.lines if few else ())
        ],
        mean=_row(
            f"Mean of {len(found.lines)}",
            Score(found.mean("all")),
            "",
            found.mean("own_alone"),
            found.mean("own"),
            found.mean("all_alone"),
        ),
        ends=[
            _row("Their ensemble", found.ensemble, ""),
            _row("Student", found.student or Score(), plain_name(student)),
        ],
        left_away=0 if few else len(found.lines),
    )


def headline(found: Standings) -> str:
    """One sentence: whether the student is better than its teachers and their ensemble, as far as the rows tell."""
    if found.student is None or found.student.value is None:
        return "What the student reaches is not known."
    beaten = [line.client for line in found.lines if line.all.gain is not None and line.all.gain > 0]
    known = [line for line in found.lines if line.all.gain is not None]
    said = f"The student reaches {_value(found.student.value)} on everyone's test rows"
    if known:
        said += f", better than {_of(len(beaten), len(known))}"
    return f"{said}; {_beside(found.ensemble)}."


def _of(count: int, total: int) -> str:
    if total == 1:
        return "its one teacher" if count else "none of its teachers"
    return f"all {total} teachers" if count == total else f"{count or 'none'} of its {total} teachers"


def _beside(ensemble: Score) -> str:
    if ensemble.gain is None or ensemble.value is None:
        return "its teachers' ensemble has no value on the same rows"
    told = f"their ensemble reaches {_value(ensemble.value)}"
    if ensemble.interval is None:
        return told
    low, high = ensemble.interval
    if low <= 0 <= high:
        return f"{told}, a difference that so few rows leave open"
    return f"{told}, which is {'worse' if ensemble.gain > 0 else 'better'} beyond what other test rows would change"


def _row(
    who: str,
    score: Score,
    model: str,
    own_alone: float | None = None,
    own: float | None = None,
    all_alone: float | None = None,
) -> Row:
    return Row(
        who=who,
        own_alone=_value(own_alone),
        own=_value(own),
        all_alone=_value(all_alone),
        all=_value(score.value),
        gain=_signed(score.gain),
        span="" if score.interval is None else f"{_signed(score.interval[0])} to {_signed(score.interval[1])}",
        way=_way(score),
        model=model,
    )


def _way(score: Score) -> str:
    """Coloured only where the interval leaves no doubt."""
    if score.interval is None:
        return "none"
    return "up" if score.interval[0] > 0 else "down" if score.interval[1] < 0 else "same"


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.{_digits(value)}f}".replace("-", "−")


def _signed(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:+.{_digits(value)}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _digits(value: float) -> int:
    """Three decimals of a number below 10, fewer of larger ones."""
    return max(0, 3 - max(0, math.floor(math.log10(abs(value))))) if value else 3
