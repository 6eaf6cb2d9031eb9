"""One self-contained page on a run: for the clinician who asks what joining did for her site, and for the engineer.

The page loads nothing: style and plots stand in it. Whatever a user or a site wrote is escaped. Equal results give equal
bytes: no date, no random name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from polyfed.core.errors import MissingExtraError, StorageError
from polyfed.run import report_facts as facts
from polyfed.run import report_plots as plots
from polyfed.run.report_comparison import FEW_CASES, Comparison, Interval, Line, Repeats, compare
from polyfed.run.report_student import section
from polyfed.run.result import Result, versions

#: Up to this many sites each has its own line and its own curve; above, spreads, and the sites at both ends.
EACH = 50
ENDS = 20
#: Of many sites that cannot be compared: the worst, those about the median and the best, so many of each.
THIRD = 10


def write(
    result: Result,
    path: str | Path,
    *,
    title: str = "",
    others: Mapping[str, Result] | None = None,
    intervals: Mapping[str, Interval] | None = None,
    intro: str = "",
    label: str = "",
    origins: Mapping[str, str] | None = None,
    level: float = 0.9,
    repeats: Mapping[str, Repeats] | None = None,
    classes: Mapping[str, str] | None = None,
) -> Path:
    """Writes one self-contained HTML page on a result; returns its path.

    Args:
        result: what the page is about.
        path: the file; folders above it are made, a file of that name is replaced.
        title: stands at the top.
        others: heading -> the result of another run over the same sites, told of in the same way.
        intervals: client -> (low, high) of its gain over repeated runs of `result` (above 0 is better).
        intro: a few sentences at the top; empty lines part paragraphs.
        label: heading for `result` itself, where there are `others`.
        origins: heading (`label` or one of `others`) -> where the shared rows of that run come from, and what was sent
            to make them: the page cannot know it.
        level: coverage of the intervals.
        repeats: heading (`label` or one of `others`) -> means over divisions of the rows: headline, plots and table then
            tell these, and the one division that `result` is comes below, named so.
        classes: class of the target -> words after a count, such as "with disease".

    Raises:
        MissingExtraError: jinja2 is not installed.
        StorageError: the file cannot be written.

    Guarantees: equal arguments give equal bytes; the page makes no request; every text in it is escaped.
    """
    text = page(
        result,
        title=title,
        others=others,
        intervals=intervals,
        intro=intro,
        label=label,
        origins=origins,
        level=level,
        repeats=repeats,
        classes=classes,
    )
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(
            f"the report cannot be written to {target}: {reason}; name a file that may be written"
        ) from error
    return target


def page(
    result: Result,
    *,
    title: str = "",
    others: Mapping[str, Result] | None = None,
    intervals: Mapping[str, Interval] | None = None,
    intro: str = "",
    label: str = "",
    origins: Mapping[str, str] | None = None,
    level: float = 0.9,
    repeats: Mapping[str, Repeats] | None = None,
    classes: Mapping[str, str] | None = None,
) -> str:
    """The page as text; arguments as for `write`."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("jinja2", "report") from None
    headings = {
        label if others else "": (result, intervals),
        **{word: (other, None) for word, other in (others or {}).items()},
    }
    compared = {
        word: compare(one, known, level=level, repeats=(repeats or {}).get(word or label), classes=classes)
        for word, (one, known) in headings.items()
    }
    spans = curve_spans([one for one, _ in headings.values()])
    blocks = [
        block(one, word, compared, (origins or {}).get(word or label, ""), spans) for word, (one, _) in headings.items()
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["upper_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["svg"] = jinja2.filters.do_mark_safe
    source = (resources.files("polyfed.run") / "templates" / "page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title or "What joining did for each site",
        intro=[part.strip() for part in intro.split("\n\n") if part.strip()],
        blocks=blocks,
        algorithm=repr(result.algorithm),
        stop=repr(result.federation.stop),
        seed=result.seed,
        versions=versions(),
        digest=result.state.digest,
        few_cases=FEW_CASES,
    )


def block(
    result: Result,
    label: str,
    comparisons: Mapping[str, Comparison],
    origin: str,
    spans: Mapping[str, plots.Span],
) -> dict[str, Any]:
    """Everything that the page tells of one run; plots of equal metrics have equal axes on the whole page."""
    compared = comparisons[label]
    lines = [line for other in comparisons.values() if other.metric == compared.metric for line in other.lines]
    each = len(compared.lines) <= EACH
    setups, preprocessings = facts.setups(result)
    rounds, skipped = facts.round_rows(result.history)
    student = section(result, compared, most=EACH)
    absent = facts.absences(result)
    return {
        "label": label,
        "result": result,
        "compared": compared,
        "each": each,
        "lines": compared.lines if each else ends(compared),
        "ends": ENDS,
        "third": THIRD,
        "repeats": compared.repeats,
        "means": compared.means(),
        "has_pooled": any(line.pooled is not None for line in compared.lines),
        "has_same": any(compared.direction(line) == "same" for line in compared.lines),
        "has_interval": any(line.interval is not None for line in compared.lines),
        "has_margin": any(line.margin is not None for line in compared.lines),
        "weak": [line for line in compared.lines if line.is_weak],
        "figures": figures(compared, lines, each=each),
        **curves(result, compared, spans, each=each),
        "student": student,
        "leads": student is not None and result.only_student_learns and compared.repeats is None,
        "origin": origin,
        "shared": facts.shared(result),
        "absent": absent[: facts.MOST],
        "absent_more": max(0, len(absent) - facts.MOST),
        "never_asked": facts.some(facts.never_asked(result)),
        "presence": list(result.presence.items())[: facts.MOST],
        "errors": list(result.errors.items())[: facts.MOST],
        "notes": [*result.notes],
        "setups": setups,
        "preprocessings": preprocessings,
        "settings": facts.run_settings(result),
        "rounds": rounds,
        "skipped": skipped,
        "some": facts.some,
    }


def ends(compared: Comparison) -> list[Line]:
    """Of many sites those that lost most and those that gained most, worst first.

    Where none can be compared: those of the worst, of middling and of the best values together.
    """
    known = sorted(compared.compared, key=lambda line: (line.gain or 0.0, line.client))
    if not known:
        return thirds(compared)
    return known if len(known) <= 2 * ENDS else [*known[:ENDS], *known[-ENDS:]]


def thirds(compared: Comparison) -> list[Line]:
    """The worst `THIRD` sites by their federated value, those about the median, and the best."""
    sign = -1.0 if compared.is_lower_better else 1.0
    there = [line for line in compared.lines if line.federated is not None]
    known = sorted(there, key=lambda line: (sign * (line.federated or 0.0), line.client))
    if len(known) <= 3 * THIRD:
        return known
    middle = (len(known) - THIRD) // 2
    return [*known[:THIRD], *known[middle : middle + THIRD], *known[-THIRD:]]


def figures(compared: Comparison, lines: list[Line], *, each: bool) -> list[str]:
    drawn = (
        [plots.dumbbells(compared, plots.value_span(lines)), plots.gains(compared, plots.gain_span(lines))]
        if each
        else [plots.histogram(compared), plots.scatter(compared)]
    )
    return [svg for svg in drawn if svg]


def curves(result: Result, compared: Comparison, spans: Mapping[str, plots.Span], *, each: bool) -> dict[str, Any]:
    """Validation values over the rounds: a small plot for each site, or the spread over many."""
    metric = compared.metric
    series = validated(result, metric)
    if not any(len(points) > 1 for points in series.values()):  # a single point is no curve
        return {"curves": [], "spread": ""}
    last = max(log.round_num for log in result.history)
    if not each:
        return {"curves": [], "spread": plots.curves_of_many(compared, list(series.values()), last)}
    drawn = [plots.curve(compared, name, points, spans[metric], last) for name, points in series.items()]
    return {"curves": drawn, "spread": ""}


def validated(result: Result, metric: str) -> dict[str, list[tuple[int, float]]]:
    """Site -> (round, finite value on its validation rows)."""
    series: dict[str, list[tuple[int, float]]] = {name: [] for name in result.population.sites}
    for log in result.history:
        for name, values in log.metrics.items():
            if name in series and math.isfinite(values.get(metric, math.nan)):
                series[name].append((log.round_num, values[metric]))
    return series


def curve_spans(results: Sequence[Result]) -> dict[str, plots.Span]:
    """Metric -> lowest and highest validation value of all runs on the page."""
    found: dict[str, list[float]] = {}
    for result in results:
        points = [value for points in validated(result, result.metric).values() for _, value in points]
        found.setdefault(result.metric, []).extend(points)
    return {metric: (min(values), max(values)) for metric, values in found.items() if values}
